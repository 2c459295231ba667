"""Finished runs as a table, for the terminal and for docs/results.md."""

import statistics
from collections.abc import Iterator, Sequence

from rich.table import Table

from accuracy.results import Plan, Results
from accuracy.rows import PEERS, Row
from accuracy.training import REPORT

_REFERENCE = "ours_"  # rows that peers are compared with
_LEFT = ("bits", "method")


def cells(results: Results, plan: Plan) -> list[dict[str, str]]:
    """A row of the table for every row of the plan, widest first, by the heads of the columns."""
    rows = sorted(plan.rows, key=lambda row: -row.weight_bits)
    return [_cells(results, plan, row) for row in rows]


def _cells(results: Results, plan: Plan, row: Row) -> dict[str, str]:
    line = {"bits": row.bits, "method": row.title}
    for teacher in (teacher.name for teacher in plan.teachers):
        runs = results.at_best_rate(plan, teacher, row.name)
        calibrated = [results.outcomes[run].calibrated.get(REPORT) for run in runs]
        line[f"{teacher}: calibrated"] = _spread(calibrated)
        line[f"{teacher}: trained"] = _spread(_trained(results, plan, teacher, row)) or "diverged"
        line[f"{teacher}: rate"] = f"{runs[0].rate:g}"
    return line


def _trained(results: Results, plan: Plan, teacher: str, row: Row) -> list[float | None]:
    """The reported ratio of every seed; None for one that diverged."""
    runs = results.at_best_rate(plan, teacher, row.name)
    return [results.outcomes[run].trained.get(REPORT) for run in runs]


def _spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation; empty if a value is missing."""
    if None in values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def differences(results: Results, plan: Plan) -> Iterator[str]:
    """A line for every teacher and width: how far ours are ahead of the best other library. A seed
    has the same audio for both, so that differences are taken seed by seed."""
    for teacher in (teacher.name for teacher in plan.teachers):
        trained = {row: _trained(results, plan, teacher, row) for row in plan.rows}
        finished = {row: values for row, values in trained.items() if None not in values}
        for own in (row for row in finished if row.name.startswith(_REFERENCE)):
            peers = [row for row in finished if row.library in PEERS and row.bits == own.bits]
            if peers:
                best = max(peers, key=lambda row: statistics.mean(finished[row]))
                ahead = [a - b for a, b in zip(finished[own], finished[best])]
                names = f"{own.title} against {best.title}"
                yield f"{teacher}, {own.bits}: {names} {_spread(ahead)} dB"


def as_table(lines: Sequence[dict[str, str]]) -> Table:
    """For a terminal."""
    table = Table(title="SNR of the last layer in dB, held-out audio", title_justify="left")
    for head in lines[0]:
        table.add_column(head, justify="left" if head in _LEFT else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line.values())
    return table


def as_markdown(lines: Sequence[dict[str, str]]) -> str:
    """For docs/results.md."""
    heads = list(lines[0])
    rule = ["---" if head in _LEFT else "--:" for head in heads]
    return "".join(
        f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *(line.values() for line in lines))
    )
