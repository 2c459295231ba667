"""Many runs in one table: for the terminal, for a README and for a spreadsheet."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.runs.collection import FIELDS, Record
from fairseq_lowbit.runs.folder import folder_name

_TITLES = ("run", "precision", "updates", "valid", "MB", "masked", "cosine", "SNR dB", "probe %")
_TITLES += ("paper", "status")
_LEFT = ("run", "precision", "overrides", "status")
# Below the table: what its heads are short for.
LEGEND = (
    "valid: best validation loss. masked: labels of masked frames, % right. cosine (centred) and "
    "SNR: last layer\nagainst the teacher's. probe: words from the last layer, % right on unseen "
    "voices."
)


def _cells(record: Record) -> dict[str, str]:
    """What ``_TITLES`` names, as text."""

    def text(key: str, form: str) -> str:
        return "-" if record[key] is None else format(record[key], form)

    precision = record["precision"] or "-"
    if record["rules"]:
        precision += f" +{record['rules']} rule{'s' if record['rules'] > 1 else ''}"
    if record["loss"] not in (None, "distillation"):
        precision += f", {record['loss']}"
    probe, spread = ((record[k] or 0) * 100 for k in ("word_probe", "word_probe_std"))
    planned = record["planned"]
    cells = (
        record["name"],
        precision,
        "-" if planned is None else f"{record['updates'] or 0}/{planned}",
        text("best_loss", ".4f"),
        text("storage_mb", ".2f"),
        text("masked_accuracy", ".1%"),
        text("cosine", ".3f"),
        text("snr_db", ".1f"),
        "-" if record["word_probe"] is None else f"{probe:.1f}±{spread:.1f}",
        text("paper_wer", ".2f"),
        record["status"] or "",
    )
    return dict(zip(_TITLES, cells, strict=True))


def _shown(with_paper: bool) -> list[str]:
    return [title for title in _TITLES if with_paper or title != "paper"]


def rich_table(groups: Sequence[Sequence[Record]], with_paper: bool) -> Table:
    """For a terminal; overrides and messages stand below a run's name."""
    table = Table()
    for title in _shown(with_paper):
        justify = "left" if title in _LEFT else "right"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=title != "run")
    for group in groups:
        for record in group:
            cells = _cells(record)
            table.add_row(_name_cell(record), *(cells[t] for t in _shown(with_paper) if t != "run"))
        table.add_section()
    return table


def _name_cell(record: Record) -> Text:
    cell = Text(record["name"])
    overrides = untold_overrides(record)
    if overrides:
        cell.append(f"\n  {' '.join(overrides)}", style="dim")
    if record["message"]:
        cell.append(f"\n  {record['message']}", style="red")
    return cell


def untold_overrides(record: Record) -> list[str]:
    """Those that its name does not tell; a job of a sweep has most of them in its name."""
    return [t for t in record["overrides"] or () if folder_name([t]) not in record["name"]]


def write_csv(groups: Sequence[Sequence[Record]], file: TextIO) -> None:
    """Every field of every record, layers as numbers between spaces."""
    writer = csv.DictWriter(file, FIELDS)
    writer.writeheader()
    for record in (record for group in groups for record in group):
        writer.writerow(record | {"overrides": _joined(record)})


def read_csv(path: Path) -> list[Record]:
    """The records that :func:`write_csv` wrote.

    Raises:
        LowbitError: it is another kind of file.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, heads = list(reader), reader.fieldnames or ()
        missing = [field for field in FIELDS if field not in heads]
        if missing:
            raise ValueError(f"there is no column {missing[0]}")
        return [{field: _READ.get(field, _number)(row[field]) for field in FIELDS} for row in rows]
    except (OSError, csv.Error, TypeError, ValueError) as error:
        raise LowbitError(f"{path} is not a table of sweep-table --csv: {error}") from error


def _text(value: str) -> str | None:
    return value or None


def _path(value: str) -> Path | None:
    return Path(value) if value else None


def _number(value: str) -> float | None:
    return float(value) if value else None


def _count(value: str) -> int | None:
    return int(value) if value else None


_READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("status", "message", "precision", "loss"), _text),
    **dict.fromkeys((field for field in FIELDS if field.endswith("_layers")), _text),
    **dict.fromkeys(("rules", "updates", "planned"), _count),
    **dict.fromkeys(("teacher", "data", "folder"), _path),
    "name": str,
    "overrides": lambda value: tuple(value.split()),
}


def markdown(groups: Sequence[Sequence[Record]], with_paper: bool) -> str:
    """A table for a README; overrides and messages have columns of their own."""
    titles = [*_shown(with_paper)[:-1], "overrides", "status"]
    lines = [titles, ["---" if t in _LEFT else "--:" for t in titles]]
    for record in (record for group in groups for record in group):
        cells = _cells(record) | {"overrides": _joined(record)}
        if record["message"]:
            cells["status"] += f": {record['message']}"
        lines.append([cells[title].replace("|", "\\|").replace("\n", " ") for title in titles])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _joined(record: Record) -> str:
    return " ".join(record["overrides"] or ())
