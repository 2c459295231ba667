"""The paper's table: what models cost and how well they do in SUPERB, beside published rows."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TextIO

from rich.table import Table

from fairseq_lowbit.profiling.paper import SOURCE, SUPERB_FIGURES, SUPERB_SOURCE, TABLE
from fairseq_lowbit.runs.columns import RUNTIME, STORAGE, UNKNOWN, Column
from fairseq_lowbit.runs.superb.results import Result, Settings
from fairseq_lowbit.runs.superb.tasks import TASKS

_COSTS = (
    STORAGE,
    replace(
        RUNTIME, note="an estimate: FLOPs and QuantOps relative to those of float HuBERT-FastConv"
    ),
)
_MARK = "*"


@dataclass(frozen=True)
class Row:
    """A model.

    Attributes:
        figures: by key of a column, in the units of the columns.
        marked: keys of the figures that were not made with SUPERB's settings.
    """

    name: str
    figures: Mapping[str, float]
    marked: frozenset[str] = frozenset()

    def cell(self, column: Column) -> str:
        """The figure as text, marked."""
        if column.key not in self.figures:
            return UNKNOWN
        mark = _MARK if column.key in self.marked else ""
        return f"{self.figures[column.key]:.{column.digits}f}{mark}"


@dataclass(frozen=True)
class SuperbTable:
    """Rows of ours and published ones, under the same columns.

    Attributes:
        notes: sentences that belong below.
    """

    columns: Sequence[Column]
    own: Sequence[Row]
    published: Sequence[Row]
    notes: Sequence[str]


def superb_table(results: Sequence[Result]) -> SuperbTable:
    """The table of results that may stand in one; its columns are the tasks that they are of."""
    known = {key for result in results for key in result.metrics}
    metrics = [metric.column for task in TASKS.values() for metric in task.metrics]
    shown = [column for column in metrics if column.key in known]
    columns = (*_COSTS, *shown)
    published = [row for row in _published() if any(c.key in row.figures for c in shown)]
    notes = [f"{column.head}: {column.note}." for column in columns]
    return SuperbTable(columns, _own(results, columns), published, [*notes, *_notes(results)])


def _own(results: Sequence[Result], columns: Iterable[Column]) -> list[Row]:
    factors = {column.key: column.factor for column in columns}
    rows: dict[str, Row] = {}
    for result in sorted(results, key=lambda result: -result.storage_mb):
        costs = {"storage_mb": result.storage_mb, "runtime": result.runtime}
        row = rows.setdefault(result.name, Row(result.name, costs))
        found = {key: factors[key] * value for key, value in result.metrics.items()}
        marked = frozenset(found) if result.settings.differences else frozenset()
        rows[result.name] = Row(row.name, row.figures | found, row.marked | marked)
    return list(rows.values())


def _published() -> list[Row]:
    rows = {row.name: dict(row.cells) for row in TABLE}
    for cells in rows.values():
        if "wer" in cells:
            cells["asr_wer"] = cells["wer"]
    for name, figures in SUPERB_FIGURES.items():
        rows[name] = {**figures, **rows.get(name, {})}
    return [Row(name, figures) for name, figures in rows.items()]


def _notes(results: Sequence[Result]) -> list[str]:
    """How the figures were made, and where the published ones are from."""
    models_of: dict[str, list[str]] = {}
    for result in results:
        models_of.setdefault(_made(result.settings), []).append(result.name)
    notes = [f"{made} ({', '.join(names)})." for made, names in models_of.items()]
    if any(result.settings.differences for result in results):
        notes.append(
            f"{_MARK} made with other settings than SUPERB's: published rows are no comparison."
        )
    return [*notes, f"Published: {SOURCE}; {SUPERB_SOURCE}."]


def _made(settings: Settings) -> str:
    if settings.updates is None:
        return f"{settings.task}: s3prl {settings.s3prl}, nothing is trained"
    return (
        f"{settings.task}: s3prl {settings.s3prl}, learning rate {settings.learning_rate:g}, "
        f"{settings.updates} updates of {settings.accumulated} x {settings.batch_size} utterances"
    )


def text(table: SuperbTable) -> Table:
    """For a terminal."""
    drawn = Table()
    drawn.add_column("model", overflow="fold")
    for column in table.columns:
        drawn.add_column(column.head.replace(" ", "\n"), justify="right", no_wrap=True)
    for rows in (table.own, table.published):
        for row in rows:
            drawn.add_row(row.name, *map(row.cell, table.columns))
        drawn.add_section()
    return drawn


def markdown(table: SuperbTable) -> str:
    """For a README, with the notes below."""
    lines = [["model", *(column.head for column in table.columns)]]
    lines.append(["---", *("--:" for _ in table.columns)])
    for row in (*table.own, *table.published):
        name = row.name.replace("|", "\\|")
        lines.append([name, *map(row.cell, table.columns)])
    drawn = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return "\n".join([drawn, *(f"- {note}" for note in table.notes), ""])


def write_csv(table: SuperbTable, file: TextIO) -> None:
    """Unmarked figures in full; the last column names those that are marked."""
    writer = csv.writer(file)
    writer.writerow(["model", "published", *(c.head for c in table.columns), "other settings"])
    for rows, published in ((table.own, "no"), (table.published, "yes")):
        for row in rows:
            cells = [row.figures.get(column.key, "") for column in table.columns]
            marked = [column.head for column in table.columns if column.key in row.marked]
            writer.writerow([row.name, published, *cells, " ".join(marked)])
