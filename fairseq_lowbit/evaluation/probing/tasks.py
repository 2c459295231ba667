"""What is probed: tasks as plain data, and the error rates that each of them gives."""

from dataclasses import dataclass

from fairseq_lowbit.errors import LowbitError

# Of everything that a rate depends on beside model and data: with another id, rates are not
# comparable. Raise it with every change to the heads, their training or the choice of recordings.
PROTOCOL = "probes 2"


@dataclass(frozen=True)
class Measure:
    """An error rate.

    Attributes:
        key: in JSON, tables and file names.
        name: in sentences.
        unit: what errors are counted among.
    """

    key: str
    name: str
    unit: str


@dataclass(frozen=True)
class Task:
    """What a head learns to tell from frozen features.

    Attributes:
        extension: of the file of targets beside a manifest, one line per recording.
        is_sequence: the target is a sequence of units, learned by CTC and scored by edit distance;
            otherwise one label for the whole recording.
        measures: for a sequence of letters that of letters, then that of words.
        is_of_new_voices: tested on voices that were not trained on, those of the test split;
            otherwise on other recordings of the same voices.
    """

    name: str
    extension: str
    is_sequence: bool
    measures: tuple[Measure, ...]
    is_of_new_voices: bool = True


PHONES = Task("phones", "phn", True, (Measure("phone_error", "phone error", "phones"),))
LETTERS = Task(
    "letters",
    "wrd",
    True,
    (
        Measure("letter_error", "letter error", "letters"),
        Measure("word_error", "word error", "words"),
    ),
)
WORDS = Task(
    "words",
    "wrd",
    False,
    (Measure("keyword_error", "keyword error", "recordings"),),
)
SPEAKERS = Task(
    "speakers", "spk", False, (Measure("speaker_error", "speaker error", "recordings"),), False
)
ACCENTS = Task("accents", "acc", False, (Measure("accent_error", "accent error", "recordings"),))
# Of a folder of recordings whose subfolders are the labels.
LABELS = Task("labels", "", False, (Measure("label_error", "label error", "recordings"),))

TASKS = (PHONES, LETTERS, WORDS, SPEAKERS, ACCENTS)
MEASURES = tuple(measure for task in TASKS for measure in task.measures)


def tasks_named(names: list[str]) -> tuple[Task, ...]:
    """The tasks of these names, in the order of :data:`TASKS`.

    Raises:
        LowbitError: an unknown name.
    """
    known = [task.name for task in TASKS]
    for name in names:
        if name not in known:
            raise LowbitError(f"there is no task {name!r}: choose among {', '.join(known)}")
    return tuple(task for task in TASKS if task.name in names)
