"""Models as rows of a table: for the terminal, for a README and for a spreadsheet."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.compare import Comparison
from fairseq_lowbit.runs.collection import FIELDS, ModelRecord, precision_text, unnamed_overrides
from fairseq_lowbit.runs.columns import (
    PAPER_WER,
    QUALITIES,
    STORAGE,
    UNKNOWN,
    VALIDATION_LOSS,
    Column,
)
from fairseq_lowbit.runs.pairs import Pair
from fairseq_lowbit.runs.run import form_of

_RUN_COLUMNS = (VALIDATION_LOSS, STORAGE, *QUALITIES)
_LEFT = ("run", "precision", "overrides", "status", "other way")


def comparison_table(comparison: Comparison) -> Table:
    """A row per model, with the figures of layers 1..L side by side in a cell."""
    layers = len(comparison.rows[-1].agreement.cosine) if len(comparison.rows) > 1 else 0
    table = Table(title=f"held-out audio, layers 1..{layers} from left", title_justify="left")
    table.add_column("model", no_wrap=True)
    records = [row.figures() for row in comparison.rows]
    columns = [c for c in (STORAGE, *QUALITIES) if any(c.value(r) is not None for r in records)]
    for column in columns:
        table.add_column(column.head, justify="right", no_wrap=True)
    for row, record in zip(comparison.rows, records, strict=True):
        table.add_row(row.name, *(column.layers_text(record) for column in columns))
    return table


def run_columns(with_paper: bool) -> tuple[Column, ...]:
    """The figures of a run in the order of the table."""
    return (*_RUN_COLUMNS, PAPER_WER) if with_paper else _RUN_COLUMNS


def legend(columns: Sequence[Column]) -> str:
    """A line for each column, to stand below a table."""
    return "\n".join(f"{column.title}: {column.note}." for column in columns)


def _cells(record: ModelRecord, columns: Sequence[Column]) -> dict[str, str]:
    """By the heads of the table."""
    planned = record["planned"]
    return {
        "run": record["name"],
        "precision": precision_text(record) or UNKNOWN,
        "updates": UNKNOWN if planned is None else f"{record['updates'] or 0}/{planned}",
        **{column.head: column.text(record) for column in columns},
        "status": record["status"] or "",
    }


def run_table(groups: Sequence[Sequence[ModelRecord]], columns: Sequence[Column]) -> Table:
    """For a terminal; overrides and messages stand below a run's name."""
    table = Table()
    for head in ("run", "precision", "updates", *(column.head for column in columns), "status"):
        justify = "left" if head in _LEFT else "right"
        # A head of several words stands in lines, so that the figures below it stay narrow.
        table.add_column(
            head.replace(" ", "\n"), justify=justify, overflow="fold", no_wrap=head != "run"
        )
    for group in groups:
        for record in group:
            _, *cells = _cells(record, columns).values()
            table.add_row(_name_cell(record), *cells)
        table.add_section()
    return table


def _name_cell(record: ModelRecord) -> Text:
    cell = Text(record["name"])
    overrides = unnamed_overrides(record)
    if overrides:
        cell.append(f"\n  {' '.join(overrides)}", style="dim")
    if record["message"]:
        cell.append(f"\n  {record['message']}", style="red")
    return cell


def markdown(groups: Sequence[Sequence[ModelRecord]], columns: Sequence[Column]) -> str:
    """A table for a README; overrides and messages have columns of their own."""
    rows = []
    for record in (record for group in groups for record in group):
        cells = _cells(record, columns)
        status = ": ".join(filter(None, (cells.pop("status"), record["message"])))
        rows.append({**cells, "overrides": _joined(record["overrides"]), "status": status})
    return _markdown(rows)


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows by the same heads, which the first one gives."""
    lines = [[*rows[0]], ["---" if head in _LEFT else "--:" for head in rows[0]]]
    for row in rows:
        lines.append([cell.replace("|", "\\|").replace("\n", " ") for cell in row.values()])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def pair_table(pairs: Sequence[Pair]) -> Table:
    """For a terminal, one pair or more."""
    table = Table(title="distillation in one step, and another way", title_justify="left")
    rows = [pair.cells() for pair in pairs]
    for head in rows[0]:
        justify = "left" if head in _LEFT else "right"
        table.add_column(head.replace(" ", "\n"), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table


def pair_markdown(pairs: Sequence[Pair]) -> str:
    """For a README, one pair or more."""
    return _markdown([pair.cells() for pair in pairs])


def write_csv(groups: Sequence[Sequence[ModelRecord]], file: TextIO) -> None:
    """Every field of every record; several values with spaces between."""
    writer = csv.DictWriter(file, FIELDS)
    writer.writeheader()
    for record in (record for group in groups for record in group):
        cells = {key: _joined(v) if isinstance(v, tuple) else v for key, v in record.items()}
        writer.writerow(cells)


def _joined(values: Sequence[str | float] | None) -> str:
    return " ".join(v if isinstance(v, str) else f"{v:.6g}" for v in values or ())


def read_csv(path: Path) -> list[ModelRecord]:
    """The records that :func:`write_csv` wrote.

    Raises:
        LowbitError: it is another kind of file.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, heads = list(reader), reader.fieldnames or ()
        missing = [field for field in FIELDS if field not in (*heads, "form")]
        if missing:
            raise ValueError(f"there is no column {missing[0]}")
        return [_read_record(row) for row in rows]
    except (OSError, csv.Error, TypeError, ValueError) as error:
        raise LowbitError(f"{path} is not a table of sweep-table --csv: {error}") from error


def _read_record(row: Mapping[str, str]) -> ModelRecord:
    record = {field: _read_cell(field, row.get(field, "")) for field in FIELDS}
    if "form" not in row and record["precision"]:  # written before version 0.5
        record["form"] = form_of(record["precision"], record["rules"], None)
    return record


def _read_cell(field: str, cell: str) -> Any:
    """Empty cells are None."""
    return _KINDS.get(field, float)(cell) if cell else None


_KINDS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("name", "status", "message", "precision", "form", "loss"), str),
    **dict.fromkeys(
        (field for field in FIELDS if field.endswith("_layers")),
        lambda cell: tuple(map(float, cell.split())),
    ),
    **dict.fromkeys(("rules", "updates", "planned"), int),
    **dict.fromkeys(("teacher", "data", "folder"), Path),
    "overrides": lambda cell: tuple(cell.split()),
}
