"""What s3prl 0.4 imports and today's packages no longer have, or are not needed for.

torchaudio 2.9 lost its own audio reading, and beside a CPU build of torch it often does not load at
all. s3prl reads audio by it, and imports it in many places that an upstream never reaches. A
stand-in takes its place in ``sys.modules`` as long as s3prl is imported or run: it reads audio by
soundfile, has whatever else the installed torchaudio has, and refuses the rest when it is called.
No installed file is touched.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import soundfile
import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop.s3prl.phone_corpus import PhoneCorpus

ROOT = "S3PRL_ROOT"


class StandIn(ModuleType):
    """A module, function or class that can be imported by any name, and refuses to be called.

    Args:
        name: full name, such as ``torchaudio.transforms``.
        installed: where names are taken from first; None when nothing is installed.
        own: what stands here.
    """

    def __init__(self, name: str, installed: ModuleType | None = None, **own: Any) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, loader=None)
        self.__path__ = getattr(installed, "__path__", [])
        self._installed = installed
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__} has no {name}")
        if hasattr(self._installed, name):
            return getattr(self._installed, name)
        return StandIn(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        package = self.__name__.partition(".")[0]
        raise LowbitError(
            f"s3prl calls {self.__name__}, which is not there: install a {package} that has it"
        )


def find_s3prl() -> tuple[Path, str]:
    """The folder of s3prl's package and its version. Of ``S3PRL_ROOT``, its repository, in place of
    an installed one if that is set; from then on Python imports it from there too.

    Raises:
        LowbitError: it is not there, or of a version that is not known to work.
    """
    root = os.environ.get(ROOT)
    if root:
        if not Path(root, "s3prl/hub.py").is_file():
            raise LowbitError(f"{ROOT}={root} is not the repository of s3prl: no s3prl/hub.py")
        if root not in sys.path:
            sys.path.insert(0, root)
    found = None
    with suppress(ValueError):  # None stands in sys.modules
        found = importlib.util.find_spec("s3prl")
    if found is None or found.origin is None:
        raise LowbitError(
            "s3prl is not installed: pip install requests, pip install --no-deps s3prl; see "
            "docs/superb.md"
        )
    folder = Path(found.origin).resolve().parent
    version = (folder / "version.txt").read_text(encoding="utf-8").strip()
    if not version.startswith("0.4."):
        raise LowbitError(
            f"{folder} is s3prl {version}, which is not known to work: pip install --no-deps "
            "'s3prl>=0.4.18,<0.5'"
        )
    return folder, version


@contextmanager
def stand_ins() -> Iterator[None]:
    """While it lasts, s3prl can be imported; afterwards ``sys.modules`` has the others again."""
    modules = {**_torchaudio(), **_unused(), **_file_search(), **_phone_corpus()}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def missing_modules_named() -> Iterator[None]:
    """Around what imports s3prl: raises LowbitError for a module that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise LowbitError(
            f"s3prl needs the module {error.name}, which is not installed: see docs/superb.md"
        ) from error


def complete_huggingface_hub() -> None:
    """Names that huggingface_hub 1.0 lost and s3prl imports, for uploads only."""
    hub = importlib.import_module("huggingface_hub")
    for name in ("HfFolder", "Repository"):
        if not hasattr(hub, name):
            setattr(hub, name, StandIn(f"huggingface_hub.{name}"))


def _torchaudio() -> dict[str, ModuleType]:
    installed = _installed_torchaudio()
    if installed is not None and hasattr(installed, "sox_effects"):
        return {}  # before version 2.9
    effects = StandIn("torchaudio.sox_effects", apply_effects_file=apply_effects_file)
    modules = {"torchaudio.sox_effects": effects}
    if installed is None:
        names = [f"torchaudio.{part}" for part in ("compliance", "compliance.kaldi", "functional")]
        modules |= {name: StandIn(name) for name in names}
        modules["torchaudio.transforms"] = StandIn("torchaudio.transforms", Resample=Resample)
    modules["torchaudio"] = StandIn(
        "torchaudio",
        installed,
        load=load,
        set_audio_backend=lambda backend: None,
        sox_effects=effects,
    )
    return modules


def _installed_torchaudio() -> ModuleType | None:
    """None when it is not there or does not load."""
    try:
        return importlib.import_module("torchaudio")
    except (ImportError, OSError):  # OSError: a CUDA build beside a CPU torch
        return None


def _unused() -> dict[str, ModuleType]:
    """What is imported and never called where we run it: samplers of keyword spotting in several
    processes, and a tool of speaker verification."""
    names = ("catalyst", "catalyst.data", "catalyst.data.sampler", "sox")
    missing = [name for name in names if not _is_installed(name.partition(".")[0])]
    return {name: StandIn(name) for name in missing}


def _file_search() -> dict[str, ModuleType]:
    """Of librosa, which brings a compiler along, the speaker and emotion tasks list files by."""
    if _is_installed("librosa"):
        return {}
    util = StandIn("librosa.util", find_files=find_files)
    return {"librosa": StandIn("librosa", util=util), "librosa.util": util}


def _phone_corpus() -> dict[str, ModuleType]:
    """The corpora of s3prl's task ``ctc``, which its repository has and its package lacks."""
    package = "s3prl.downstream.ctc.corpus"
    if (find_s3prl()[0] / "downstream/ctc/corpus").is_dir():
        return {}
    phones = StandIn(f"{package}.libriphone", LibriPhoneDataset=PhoneCorpus)
    return {package: StandIn(package, libriphone=phones), f"{package}.libriphone": phones}


def _is_installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


class Resample:
    """As torchaudio's, for audio that has the wanted rate: emotion recognition always makes one.

    Raises:
        LowbitError: the rates differ.
    """

    def __init__(self, orig_freq: int, new_freq: int) -> None:
        if orig_freq != new_freq:
            raise LowbitError(
                f"s3prl resamples audio of {orig_freq} Hz to {new_freq} Hz, which needs torchaudio"
            )

    def __call__(self, waveform: Tensor) -> Tensor:
        return waveform


def load(path: str | Path) -> tuple[Tensor, int]:
    """As torchaudio's: float32 [channels, samples] in -1 to 1, and the rate in Hz."""
    samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T.copy()), rate


def apply_effects_file(path: str | Path, effects: Sequence[Sequence[str]]) -> tuple[Tensor, int]:
    """As torchaudio's, for the effects ``channels``, ``rate`` and ``gain`` (in dB).

    Raises:
        LowbitError: another effect or number of channels, or a rate that the file does not have.
    """
    waveform, rate = load(path)
    for name, *values in effects:
        match name, values:
            case "channels", ["1"]:
                waveform = waveform.mean(dim=0, keepdim=True)
            case "gain", [decibels]:
                waveform = waveform * 10 ** (float(decibels) / 20)
            case "rate", [wanted]:
                if int(wanted) != rate:
                    raise LowbitError(f"{path} has {rate} Hz where {wanted} Hz are needed")
            case _:
                raise LowbitError(
                    f"s3prl wants the effect of SoX {' '.join([name, *values])}, which needs "
                    "torchaudio 2.8 or older"
                )
    return waveform, rate


def find_files(folder: str | Path) -> list[str]:
    """As librosa's: every sound file below a folder, in order."""
    kinds = (".flac", ".wav")
    found = (path for path in Path(folder).rglob("*") if path.suffix.lower() in kinds)
    return sorted(str(path.absolute()) for path in found)
