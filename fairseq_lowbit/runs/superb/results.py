"""What came out of a task, as the file ``result.json`` of its folder."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
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
    """What a result depends on besides the model. Results of a task can be compared if their
    batches and updates are the same: SUPERB lets the learning rate be chosen for each model.

    Attributes:
        task: its short name.
        model: what was judged: an absolute path or an id.
        data: the user's folder.
        learning_rate, updates: None for a task that trains nothing.
        batch_size: utterances.
        accumulated: batches to an update.
        changed: settings of ``config/superb`` that were given other values, as KEY=VALUE.
        s3prl: its version.
        protocol: see :data:`PROTOCOL`.
    """

    task: str
    model: str
    data: str
    learning_rate: float | None
    updates: int | None
    batch_size: int
    accumulated: int
    changed: tuple[str, ...]
    s3prl: str
    protocol: str = PROTOCOL

    @property
    def comparable(self) -> dict[str, Any]:
        """What has to be equal for figures to stand in one column."""
        length = {"updates": self.updates, "batch_size": self.batch_size * self.accumulated}
        others = [
            change for change in self.changed if not change.startswith(("optimizer.lr=", "runner."))
        ]
        return {"protocol": self.protocol, **length, "changed": tuple(sorted(others))}


@dataclass(frozen=True)
class Result:
    """A finished task.

    Attributes:
        name: of the model in tables.
        settings: how it was made.
        metrics: key of a metric's column -> figure as s3prl prints it.
        storage_mb: of the model, 1e6 bytes.
        runtime: estimated, relative to float HuBERT-FastConv.
        seconds: that the task took, without what an interrupted start took.
        folder: where it was read from.
    """

    name: str
    settings: Settings
    metrics: dict[str, float]
    storage_mb: float
    runtime: float
    seconds: float
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


def check_same_settings(folder: Path, settings: Settings) -> None:
    """Keeps the settings that a folder was begun with, which later starts have to have as well.

    Raises:
        LowbitError: the first that differs.
    """
    path = folder / BEGUN
    if path.exists():
        try:
            before = read_settings(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise LowbitError(f"{path} is damaged ({error}): remove {folder}") from error
        for field in fields(Settings):
            was, wanted = getattr(before, field.name), getattr(settings, field.name)
            if was != wanted:
                raise LowbitError(
                    f"{folder} was begun with {field.name} {was}, not {wanted}: take another "
                    "--out, or remove it"
                )
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
    known: dict[tuple[str, str], Result] = {}
    for result in results:
        task = result.settings.task
        other = known.setdefault((task, result.name), result)
        if other is not result:
            raise LowbitError(
                f"{other.folder} and {result.folder} are both {task} of {result.name}: name "
                "one, or give the models other names"
            )
        first = first_of.setdefault(task, result)
        for key, value in first.settings.comparable.items():
            found = result.settings.comparable[key]
            if found != value:
                raise LowbitError(
                    f"{result.folder} and {first.folder} are of different protocols: {task} with "
                    f"{key} {found} and with {value} cannot stand in one table"
                )
