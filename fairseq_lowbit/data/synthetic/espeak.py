"""eSpeak NG through ctypes: text to samples, with nothing installed system-wide."""

from __future__ import annotations

import ctypes
import re
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from fairseq_lowbit.errors import LowbitError

# Values of speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_POS_CHARACTER = 1
_RATE, _PITCH = 1, 3
# Names of phones in ASCII with this character between them, see espeak_TextToPhonemes.
_PHONE_SEPARATOR = "|"
_PHONE_MODE = ord(_PHONE_SEPARATOR) << 8
# Before a phone: stress, pauses and words that are run together. What is left of some are marks of
# length and of palatalization, which are no phones either.
_STRESS, _LENGTH = "',%=_", ":;"

_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
# Initialisation sets the locale of the whole process.
_initialising = threading.Lock()


@dataclass(frozen=True)
class Voice:
    """A speaker: an accent (eSpeak language), a vocal tract (variant) and habits of speech."""

    accent: str
    variant: str
    words_per_minute: int
    pitch: int  # 0..99, 50 is the variant's own

    @property
    def name(self) -> str:
        return f"{self.accent}_{self.variant}".lower()


class Engine:
    """One voice of eSpeak NG, to be used by one thread at a time and closed.

    The library keeps noise and vibrato state in static variables, so what it says depends on what
    it said before. Each engine therefore loads a private copy of the file: the speech of a voice
    depends on its own texts only, and voices can speak in parallel.
    """

    def __init__(self, voice: Voice) -> None:
        self.voice = voice
        loader = _loader()
        self._chunks: list[np.ndarray] = []
        self._library = _load_private_copy(Path(loader.get_library_path()))
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        # The library keeps only the address: this reference must outlive every call.
        self._callback = _Callback(self._receive)
        data = loader.get_data_path()
        with _initialising:
            self.sample_rate = self._library.espeak_Initialize(
                _AUDIO_OUTPUT_SYNCHRONOUS, 0, data.encode(), _INITIALIZE_DONT_EXIT
            )
        if self.sample_rate <= 0:
            raise LowbitError(f"eSpeak NG could not read its data in {data}")
        # Breath and roughness are random, seeded with the time of day unless told otherwise.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(0))
        self._library.espeak_SetSynthCallback(self._callback)
        self._select_voice(Path(data))

    def _select_voice(self, data: Path) -> None:
        accent, variant = self.voice.accent, self.voice.variant
        # An unknown variant is silently ignored by eSpeak, two voices would then be the same.
        known = (data / "voices" / "!v" / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(f"{accent}+{variant}".encode()):
            self.close()
            raise LowbitError(f"this eSpeak NG has no voice {accent}+{variant}")

    def say(self, text: str, *, speed: float = 1.0, pitch: int = 0) -> np.ndarray:
        """Speaks `text`: int16 [samples] at `sample_rate`.

        `speed` multiplies the voice's pace, `pitch` is added to the voice's own.
        """
        self._chunks.clear()
        self._set(_RATE, round(self.voice.words_per_minute * speed))
        self._set(_PITCH, self.voice.pitch + pitch)
        data = text.encode()
        failed = self._library.espeak_Synth(
            data, ctypes.c_size_t(len(data) + 1), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if failed or not self._chunks:
            raise LowbitError(f"eSpeak NG ({self.voice.name}) could not say {text!r}")
        return np.concatenate(self._chunks)

    def phones(self, text: str) -> list[str]:
        """The phones by which the voice says `text`, in eSpeak's names, without stress.

        What the library says depends on what it did before: ask an engine that speaks nothing.
        """
        place = ctypes.c_char_p(text.encode())
        clauses = []
        while place.value is not None:
            spoken = self._library.espeak_TextToPhonemes(
                ctypes.byref(place), _CHARS_UTF8, _PHONE_MODE
            )
            clauses.append(spoken.decode())
        names = re.split(rf"[\s{re.escape(_PHONE_SEPARATOR)}]", " ".join(clauses))
        phones = (name.strip(_STRESS) for name in names)
        return [phone for phone in phones if phone.strip(_LENGTH)]

    def close(self) -> None:
        self._library.espeak_Terminate()

    def _set(self, parameter: int, value: int) -> None:
        self._library.espeak_SetParameter(parameter, value, 0)

    def _receive(self, samples, count: int, _events: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # 1 would stop the synthesis


def _loader() -> ModuleType:
    try:
        import espeakng_loader
    except ImportError as error:
        raise LowbitError(
            "the demo corpus needs eSpeak NG: pip install fairseq-lowbit[demo]"
        ) from error
    return espeakng_loader


def _load_private_copy(library: Path) -> ctypes.CDLL:
    # The copy may go once it is loaded; Windows keeps loaded files, hence the tolerance.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return ctypes.CDLL(str(shutil.copy(library, folder)))
