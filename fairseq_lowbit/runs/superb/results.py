"""What came out of a task, as the file ``result.json`` of its folder."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write, check_writable

RESULT = "result.json"
BEGUN = "begun.json"
# Raised when figures of before can no longer stand beside those of now.
PROTOCOL = "SUPERB by config/superb, 1"


@dataclass(frozen=True)
class Settings:
    """What a result depends on besides the model.

    Attributes:
        task: its short name.
        model: what was judged: an absolute path or an id.
        data: the user's folder.
        learning_rate, updates: None for a task that trains nothing.
        batch_size: utterances.
        accumulated: batches to an update.
        changed: settings of ``config/superb`` that were given other values, as KEY=VALUE in order.
        lexicon: as it was asked for.
        s3prl: its version.
        inputs: a digest of the files that the configuration names, such as vocabularies and lexica.
            "" before they are written.
        protocol: see :data:`PROTOCOL`.
        checkpoint: see :func:`fairseq_lowbit.runs.superb.preparation.fingerprint`; "" where an
            earlier version has not kept it.
    """

    task: str
    model: str
    data: str
    learning_rate: float | None
    updates: int | None
    batch_size: int
    accumulated: int
    changed: tuple[str, ...]
    lexicon: str | None
    s3prl: str
    inputs: str
    protocol: str = PROTOCOL
    checkpoint: str = ""

    @property
    def differences(self) -> str:
        """From SUPERB's settings: "" for none, or for the learning rate alone, which SUPERB lets be
        chosen for each model."""
        return " ".join(c for c in self.changed if not c.startswith("optimizer.lr="))

    @property
    def training(self) -> str:
        """In words."""
        if self.updates is None:
            return "nothing is trained"
        return (
            f"learning rate {self.learning_rate:g}, {self.updates} updates of {self.accumulated} x "
            f"{self.batch_size} utterances"
        )


@dataclass(frozen=True)
class Result:
    """A finished task.

    Attributes:
        name: of the model in tables.
        settings: how it was made.
        metrics: key of a metric's column -> figure as s3prl prints it.
        storage_mb: of the model, 1e6 bytes.
        runtime: estimated, relative to float HuBERT-FastConv.
        folder: where it was read from.
    """

    name: str
    settings: Settings
    metrics: dict[str, float]
    storage_mb: float
    runtime: float
    folder: Path


def write_result(result: Result) -> None:
    """Writes ``result.json`` into its folder, at once or not at all."""
    content = asdict(result)
    del content["folder"]
    with atomic_write(result.folder / RESULT) as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def read_result(folder: Path) -> Result:
    """Raises LowbitError for a file that is damaged or of another protocol."""
    path = folder / RESULT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = read_settings(content.pop("settings"))
        result = Result(settings=settings, folder=folder, **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LowbitError(f"{path} is no result of fairseq-lowbit superb: {error}") from error
    if settings.protocol != PROTOCOL:
        raise LowbitError(
            f"{path} is of another protocol, {settings.protocol!r} where {PROTOCOL!r} is wanted: "
            "run the task again"
        )
    return result


def read_settings(content: dict[str, Any]) -> Settings:
    """Of plain data; raises TypeError or KeyError if something is missing or unknown."""
    return Settings(**{**content, "changed": tuple(content["changed"])})


def check_same_settings(folder: Path, before: Settings, now: Settings) -> None:
    """Raises LowbitError for the first that differs from those that ``folder`` was begun with."""
    if _is_changed(before, now):
        raise LowbitError(
            f"{now.model} has changed since {folder} was begun, so what is there is of another "
            "model: take another --out, or remove it"
        )
    now = replace(now, checkpoint=before.checkpoint)
    for field in fields(Settings):
        was, wanted = getattr(before, field.name), getattr(now, field.name)
        if was != wanted:
            raise LowbitError(
                f"{folder} was begun with {field.name} {was}, not {wanted}: take another --out, or "
                "remove it"
            )


def _is_changed(before: Settings, now: Settings) -> bool:
    """Whether one path holds another checkpoint now, as far as both are known."""
    fingerprints = {settings.checkpoint for settings in (before, now)} - {""}
    return before.model == now.model and len(fingerprints) > 1


def begin(folder: Path, settings: Settings) -> None:
    """Keeps the settings that a folder is begun with, which later starts have to have as well.

    Raises:
        LowbitError: see :func:`check_same_settings`; they are damaged.
    """
    path = folder / BEGUN
    if path.exists():
        try:
            before = read_settings(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise LowbitError(f"{path} is damaged ({error}): remove {folder}") from error
        check_same_settings(folder, before, settings)
    check_writable(path)
    with atomic_write(path) as file:
        json.dump(asdict(settings), file, indent=1)


def collect_results(places: Iterable[Path]) -> list[Result]:
    """The results at and below folders, by name of the model and task.

    Raises:
        LowbitError: a folder without any; two results of one model and task; results of one task
            that cannot be compared.
    """
    results = []
    for place in places:
        found = sorted(path.parent for path in Path(place).rglob(RESULT))
        if not found:
            raise LowbitError(f"{place}: there is no {RESULT} of fairseq-lowbit superb in or below")
        results += [read_result(folder) for folder in found]
    _check_comparable(results)
    return results


def _check_comparable(results: Sequence[Result]) -> None:
    first_of: dict[str, Result] = {}
    models: dict[str, Result] = {}
    known: dict[tuple[str, str], Result] = {}
    for result in results:
        settings = result.settings
        other = known.setdefault((settings.task, result.name), result)
        if other is not result:
            raise LowbitError(
                f"{other.folder} and {result.folder} are both {settings.task} of {result.name}: "
                "name one, or give the models other names"
            )
        other = models.setdefault(result.name, result)
        if other.settings.model != settings.model:
            raise LowbitError(
                f"{other.folder} and {result.folder} are of different models that are both named "
                f"{result.name}: {other.settings.model} and {settings.model}"
            )
        if _is_changed(other.settings, settings):
            raise LowbitError(
                f"{settings.model} was changed between {other.folder} and {result.folder}: run "
                "one of them again, into another folder"
            )
        _check_same_task(first_of.setdefault(settings.task, result), result)


def _check_same_task(first: Result, other: Result) -> None:
    """Their figures stand in one column."""
    one, two = first.settings, other.settings
    if one.differences != two.differences:
        found, wanted = (s.differences or "SUPERB's own settings" for s in (two, one))
    elif one.inputs != two.inputs:
        found, wanted = (f"vocabularies or lists of {s.data} ({s.inputs})" for s in (two, one))
    else:
        return
    raise LowbitError(
        f"{other.folder} and {first.folder} are of different protocols: {one.task} with {found} "
        f"and with {wanted} cannot stand in one table"
    )
