"""What probes are trained and tested on: recordings with targets, of a data folder or a user's."""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fairseq_lowbit.data.audio import SAMPLE_RATE, UnusableAudio, convert_audio
from fairseq_lowbit.data.manifest import Manifest, read_manifest
from fairseq_lowbit.data.prepare import MAX_SECONDS, find_audio
from fairseq_lowbit.data.transcripts import read_speakers, read_transcripts
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.probing.tasks import LABELS, LETTERS, SPEAKERS, WORDS, Task
from fairseq_lowbit.evaluation.utterances import Utterances, batched, chosen_lines

logger = logging.getLogger(__name__)

# Audio of each kind, relative to the seconds that are asked for.
_CONNECTED, _WORDS = {"train": 1.5, "test": 1.0}, {"train": 1.0, "test": 0.8}
# Of what has no test split of its own, the share that is tested on.
_TEST_SHARE = 0.3
_FEWEST_PER_LABEL, _FEWEST_TRANSCRIPTS = 4, 10
_SHORTEST = 0.1  # seconds


@dataclass(frozen=True)
class Example:
    """A recording and what is to be told of it.

    Attributes:
        recording: its number among those of the batches.
        target: phones or words with spaces between, or one label.
        group: its speaker, or a name of its own where the speaker is not known.
    """

    recording: int
    target: str
    group: str


@dataclass(frozen=True)
class TaskData:
    """One task's examples; ``test`` shares no recording with ``train``."""

    task: Task
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    def digest(self) -> str:
        """Equal where the same was to be told of the same recordings."""
        return hashlib.sha256(repr((self.task.name, self.train, self.test)).encode()).hexdigest()


@dataclass(frozen=True)
class ProbeData:
    """Every recording once, and the tasks on them.

    Attributes:
        batches: ``lines`` are the numbers of the recordings.
        left_out: by the name of a task, why it is not measured.
    """

    batches: tuple[Utterances, ...]
    tasks: tuple[TaskData, ...]
    left_out: dict[str, str]


class Recordings:
    """The recordings of all tasks, each read once and numbered, as 16 kHz mono."""

    def __init__(self) -> None:
        self._waves: list[torch.Tensor] = []
        self._numbers: dict[Path, int | None] = {}

    def usable(self, path: Path) -> int | None:
        """The number of a recording, in any format; None after a warning where nothing can be made
        of it."""
        if path not in self._numbers:
            self._numbers[path] = self._read(path)
        return self._numbers[path]

    def _read(self, path: Path) -> int | None:
        try:
            wave = convert_audio(path)
            seconds = len(wave) / SAMPLE_RATE
            if not _SHORTEST <= seconds <= MAX_SECONDS:
                raise UnusableAudio(
                    path, f"{seconds:.2f} s are not between {_SHORTEST} and {MAX_SECONDS:g} s"
                )
        except UnusableAudio as error:
            logger.warning(f"left out: {error}")
            return None
        self._waves.append(torch.from_numpy(wave))
        return len(self._waves) - 1

    def batches(self, normalize: bool) -> tuple[Utterances, ...]:
        """All that were read, longest first.

        Args:
            normalize: each to zero mean and unit variance.
        """
        waves = self._waves
        if normalize:
            waves = [F.layer_norm(wave, wave.shape) for wave in waves]
        lengths = torch.tensor([len(wave) for wave in waves])
        found = []
        for lines in batched(lengths.tolist(), range(len(waves))):
            rows = torch.nn.utils.rnn.pad_sequence([waves[i] for i in lines], batch_first=True)
            found.append(Utterances(lines, rows, lengths[lines]))
        return tuple(found)


def read_probe_data(
    data: Path, tasks: Sequence[Task], seconds: float, normalize: bool = False
) -> ProbeData:
    """Reads a random but reproducible choice of the recordings of a data folder.

    Sequences are learned on ``train`` and tested on ``test``, speakers on other recordings of
    ``train``. Words and accents are those of isolated words, ``words_train`` and ``words_test``;
    without them accents are those of all recordings.

    Args:
        tasks: those that the folder has no targets for are left out.
        seconds: a measure of how much audio is used, see ``_CONNECTED`` and ``_WORDS``.
        normalize: whether the model was trained on normalized utterances.

    Raises:
        LowbitError: targets that do not belong to their manifest; no usable recording.
    """
    recordings, found, left_out = Recordings(), [], {}
    folder = _DataFolder(data, seconds, recordings)
    for task in tasks:
        missing = folder.missing(task)
        if missing is not None:
            left_out[task.name] = missing
            continue
        train = folder.examples("train", task)
        if task.is_of_new_voices:
            test = folder.examples("test", task)
        else:
            train, test = _split(train)
        found.append(TaskData(task, tuple(train), tuple(test)))
    return ProbeData(recordings.batches(normalize), tuple(found), left_out)


@dataclass(frozen=True)
class _DataFolder:
    data: Path
    seconds: float
    recordings: Recordings

    def missing(self, task: Task) -> str | None:
        """Why a task cannot be measured; None if it can."""
        for split in ("train", "test") if task.is_of_new_voices else ("train",):
            for name, _ in self._manifests(split, task):
                for extension in ("tsv", task.extension):
                    if not (self.data / f"{name}.{extension}").is_file():
                        return (
                            f"there is no {self.data / name}.{extension}; fairseq-lowbit "
                            "synthesize writes a corpus with all of them"
                        )
        return None

    def examples(self, split: str, task: Task) -> list[Example]:
        """The usable recordings of a split, with their targets."""
        found = []
        for name, seconds in self._manifests(split, task):
            manifest = read_manifest(self.data / f"{name}.tsv")
            targets = read_transcripts(manifest, task.extension)
            speakers = read_speakers(manifest)
            lines = [line for line in range(len(manifest)) if targets[line]]
            if name == split:
                lines = self._without_words(split, manifest, lines)
            for line in chosen_lines(manifest, seconds, lines):
                path = manifest.root / manifest.names[line]
                number = self.recordings.usable(path)
                if number is not None:
                    found.append(Example(number, targets[line], speakers[line]))
        if not found:
            raise LowbitError(f"{self.data}: no recording of {split} is usable for {task.name}")
        return found

    def _manifests(self, split: str, task: Task) -> list[tuple[str, float]]:
        """The manifests that a task takes recordings of, with seconds of each."""
        words = (f"words_{split}", self.seconds * _WORDS[split])
        connected = (split, self.seconds * _CONNECTED[split])
        has_words = (self.data / "words_train.tsv").is_file()
        if task is WORDS:
            return [words]
        if task is SPEAKERS:
            return [connected]  # a word is too short to know a voice by
        if task.is_sequence:
            return [connected, words] if has_words else [connected]
        return [words] if has_words else [connected]

    def _without_words(self, split: str, manifest: Manifest, lines: list[int]) -> list[int]:
        """Without the isolated words, of which there are enough in their own manifest."""
        path = self.data / f"words_{split}.tsv"
        words = set(read_manifest(path).names) if path.is_file() else set()
        return [line for line in lines if manifest.names[line] not in words] or lines


def read_labelled_folder(source: Path, normalize: bool = False) -> ProbeData:
    """Recordings in any format whose folder below ``source`` is their label; a part of each label's
    is tested on.

    Raises:
        LowbitError: no folder, no recording, one without a label, one label only, or a label with
            too few recordings.
    """
    paths = find_audio(source)
    labels = {path: path.relative_to(source).parts[0] for path in paths}
    loose = [path for path in paths if path.parent == source]
    if loose:
        raise LowbitError(
            f"{loose[0]} has no label: put every recording of {source} into a folder that is named "
            "by its label, or give --transcripts"
        )
    recordings = Recordings()
    examples = _usable(recordings, source, labels)
    counts = Counter(dict.fromkeys(labels.values(), 0))
    counts.update(example.target for example in examples)
    if len(counts) < 2:
        raise LowbitError(
            f"{source}: all recordings have the label {next(iter(counts))!r}; a "
            "probe has to tell two labels or more apart"
        )
    label, fewest = min(counts.items(), key=lambda item: item[1])
    if fewest < _FEWEST_PER_LABEL:
        raise LowbitError(
            f"{source}: the label {label!r} has {fewest} usable recordings; each needs "
            f"{_FEWEST_PER_LABEL} or more, to train and to test on"
        )
    train, test = _split(examples)
    return ProbeData(
        recordings.batches(normalize), (TaskData(LABELS, tuple(train), tuple(test)),), {}
    )


def read_transcribed_folder(source: Path, transcripts: Path, normalize: bool = False) -> ProbeData:
    """Recordings in any format with a table of what is said in them.

    Args:
        transcripts: lines of ``path below source<TAB>text``, one for every recording.

    Raises:
        LowbitError: a line of another form, recordings and lines that do not match, or too few.
    """
    texts = _read_table(transcripts)
    paths = {path.relative_to(source).as_posix(): path for path in find_audio(source)}
    for named, known, where in (
        (texts, paths, f"{source} has no such recording"),
        (paths, texts, f"{transcripts} has no line for it"),
    ):
        absent = [name for name in named if name not in known]
        if absent:
            raise LowbitError(
                f"{transcripts} does not match {source}: {absent[0]}: {where}"
                + (f", and {len(absent) - 1} more" if len(absent) > 1 else "")
            )
    recordings = Recordings()
    examples = _usable(recordings, source, {path: texts[name] for name, path in paths.items()})
    if len(examples) < _FEWEST_TRANSCRIPTS:
        raise LowbitError(
            f"{source} has {len(examples)} usable recordings; letters need {_FEWEST_TRANSCRIPTS} "
            "or more, to train and to test on"
        )
    train, test = _split(examples, by_label=False)
    data = TaskData(LETTERS, tuple(train), tuple(test))
    return ProbeData(recordings.batches(normalize), (data,), {})


def _read_table(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise LowbitError(f"there are no transcripts {path}")
    texts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, tab, text = line.partition("\t")
        if not tab or not name or not text.split():
            raise LowbitError(f"{path}:{number}: expected `path<TAB>text`, found {line!r}")
        texts[name] = " ".join(text.split())
    return texts


def _usable(recordings: Recordings, source: Path, targets: dict[Path, str]) -> list[Example]:
    """Examples of the recordings that can be used, each a group of its own."""
    examples = []
    for path, target in targets.items():
        number = recordings.usable(path)
        if number is not None:
            examples.append(Example(number, target, path.relative_to(source).as_posix()))
    return examples


def _split(
    examples: Sequence[Example], by_label: bool = True
) -> tuple[list[Example], list[Example]]:
    """A part of the examples, of those of every label if asked for, to test on: the same ones each
    time."""
    kinds: dict[str, list[Example]] = {}
    for example in examples:
        kinds.setdefault(example.target if by_label else "", []).append(example)
    rng = np.random.default_rng(0)
    train, test = [], []
    for _, members in sorted(kinds.items()):
        order = rng.permutation(len(members))
        count = max(1, round(_TEST_SHARE * len(members))) if len(members) > 1 else 0
        test += [members[index] for index in order[:count]]
        train += [members[index] for index in order[count:]]
    return train, test
