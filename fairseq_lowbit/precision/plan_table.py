"""The plan as a table for people."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby
from typing import TypeVar

from rich.table import Table

from fairseq_lowbit.precision.grammar import FLOAT_BITS
from fairseq_lowbit.precision.plan import Plan, PlanEntry
from fairseq_lowbit.precision.rules import with_form
from fairseq_lowbit.precision.storage import FLOAT_BYTES

PLAN_HEADS = ("module", "decided by", "method", "weight", "activation", "parameters", "kB")
Item = TypeVar("Item")


def plan_table(plan: Plan) -> Table:
    """The plan, see :func:`plan_rows`."""
    name = with_form(plan.precision.name, plan.form)
    table = Table(title=f"precision {name}", title_justify="left")
    module, *texts, weight, activation, parameters, size = PLAN_HEADS
    table.add_column(module, no_wrap=True)
    for column in texts:
        table.add_column(column, overflow="fold")
    for column in (weight, activation, parameters, size):
        table.add_column(column, justify="right")
    *rows, total = plan_rows(plan)
    for row in rows:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total)
    return table


def plan_rows(plan: Plan) -> list[tuple[str, ...]]:
    """What ``PLAN_HEADS`` names, the total last; rows that differ in their layer number only are
    one (``layers.{0-11}.fc1``)."""
    rows = [
        (
            names,
            entries[0].rule,
            _method(entries[0]),
            "-" if entries[0].kind == "operand" else _bits(entries[0].weight_bits),
            _activation(entries[0]),
            f"{sum(e.parameters for e in entries):,}",
            f"{sum(e.bytes for e in entries) / 1e3:,.1f}",
        )
        for names, entries in fold_layers(plan.entries, lambda e: e.module, _decision)
    ]
    other, other_kb = plan.other_parameters, plan.other_parameters * FLOAT_BYTES / 1e3
    sums = (f"{plan.parameters:,}", f"{plan.bytes / 1e3:,.1f}")
    return [
        *rows,
        ("(norms, embeddings)", "", "none", "float", "-", f"{other:,}", f"{other_kb:,.1f}"),
        ("total stored (float parts at 16 bits)", "", "", "", "", *sums),
    ]


def _method(entry: PlanEntry) -> str:
    if entry.granularity == "per_group":
        return f"{entry.method} per {entry.group_size} weights"
    return f"{entry.method} per channel" if entry.granularity == "per_channel" else entry.method


def _activation(entry: PlanEntry) -> str:
    is_scaled = entry.input is not None and entry.input.scale == "learned"
    bits = _bits(entry.activation_bits)
    return f"{bits} per frame" if is_scaled and entry.input.is_per_frame else bits


def _bits(bits: int) -> str:
    return "float" if bits == FLOAT_BITS else str(bits)


def fold_layers(
    items: Iterable[Item], name: Callable[[Item], str], alike: Callable[[Item], object]
) -> list[tuple[str, list[Item]]]:
    """Items that differ in their layer number only, together, in the order of the first.

    Args:
        name: of an item's module.
        alike: hashable, equal for items that may share a row.

    Returns:
        for each row its name, with the layer numbers in braces, and its items.
    """
    groups: dict[tuple, list[Item]] = {}
    for item in items:
        pattern = re.sub(r"\.\d+\.", ".{}.", name(item), count=1)
        groups.setdefault((pattern, alike(item)), []).append(item)
    return [(_range_name([name(item) for item in members]), members) for members in groups.values()]


def _decision(entry: PlanEntry) -> PlanEntry:
    """What two entries have to share to be told in one row."""
    return replace(entry, module="", parameters=0, bytes=0, input_owner="")


def _range_name(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    numbers = sorted(int(re.search(r"\.(\d+)\.", name)[1]) for name in names)
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    spans = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    return re.sub(r"\.\d+\.", f".{{{spans}}}.", names[0], count=1)
