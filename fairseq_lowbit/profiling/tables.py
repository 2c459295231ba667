"""Profiles as plain data and as tables."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.table import Table

from fairseq_lowbit.precision.grammar import FLOAT_BITS
from fairseq_lowbit.precision.plan_table import fold_layers
from fairseq_lowbit.profiling.cost import Profile
from fairseq_lowbit.profiling.paper import CELLS, PaperRow

# A profile, an operator of it, or a cell of the paper, as it is printed by --json.
ProfileRow = dict[str, Any]


def profile_row(profile: Profile, reference: Profile, conversion_rate: float) -> ProfileRow:
    """One profile as plain data; ``runtime`` is relative to ``reference``."""
    return {
        "name": profile.name,
        "form": profile.form,
        "seconds": profile.seconds,
        "parameters": profile.parameters,
        "storage_bytes": profile.storage_bytes,
        "flops": profile.flops,
        "quantops": profile.quantops,
        "runtime": profile.runtime(reference, conversion_rate),
        "conversion_rate": conversion_rate,
        "peak_activation_bytes": profile.peak_activation_bytes,
    }


def profile_table(rows: Sequence[ProfileRow]) -> Table:
    table = Table(title=f"cost of {rows[0]['seconds']:g} s of audio", title_justify="left")
    table.add_column("model", overflow="fold")
    for head in (
        "parameters",
        "storage MB",
        "GFLOPs",
        "QuantOps Gbit",
        "runtime",
        "activations MB",
    ):
        _add_figures(table, head)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['storage_bytes'] / 1e6:.2f}",
            f"{row['flops'] / 1e9:.2f}",
            f"{row['quantops'] / 1e9:.2f}",
            f"{row['runtime']:.3f}",
            f"{row['peak_activation_bytes'] / 1e6:.1f}",
        )
    return table


def _add_figures(table: Table, head: str, width: int = 8) -> None:
    """Adds a column of numbers that stays whole in a narrow terminal, where names are wrapped: a
    head of several words is broken into lines, above figures of up to ``width`` digits."""
    words = head.split()
    if len(words) == 1:
        table.add_column(head, justify="right", no_wrap=True)
    else:
        table.add_column(head, justify="right", width=max(width, *map(len, words)))


def module_rows(profile: Profile, reference: Profile, conversion_rate: float) -> list[ProfileRow]:
    """Every operator as plain data; ``runtime`` is its share of the model's, see
    :func:`profile_row`."""
    return [
        {
            **asdict(cost),
            "flops": cost.flops,
            "quantops": cost.quantops,
            "runtime": replace(profile, costs=(cost,)).runtime(reference, conversion_rate),
            "activation_bytes": cost.activation_bytes,
        }
        for cost in profile.costs
    ]


def module_table(row: ProfileRow, modules: Sequence[ProfileRow]) -> Table:
    """Operators that do the same at the same cost in several layers are one row.

    Args:
        row: of :func:`profile_row`.
        modules: of :func:`module_rows`.
    """
    table = Table(title=f"{row['name']}: {row['seconds']:g} s of audio", title_justify="left")
    table.add_column("module", no_wrap=True)
    heads = ("parameters", "kB", "MFLOPs", "QuantOps Mbit", "bits", "runtime", "activations MB")
    for head in heads:
        table.add_column(head, justify="right")
    for names, found in fold_layers(modules, lambda module: module["module"], _kind):
        bits, activation_bytes = found[0]["bits"], found[0]["activation_bytes"]
        table.add_row(
            names,
            f"{_total(found, 'parameters'):,}",
            f"{_total(found, 'storage_bytes') / 1e3:,.1f}",
            f"{_total(found, 'flops') / 1e6:,.1f}",
            f"{_total(found, 'quantops') / 1e6:,.1f}",
            "float" if bits == FLOAT_BITS else str(bits),
            f"{_total(found, 'runtime'):.4f}",
            f"{activation_bytes / 1e6:.1f}",
        )
    return table


def _total(modules: Sequence[ProfileRow], key: str) -> float:
    return sum(module[key] for module in modules)


def _kind(module: ProfileRow) -> tuple[int, int, int]:
    return module["bits"], module["operations"], module["activation_bytes"]


def measured_table(rows: Sequence[ProfileRow]) -> Table:
    """Measured figures beside the estimates for the same audio.

    Args:
        rows: with ``name`` and ``measured``, as ``profile --measure --json`` prints them.
    """
    table = Table(title="measured beside estimated", title_justify="left")
    _add_figures(table, "audio s", 5)
    _add_figures(table, "threads")
    table.add_column("model", overflow="fold")
    table.add_column("time ms", justify="right", overflow="fold")
    for head in ("real-time factor", "measured runtime", "estimated", "peak memory MB"):
        _add_figures(table, head)
    for (seconds, threads), found in _by_condition(rows).items():
        for name, entry in found:
            table.add_row(f"{seconds:g}", str(threads), name, *_measured_cells(entry))
        table.add_section()
    return table


def _by_condition(
    rows: Sequence[ProfileRow],
) -> dict[tuple[float, int], list[tuple[str, ProfileRow]]]:
    found: dict[tuple[float, int], list[tuple[str, ProfileRow]]] = {}
    for row in rows:
        for entry in row["measured"]:
            key = entry["seconds"], entry["threads"]
            found.setdefault(key, []).append((row["name"], entry))
    return found


def _measured_cells(entry: ProfileRow) -> tuple[str, ...]:
    time, low, high = (_milliseconds(entry[key]) for key in ("time_s", "time_min_s", "time_max_s"))
    runtime, peak = entry["measured_runtime"], entry["peak_resident_bytes"]
    return (
        f"{time} ({low} to {high})",
        f"{entry['real_time_factor']:.3f}",
        "-" if runtime is None else f"{runtime:.3f}",
        f"{entry['runtime']:.3f}",
        "-" if peak is None else f"{peak / 1e6:,.0f}",
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds > 0.1 else f"{1e3 * seconds:.1f}"


def paper_rows(published: PaperRow, row: ProfileRow) -> list[ProfileRow]:
    """The published cells of a row of the paper, each with our value, as plain data.

    Args:
        row: of :func:`profile_row`; what it cannot count is None in the result.
    """
    counted = {
        "storage_mb": row["storage_bytes"] / 1e6,
        "gflops": row["flops"] / 1e9,
        "gquantops": row["quantops"] / 1e9,
        "runtime": row["runtime"],
    }
    return [
        {"name": published.name, "cell": key, "paper": cell, "ours": counted.get(key)}
        for key, cell in published.cells.items()
    ]


def paper_table(cells: Sequence[ProfileRow]) -> Table:
    """The cells of the paper, each with our value and the difference of both as they are printed.

    Args:
        cells: of :func:`paper_rows`.
    """
    table = Table(title="published and counted, 10 s of audio", title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("cell", no_wrap=True)
    for head in ("paper", "ours", "difference"):
        table.add_column(head, justify="right")
    for cell in cells:
        paper, ours, difference = round(cell["paper"], 2), "-", "-"
        if cell["ours"] is not None:
            ours, gap = f"{cell['ours']:.2f}", round(cell["ours"], 2) - paper
            difference = f"{gap:+.2f} ({gap / paper:+.1%})"
        table.add_row(cell["name"], CELLS[cell["cell"]], f"{paper:.2f}", ours, difference)
    return table
