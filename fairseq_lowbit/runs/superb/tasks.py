"""The ten tasks of SUPERB: what each needs, and which figures come out of it.

What can be tuned (learning rate, batch, updates) stands in ``config/superb/<task>.yaml``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.runs.columns import Column

_DATA = "downstream_expert.datarc"
_CORPUS = "downstream_expert.corpus"
_LOADER = "downstream_expert.loaderrc"
_EDIT = {"editdistance": "editdistance"}
_PANDAS = {"pandas": "pandas"}


@dataclass(frozen=True)
class DataPath:
    """A folder of the user's corpus that a task's configuration names.

    Attributes:
        key: in the configuration.
        places: where it is, from the folder that the user names; the first that exists is taken.
        holds: patterns of files in it, each of which has to be there.
    """

    key: str
    places: tuple[str, ...]
    holds: tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """A figure that s3prl prints.

    Attributes:
        printed: what stands before the figure.
        column: how it is shown; its key is unique among all tasks.
    """

    printed: str
    column: Column


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as SUPERB abbreviates it, in small letters.
        downstream: s3prl's name (``-d``).
        paths: of the corpus.
        metrics: the first one decides which checkpoint is best, where s3prl does not decide.
        split: s3prl's name of the test set (``-t``).
        best: the checkpoint that s3prl chooses on the validation set; None where every checkpoint
            is tested.
        batch: key of the batch size.
        workers: key of the number of processes that read audio.
        modules: what it imports beyond s3prl's own needs -> the package that has it.
        folds: values of ``datarc.test_fold``, each a training of its own, whose figures are
            averaged.
        is_trained: False for a task that only compares features.
        source: what ``--data`` has to be, in a few words.
    """

    name: str
    title: str
    downstream: str
    source: str
    paths: tuple[DataPath, ...]
    metrics: tuple[Metric, ...]
    split: str = "test"
    best: str | None = "dev-best.ckpt"
    batch: str = f"{_DATA}.batch_size"
    workers: str = f"{_DATA}.num_workers"
    modules: Mapping[str, str] = field(default_factory=dict)
    folds: tuple[str, ...] = ()
    is_trained: bool = True


def _error(key: str, title: str, note: str, unit: str = "%", factor: float = 1) -> Column:
    return Column(key, title, unit, note, 2, factor, lower_is_better=True)


def _accuracy(task: str, title: str, what: str) -> tuple[Metric, ...]:
    column = Column(f"{task}_accuracy", title, "acc. %", f"accuracy of {what}", 2, factor=100)
    return (Metric("test acc: ", column),)


def _librispeech(key: str) -> DataPath:
    subsets = ("train-clean-100", "dev-clean", "test-clean")
    files = tuple(f"{name}/*/*/*.{kind}" for name in subsets for kind in ("flac", "trans.txt"))
    return DataPath(key, ("LibriSpeech", "."), files)


def _voxceleb(key: str) -> DataPath:
    return DataPath(key, ("VoxCeleb1", "."), ("dev/wav/id*/*/*.wav", "test/wav/id*/*/*.wav"))


_TASKS = (
    Task(
        "pr",
        "phoneme recognition",
        "ctc",
        "LibriSpeech",
        (_librispeech(f"{_CORPUS}.path"),),
        (
            Metric(
                "test per: ",
                _error("pr_per", "PR", "phoneme error rate on test-clean", "PER %", factor=100),
            ),
        ),
        batch=f"{_CORPUS}.batch_size",
        workers=f"{_CORPUS}.num_workers",
        modules=_EDIT,
    ),
    Task(
        "asr",
        "speech recognition",
        "asr",
        "LibriSpeech",
        (_librispeech(f"{_DATA}.libri_root"),),
        (
            Metric(
                "test-clean wer: ",
                _error(
                    "asr_wer", "ASR", "word error rate on test-clean, no language model", "WER %"
                ),
            ),
        ),
        split="test-clean",
        best="dev-clean-best.ckpt",
        modules=_EDIT | _PANDAS,
    ),
    Task(
        "ks",
        "keyword spotting",
        "speech_commands",
        "the folder of Speech Commands and of its test set, as they unpack",
        (
            DataPath(
                f"{_DATA}.speech_commands_root",
                ("speech_commands_v0.01", "speech_commands_v0.02", "train"),
                ("yes/*.wav", "no/*.wav", "_background_noise_/*.wav"),
            ),
            DataPath(
                f"{_DATA}.speech_commands_test_root",
                ("speech_commands_test_set_v0.01", "speech_commands_test_set_v0.02", "test"),
                ("yes/*.wav", "no/*.wav", "_unknown_/*.wav", "_silence_/*.wav"),
            ),
        ),
        _accuracy("ks", "KS", "12 keywords"),
    ),
    Task(
        "qbe",
        "query by example",
        "quesst14_dtw",
        "quesst14Database",
        (
            DataPath(
                f"{_DATA}.dataset_root",
                ("quesst14Database", "."),
                (
                    "scoring/language_key_utterances.lst",
                    "scoring/language_key_dev.lst",
                    "scoring/language_key_eval.lst",
                    "scoring/score-TWV-Cnxe.sh",
                ),
            ),
        ),
        (
            Metric(
                "maxTWV: ",
                Column(
                    "qbe_mtwv",
                    "QbE",
                    "MTWV %",
                    "maximum term weighted value of the layer that is best on the development set",
                    2,
                    factor=100,
                ),
            ),
        ),
        modules={"dtw": "dtw-python", "lxml": "lxml"},
        is_trained=False,
    ),
    Task(
        "ic",
        "intent classification",
        "fluent_commands",
        "fluent_speech_commands_dataset",
        (
            DataPath(
                f"{_DATA}.file_path",
                ("fluent_speech_commands_dataset", "."),
                (
                    "data/train_data.csv",
                    "data/valid_data.csv",
                    "data/test_data.csv",
                    "wavs/speakers/*/*.wav",
                ),
            ),
        ),
        _accuracy("ic", "IC", "intents"),
        batch=f"{_DATA}.train_batch_size",
        modules=_PANDAS,
    ),
    Task(
        "sf",
        "slot filling",
        "ctc",
        "Audio SNIPS as s3prl prepares it",
        (
            DataPath(
                f"{_CORPUS}.path",
                ("SNIPS", "."),
                ("train/**/*.wav", "valid/**/*.wav", "test/**/*.wav", "all.iob.snips.txt"),
            ),
            DataPath("downstream_expert.text.slots_file", ("SNIPS/slots.txt", "slots.txt"), ()),
        ),
        (
            Metric(
                "test slot_type_f1: ",
                Column("sf_f1", "SF", "F1 %", "F1 of the types of slots", 2, factor=100),
            ),
            Metric(
                "test slot_value_cer: ",
                _error("sf_cer", "SF", "character error rate of values", "CER %", factor=100),
            ),
        ),
        batch=f"{_CORPUS}.batch_size",
        workers=f"{_CORPUS}.num_workers",
        modules=_EDIT,
    ),
    Task(
        "asv",
        "speaker verification",
        "sv_voxceleb1",
        "VoxCeleb1",
        (_voxceleb(f"{_DATA}.file_path"),),
        (
            Metric(
                "sv-voxceleb1/test-EER: ",
                _error(
                    "asv_eer",
                    "ASV",
                    "equal error rate of the best of all checkpoints",
                    "EER %",
                    factor=100,
                ),
            ),
        ),
        best=None,
        batch=f"{_DATA}.train_batch_size",
    ),
    Task(
        "sd",
        "diarization",
        "diarization",
        "the folders train, dev and test of Kaldi's form that LibriMix's script makes",
        tuple(
            DataPath(
                f"{_LOADER}.{split}_dir",
                (split,),
                ("wav.scp", "segments", "utt2spk", "spk2utt", "reco2dur"),
            )
            for split in ("train", "dev", "test")
        ),
        (
            Metric(
                r"mode test acc \S+ der ",
                _error(
                    "sd_frame_der",
                    "SD",
                    "diarization errors in frames, as s3prl logs them; SUPERB publishes what "
                    "dscore finds in written speaker turns, which is not run here",
                    "DER %",
                    factor=100,
                ),
            ),
        ),
        best="best-states-dev.ckpt",
        batch=f"{_LOADER}.train_batchsize",
        workers=f"{_LOADER}.num_workers",
        modules={"h5py": "h5py", **_PANDAS},
    ),
    Task(
        "er",
        "emotion recognition",
        "emotion",
        "IEMOCAP",
        (
            DataPath(
                f"{_DATA}.root",
                ("IEMOCAP", "IEMOCAP_full_release", "."),
                tuple(
                    f"Session{number}/{place}"
                    for number in range(1, 6)
                    for place in ("dialog/EmoEvaluation/*.txt", "sentences/wav/*/*.wav")
                ),
            ),
        ),
        _accuracy("er", "ER", "four emotions, the mean over five test sessions"),
        batch=f"{_DATA}.train_batch_size",
        folds=tuple(f"fold{number}" for number in range(1, 6)),
    ),
    Task(
        "sid",
        "speaker identification",
        "voxceleb1",
        "VoxCeleb1",
        (_voxceleb(f"{_DATA}.file_path"),),
        _accuracy("sid", "SID", "1251 speakers"),
        batch=f"{_DATA}.train_batch_size",
    ),
)
TASKS = {task.name: task for task in _TASKS}


def task_named(name: str) -> Task:
    """Raises LowbitError with the names there are."""
    if name not in TASKS:
        raise LowbitError(f"task {name}: SUPERB has {', '.join(TASKS)}")
    return TASKS[name]
