"""Before hours are spent: what a task needs is there, and what it reads is written."""

import hashlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fairseq_lowbit.data.superb import (
    read_lexicon,
    write_lengths,
    write_letters,
    write_phones,
    write_slot_letters,
    write_spoken_lexicon,
)
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.runs.superb.tasks import DataPath, Task

ESPEAK = "espeak"
_EXPERT = "downstream_expert"
_REPOSITORY = "set S3PRL_ROOT to a clone of https://github.com/s3prl/s3prl"
_LEXICA = ("librispeech-lexicon-200k-g2p.txt", "librispeech-lexicon-allothers-g2p.txt")
_SESSIONS = tuple(f"Session{number}" for number in range(1, 6))


@dataclass(frozen=True)
class Order:
    """What was asked for. Paths are absolute: s3prl changes the working directory.

    Attributes:
        model: see :data:`fairseq_lowbit.interop.SOURCES`.
        name: of the model in tables.
        data: the user's folder.
        out: folder of everything that is made.
        changes: KEY=VALUE for the task's configuration.
        lexicon: a file of words and their phones, for phoneme recognition; :data:`ESPEAK` to have
            it made; None for s3prl's.
        workers: processes that read audio.
    """

    task: Task
    model: str
    name: str
    data: Path
    out: Path
    changes: tuple[str, ...]
    lexicon: str | None
    workers: int
    device: str


def check_machine(order: Order, s3prl: Path) -> None:
    """Raises LowbitError for what a task needs and this machine, or the device asked for, lacks.

    Args:
        s3prl: folder of its package.
    """
    task = order.task
    missing = [
        package
        for module, package in task.modules.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise LowbitError(f"task {task.name} needs: pip install {' '.join(missing)}")
    if task.name == "sf" and not (s3prl / "downstream/ctc/corpus/snips.py").is_file():
        raise LowbitError(f"task sf needs code that s3prl's package lacks: {_REPOSITORY}")
    if task.name == "qbe" and shutil.which("java") is None:
        raise LowbitError("task qbe is scored by the corpus' own program, which needs java")
    if task.name == "asv":
        _check_verification(order.device)


def _check_verification(device: str) -> None:
    try:
        import torchaudio

        has_effects = hasattr(torchaudio, "sox_effects")
    except (ImportError, OSError):
        has_effects = False
    if not has_effects:
        raise LowbitError("task asv cuts silence by SoX, which needs torchaudio 2.8 or older")
    if not device.startswith("cuda"):
        raise LowbitError("task asv needs a GPU: s3prl's code for it runs nowhere else")


def fingerprint(model: str) -> str:
    """Size and SHA-256 of the file, or the files of the folder, that a model is read from: one path
    may hold another model tomorrow. "" for an id of a hub.

    Args:
        model: see :data:`fairseq_lowbit.interop.SOURCES`.
    """
    path = Path(model)
    files = sorted(path.glob("*.*")) if path.is_dir() else [path]
    size, digest = 0, hashlib.sha256()
    for file in files:
        if file.is_file():
            size += file.stat().st_size
            with open(file, "rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"{size} bytes, sha256 {digest.hexdigest()}" if size else ""


def configure(order: Order, template: Path) -> tuple[DictConfig, tuple[str, ...]]:
    """The configuration of a task, and what of it is not SUPERB's, as KEY=VALUE in order.

    Args:
        template: of ``config/superb``.

    Raises:
        LowbitError: a change of a key that is not there; a corpus of another layout.
    """
    config, usual = OmegaConf.load(template), OmegaConf.load(template)
    changed = {}
    for change in order.changes:
        key = _change(config, change)
        value = OmegaConf.select(config, key)
        changed[key] = None if value == OmegaConf.select(usual, key) else f"{key}={value}"
    _fit_intervals(config)
    OmegaConf.update(config, order.task.workers, order.workers)
    for path in order.task.paths:
        OmegaConf.update(config, path.key, str(_find(path, order)))
    return config, tuple(sorted(filter(None, changed.values())))


def prepare(order: Order, config: DictConfig, s3prl: Path) -> str:
    """Writes what a task reads beside its corpus below ``order.out``, and names it in ``config``.

    Args:
        s3prl: folder of its package.

    Returns:
        A digest of all files that ``config`` names, such as vocabularies and lexica.

    Raises:
        LowbitError: a corpus that does not fit; something that only s3prl's repository has, without
            it.
    """
    if order.task.name in _PREPARATIONS:
        order.out.mkdir(parents=True, exist_ok=True)
        _PREPARATIONS[order.task.name](order, config, s3prl)
    digest = hashlib.sha256()
    for file in _named_files(OmegaConf.to_container(config)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _named_files(value: Any) -> Iterator[Path]:
    """Files whose absolute paths are anywhere in a configuration."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _named_files(part)
    elif isinstance(value, str) and Path(value).is_absolute() and Path(value).is_file():
        yield Path(value)


def _change(config: DictConfig, change: str) -> str:
    """Changes a value, and returns its key."""
    key, separator, value = change.partition("=")
    missing = object()
    if not separator or OmegaConf.select(config, key, default=missing) is missing:
        raise LowbitError(f"{change}: the task's configuration has no such KEY=VALUE to change")
    OmegaConf.update(config, key, OmegaConf.from_dotlist([f"value={value}"]).value)
    return key


def _fit_intervals(config: DictConfig) -> None:
    """Short runs are validated and kept at their end."""
    total = config.runner.get("total_steps")
    for name in ("log_step", "eval_step", "save_step"):
        if total is not None:
            config.runner[name] = min(config.runner[name], total)
            if total % config.runner[name]:
                raise LowbitError(
                    f"runner.total_steps {total} is no multiple of runner.{name} "
                    f"{config.runner[name]}: the last updates would be lost"
                )


def _find(path: DataPath, order: Order) -> Path:
    """Where a part of the corpus is; raises LowbitError if it is not there or not whole."""
    places = [order.data / place for place in path.places]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise LowbitError(
            f"--data {order.data} has no {' or '.join(path.places)}: task {order.task.name} needs "
            f"{order.task.source}"
        )
    for pattern in path.holds:
        if next(found.glob(pattern), None) is None:
            raise LowbitError(
                f"{found} has no {pattern}: task {order.task.name} needs {order.task.source}"
            )
    return found.resolve()


def _phoneme_recognition(order: Order, config: DictConfig, s3prl: Path) -> None:
    corpus, phones = Path(config[_EXPERT].corpus.path), order.out / "phones.txt"
    if order.lexicon == ESPEAK:
        files = [order.out / "lexicon.txt"]
        write_spoken_lexicon(corpus, files[0])
    else:
        files = [Path(order.lexicon)] if order.lexicon else _published_lexica(s3prl)
    write_phones(read_lexicon(files), corpus, phones)
    config[_EXPERT].corpus.lexicon = [str(file) for file in files]
    config[_EXPERT].text.vocab_file = str(phones)


def _published_lexica(s3prl: Path) -> list[Path]:
    files = [s3prl / "downstream/ctc/lexicon" / name for name in _LEXICA]
    if not all(file.is_file() for file in files):
        raise LowbitError(
            "task pr needs the phones of words: --lexicon FILE, a word and its phones to a line, "
            f"or those of s3prl's repository ({', '.join(_LEXICA)}): {_REPOSITORY}"
        )
    return files


def _speech_recognition(order: Order, config: DictConfig, s3prl: Path) -> None:
    datarc, letters, lengths = (
        config[_EXPERT].datarc,
        order.out / "letters.txt",
        order.out / "lengths",
    )
    write_letters(Path(datarc.libri_root), letters)
    write_lengths(Path(datarc.libri_root), lengths)
    datarc.dict_path, datarc.bucket_file = str(letters), str(lengths)


def _slot_filling(order: Order, config: DictConfig, s3prl: Path) -> None:
    letters = order.out / "letters.txt"
    write_slot_letters(letters)
    config[_EXPERT].text.vocab_file = str(letters)


def _emotion_recognition(order: Order, config: DictConfig, s3prl: Path) -> None:
    from fairseq_lowbit.interop.s3prl.downstream import write_emotion_lists

    datarc, lists = config[_EXPERT].datarc, order.out / "lists"
    for session in _SESSIONS:
        others = [other for other in _SESSIONS if other != session]
        write_emotion_lists(Path(datarc.root), session, others, lists / session)
    datarc.meta_data = str(lists)


def _speaker_identification(order: Order, config: DictConfig, s3prl: Path) -> None:
    datarc = config[_EXPERT].datarc
    own, published = Path(datarc.file_path, "iden_split.txt"), "voxceleb1/veri_test_class.txt"
    datarc.meta_data = str(own if own.is_file() else _published(s3prl, published, "sid"))


def _speaker_verification(order: Order, config: DictConfig, s3prl: Path) -> None:
    datarc, lists = config[_EXPERT].datarc, "sv_voxceleb1/dev_meta_data"
    for key, name in {
        "train_meta_data": f"{lists}/dev_speaker_ids.txt",
        "dev_meta_data": f"{lists}/dev_meta_data.txt",
        "test_meta_data": "sv_voxceleb1/voxceleb1_test_v2.txt",
    }.items():
        datarc[key] = str(_published(s3prl, name, "asv"))


def _published(s3prl: Path, name: str, task: str) -> Path:
    file = s3prl / "downstream" / name
    if not file.is_file():
        raise LowbitError(f"task {task} needs {file}, which s3prl's package lacks: {_REPOSITORY}")
    return file


_PREPARATIONS: dict[str, Callable[[Order, DictConfig, Path], None]] = {
    "pr": _phoneme_recognition,
    "asr": _speech_recognition,
    "sf": _slot_filling,
    "er": _emotion_recognition,
    "sid": _speaker_identification,
    "asv": _speaker_verification,
}
