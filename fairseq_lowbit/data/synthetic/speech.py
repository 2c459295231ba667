"""An offline corpus of synthetic English, large enough to watch a speech model learn.

Many voices say isolated words and random sentences, or read a text aloud. The voices of the three
splits are disjoint, so a probe on the test words measures what the model learnt about speech, not
about speakers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from math import ceil, gcd, prod
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly
from tqdm import tqdm

from fairseq_lowbit.data.audio import SAMPLE_RATE
from fairseq_lowbit.data.manifest import write_manifest
from fairseq_lowbit.data.progress import tqdm_options
from fairseq_lowbit.data.synthetic.espeak import Engine, Voice
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write


def _split(text: str) -> list[str]:
    return text.split("/")


WORDS = _split(
    "yes/no/left/right/up/down/stop/go/on/off/one/two/three/four/five/six/seven/eight/nine/zero"
    "/house/water/garden/river/window/music/yellow/purple/morning/winter/people/children/happy"
    "/follow/sheep/fish/bird/apple/orange/visual"
)

# Each sentence takes one phrase of every part: about six million of them.
_TEMPLATES = (
    "{subject} {verb} {thing} {place} {time}",
    "{time} {subject} {verb} {thing} {place}",
    "{place} {subject} {verb} {thing} {time}",
    "{subject} {time} {verb} {thing} {place}",
)
_PARTS = {
    "subject": _split(
        "the old teacher/my younger brother/a quiet neighbour/the village doctor/your cousin"
        "/the tall farmer/our best friend/the night nurse/a young painter/the busy cook"
        "/their mother/the football team/a patient judge/the new driver/his grandfather"
        "/the small child/that boy/the church choir/every student/the famous singer"
    ),
    "verb": _split(
        "carries/has found/was watching/will choose/sells/never forgets/is looking for/brought"
        "/wants to show/described/cannot see/should fix/counted/gave away/is hiding/borrows"
    ),
    "thing": _split(
        "a red bicycle/the broken chair/two fresh apples/the letter/a bowl of soup/five ships"
        "/the heavy box/an orange hat/the garden tools/seven white sheep/a pair of gloves"
        "/the big map/some good advice/the television/a measure of gold/eight bottles of water"
        "/the loud engine/nothing but books/a joyful picture/the yellow kitchen table"
    ),
    "place": _split(
        "at the station/under the bridge/in the kitchen/behind the church/near the river"
        "/on the third floor/outside the school/by the open window/across the street"
        "/in the valley/at the edge of town/beside the fire/in front of the theatre"
        "/along the coast"
    ),
    "time": _split(
        "this morning/on thursday/every winter/before the rain/after lunch/at half past nine"
        "/once a year/in the evening/without any hurry/as usual/for the first time"
        "/until midnight/six days a week/in early july/just now/when the music stops"
    ),
}

_TRAIN_VOICES = (
    "en-us m1/en m2/en-gb-scotland m3/en-029 m4/en-gb-x-rp m5/en-us m6/en-us f1/en f2"
    "/en-gb-scotland f3/en-gb-x-gbclan f5/en-us Alex/en-gb-x-rp Annie/en-gb-x-gbcwmd Andy"
    "/en-us belinda/en linda/en-us-nyc Gene/en-gb-x-gbclan Jacky/en-us-nyc steph/en-029 grandma"
    "/en quincy/en-gb-x-gbcwmd paul/en-us miguel/en-gb-x-rp Michael/en-gb-scotland aunty"
)
_VALID_VOICES = "en-us m8/en shelby/en-gb-x-rp boris"
_TEST_VOICES = (
    "en-us m7/en f4/en-us Andrea/en-gb-scotland rob/en-gb-x-rp Mike/en-029 anika"
    "/en-us-nyc Denis/en-gb-x-gbclan Mario"
)

# Speech of the held-out splits per minute of training speech.
HELD_OUT_SHARE = 1 / 12
# However many words it says, every voice is also heard in connected speech.
_MIN_SENTENCES = 3
# Of a text: enough for word error rates that tell models apart.
TEST_SENTENCES = 500
# Takes of each test word: 640 in all, so a probe's accuracy is known to about 2 %.
_TEST_TAKES = 16
# Samples at which the louder part of an utterance begins, relative to its peak.
_SILENCE = 10 ** (-45 / 20)


def _voices(names: str) -> list[Voice]:
    """Voices with paces of 150 to 178 words per minute and varied pitches, fixed by position."""
    pairs = (name.split() for name in _split(names))
    return [
        Voice(accent, variant, 150 + 7 * (i * 3 % 5), 40 + 5 * (i * 2 % 5))
        for i, (accent, variant) in enumerate(pairs)
    ]


VOICES = {
    "train": _voices(_TRAIN_VOICES),
    "valid": _voices(_VALID_VOICES),
    "test": _voices(_TEST_VOICES),
}


@dataclass
class CorpusSummary:
    """What was written under `root`; the dictionaries are keyed by split."""

    root: Path
    minutes: dict[str, float] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    voices: dict[str, int] = field(default_factory=dict)
    word_files: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Utterance:
    """A written file: its name under the root, its samples, what it says and in which voice."""

    name: str
    samples: int
    text: str
    phones: str
    voice: Voice
    is_word: bool


@dataclass(frozen=True)
class Part:
    """What one voice has to say: isolated words, then sentences to fill `seconds`."""

    voice: Voice
    seed: tuple[int, int]
    words: list[tuple[str, int]]  # word, number of the take
    sentences: list[str]  # more than will be needed
    seconds: float
    least: int = _MIN_SENTENCES  # sentences that are said however few `seconds` there are


def synthesize_corpus(out: str | Path, *, minutes: float = 24, seed: int = 0) -> CorpusSummary:
    """Writes the corpus under `out`: at least `minutes` of training speech, 16 kHz mono FLAC.

    Each split gets `<split>.tsv` and, with a line for each of its files, `<split>.wrd` (words),
    `<split>.phn` (phones), `<split>.spk` (speaker) and `<split>.acc` (accent); the isolated words
    of the training and test voices also stand alone in `words_train` and `words_test`. Equal
    arguments give equal files. Raises LowbitError without eSpeak NG.
    """
    _check_minutes(minutes)
    return _write_corpus(Path(out), _plan(minutes, seed))


def read_aloud(
    out: str | Path,
    passages: list[list[str]],
    *,
    minutes: float = 24,
    test_sentences: int = TEST_SENTENCES,
    seed: int = 0,
) -> CorpusSummary:
    """Writes a corpus like :func:`synthesize_corpus`, without isolated words, of a text.

    Voices read different passages, and no sentence that was read before: what is tested on is new
    by its voice and by its words.

    Args:
        passages: the sentences of each, for example of :func:`texts.king_james`.
        minutes: of training speech, at least.
        test_sentences: of the test split, at least.

    Raises:
        LowbitError: without eSpeak NG, numbers that are not positive, or a text that is too short.
    """
    _check_minutes(minutes)
    if test_sentences < 1:
        raise LowbitError(f"the test split needs sentences, not {test_sentences}")
    return _write_corpus(Path(out), _plan_text(passages, minutes, test_sentences, seed))


def _check_minutes(minutes: float) -> None:
    if minutes <= 0:
        raise LowbitError(f"minutes must be positive, not {minutes}")


def _write_corpus(out: Path, parts: dict[str, list[Part]]) -> CorpusSummary:
    out.mkdir(parents=True, exist_ok=True)
    spoken = _speak_all(out, [part for split in parts.values() for part in split])
    summary = CorpusSummary(out)
    for split, split_parts in parts.items():
        utterances = [u for part in split_parts for u in spoken[part.voice]]
        _write_split(out, split, utterances)
        summary.minutes[split] = sum(u.samples for u in utterances) / SAMPLE_RATE / 60
        summary.files[split] = len(utterances)
        summary.voices[split] = len(split_parts)
        words = [u for u in utterances if u.is_word]
        if words and split != "valid":
            _write_split(out, f"words_{split}", words)
            summary.word_files[split] = len(words)
    return summary


def _plan(minutes: float, seed: int) -> dict[str, list[Part]]:
    """Shares words and sentences out among the voices; nothing here depends on the audio."""
    # One take of every word a minute: words are about two fifths of the training speech.
    takes = {"train": max(2, round(minutes)), "valid": 3, "test": _TEST_TAKES}
    shares = {"train": 1.0, "valid": HELD_OUT_SHARE, "test": HELD_OUT_SHARE}
    numbers = sentence_numbers(minutes, seed)
    plan, position = {}, 0
    for split, voices in VOICES.items():
        plan[split] = []
        for i, voice in enumerate(voices):
            seconds = 60 * minutes * shares[split] / len(voices)
            words = _words_of_voice(i, len(voices), takes[split])
            chosen = numbers[position :: sum(map(len, VOICES.values()))]
            chosen = [sentence(int(number)) for number in chosen]
            plan[split].append(Part(voice, (seed, position), words, chosen, seconds))
            position += 1
    return plan


def _plan_text(
    passages: list[list[str]], minutes: float, test_sentences: int, seed: int
) -> dict[str, list[Part]]:
    """Shares passages out among the voices; a sentence that two of them hold goes to the first."""
    order = np.random.default_rng(seed).permutation(len(passages))
    speakers, said = sum(map(len, VOICES.values())), set()
    plan, position = {}, 0
    for split, voices in VOICES.items():
        plan[split] = []
        share = {"train": 1, "valid": HELD_OUT_SHARE, "test": 0}[split]
        seconds = 60 * minutes * share / len(voices)
        least = ceil(test_sentences / len(voices)) if split == "test" else _MIN_SENTENCES
        for voice in voices:
            sentences = []
            for passage in order[position::speakers]:
                new = [text for text in dict.fromkeys(passages[passage]) if text not in said]
                said.update(new)
                sentences += new
            # No sentence is shorter than half a second.
            if len(sentences) < max(least, 2 * seconds):
                raise LowbitError(
                    f"the text is too short for {minutes:g} minutes and {test_sentences} test "
                    f"sentences: a voice of the {split} split would have {len(sentences)} "
                    f"sentences to read, and needs {ceil(max(least, 2 * seconds))}"
                )
            plan[split].append(Part(voice, (seed, position), [], sentences, seconds, least))
            position += 1
    return plan


def _words_of_voice(voice: int, voices: int, takes: int) -> list[tuple[str, int]]:
    """The words that one of `voices` says when every word is said `takes` times in all."""
    return [
        (word, take)
        for w, word in enumerate(WORDS)
        for take in range(takes)
        if (w + take) % voices == voice
    ]


def sentence_numbers(minutes: float, seed: int) -> np.ndarray:
    """Distinct numbers for `sentence`, more than ``minutes`` take, so that no sentence is said by
    two voices: int [sentences]."""
    # No sentence is shorter than a second; every voice gets some even in a tiny corpus.
    needed = int(60 * minutes) + 20 * sum(map(len, VOICES.values()))
    total = len(_TEMPLATES) * prod(map(len, _PARTS.values()))
    if needed > total // 2:
        raise LowbitError(f"the demo corpus cannot be longer than {total // 120} minutes")
    return np.random.default_rng(seed).choice(total, needed, replace=False)


def sentence(number: int) -> str:
    """The sentence of that number: the digits of `number` in a mixed base choose the phrases."""
    number, template = divmod(number, len(_TEMPLATES))
    phrases = {}
    for part, choices in _PARTS.items():
        number, choice = divmod(number, len(choices))
        phrases[part] = choices[choice]
    return _TEMPLATES[template].format(**phrases)


def _speak_all(out: Path, parts: list[Part]) -> dict[Voice, list[_Utterance]]:
    """Voices are independent of each other, so the number of threads does not change a sample."""
    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        spoken = pool.map(lambda part: list(_speak(out, part)), parts)
        bar = tqdm(spoken, "voices", len(parts), **tqdm_options())
        return {part.voice: utterances for part, utterances in zip(parts, bar, strict=True)}


def _speak(out: Path, part: Part) -> Iterator[_Utterance]:
    folder = Path("audio", part.voice.name)
    (out / folder).mkdir(parents=True, exist_ok=True)
    with closing(Engine(part.voice)) as reader:
        for stem, text, speech in record_part(part):
            name = (folder / f"{stem}.flac").as_posix()
            write_speech(out / name, speech)
            phones = " ".join(reader.phones(text))
            yield _Utterance(name, len(speech), text, phones, part.voice, text in WORDS)


def write_speech(path: Path, speech: np.ndarray) -> None:
    soundfile.write(path, speech, SAMPLE_RATE, subtype="PCM_16")


def record_part(part: Part) -> Iterator[tuple[str, str, np.ndarray]]:
    """Stem of the file, text and samples (float32 at 16 kHz) of each utterance."""
    rng = np.random.default_rng(part.seed)
    least = len(part.words) + part.least
    seconds = 0.0
    with closing(Engine(part.voice)) as engine:
        for i, (stem, text) in enumerate(_script(part)):
            if i >= least and seconds >= part.seconds:
                return
            speech = _record(engine, text, rng)
            seconds += len(speech) / SAMPLE_RATE
            yield stem, text, speech


def _script(part: Part) -> Iterator[tuple[str, str]]:
    """File stems and texts, the isolated words first."""
    for word, take in part.words:
        yield f"word_{word}_{take:02d}", word
    for i, text in enumerate(part.sentences):
        yield f"sentence_{i:04d}", text


def _record(engine: Engine, text: str, rng: np.random.Generator) -> np.ndarray:
    """One utterance as a microphone might hear it: float32 [samples] at 16 kHz, below 1.

    Loudness, pace, pitch and pauses vary, and a little noise keeps the pauses from being zeros.
    """
    spoken = engine.say(text, speed=rng.uniform(0.88, 1.15), pitch=int(rng.integers(-5, 6)))
    common = gcd(engine.sample_rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // common, engine.sample_rate // common
    speech = _trim(resample_poly(spoken.astype(np.float32), up, down))
    before, after = (int(rng.uniform(0.08, 0.16) * SAMPLE_RATE) for _ in range(2))
    speech = np.pad(speech, (before, after))
    speech *= rng.uniform(0.25, 0.9) / np.abs(speech).max()
    loudness = np.sqrt(np.mean(speech**2))
    noise = rng.standard_normal(len(speech), dtype=np.float32)
    noise *= loudness * 10 ** (-rng.uniform(28, 42) / 20)
    return np.clip(speech + noise, -1, 1).astype(np.float32)


def _trim(speech: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(speech) > _SILENCE * np.abs(speech).max())
    return speech[loud[0] : loud[-1] + 1]


def _write_split(out: Path, split: str, utterances: list[_Utterance]) -> None:
    write_manifest(out / f"{split}.tsv", out, [(u.name, u.samples) for u in utterances])
    columns = {
        "wrd": [u.text for u in utterances],
        "phn": [u.phones for u in utterances],
        "spk": [u.voice.name for u in utterances],
        "acc": [u.voice.accent for u in utterances],
    }
    for extension, lines in columns.items():
        with atomic_write(out / f"{split}.{extension}") as file:
            file.writelines(f"{line}\n" for line in lines)
