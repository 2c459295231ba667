"""Profiles as tables, JSON and CSV."""

import csv
from collections.abc import Sequence
from typing import Any, TextIO

from rich.table import Table

from fairseq_lowbit.evaluation.paper import PaperRow
from fairseq_lowbit.evaluation.tables import fold_layers
from fairseq_lowbit.precision.grammar import FLOAT_BITS
from fairseq_lowbit.profiling.cost import ACTIVATION_BYTES, Cost, Profile


def profile_row(profile: Profile, reference: Profile, conversion_rate: float) -> dict[str, Any]:
    """One profile as plain data; ``runtime`` is relative to ``reference``."""
    return {
        "name": profile.name,
        "seconds": profile.seconds,
        "parameters": profile.parameters,
        "storage_bytes": profile.storage_bytes,
        "flops": profile.flops,
        "quantops": profile.quantops,
        "runtime": profile.runtime(reference, conversion_rate),
        "conversion_rate": conversion_rate,
        "peak_activation_bytes": profile.peak_activation_bytes,
    }


def profile_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"cost of {rows[0]['seconds']:g} s of audio", title_justify="left")
    table.add_column("model", no_wrap=True)
    heads = ("parameters", "storage MB", "GFLOPs", "QuantOps Gbit", "runtime", "activations MB")
    for head in heads:
        table.add_column(head, justify="right")
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


def module_table(profile: Profile) -> Table:
    """Operators that do the same at the same cost in several layers are one row."""
    table = Table(title=f"{profile.name}: {profile.seconds:g} s of audio", title_justify="left")
    table.add_column("module", no_wrap=True)
    for head in ("parameters", "kB", "MFLOPs", "QuantOps Mbit", "bits", "activations MB"):
        table.add_column(head, justify="right")
    for names, costs in fold_layers(profile.costs, lambda cost: cost.module, _kind):
        first = costs[0]
        table.add_row(
            names,
            f"{sum(c.parameters for c in costs):,}",
            f"{sum(c.storage_bytes for c in costs) / 1e3:,.1f}",
            f"{sum(c.flops for c in costs) / 1e6:,.1f}",
            f"{sum(c.quantops for c in costs) / 1e6:,.1f}",
            "float" if first.bits == FLOAT_BITS else str(first.bits),
            f"{ACTIVATION_BYTES * first.values / 1e6:.1f}",
        )
    return table


def _kind(cost: Cost) -> tuple[int, int]:
    return cost.bits, cost.operations


def write_csv(rows: Sequence[dict[str, Any]], file: TextIO) -> None:
    """Every field of every row."""
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


def paper_table(rows: Sequence[tuple[PaperRow, dict[str, Any]]]) -> Table:
    """The known cells of the paper, each with ours and the difference."""
    table = Table(title="published and counted, 10 s of audio", title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("cell", no_wrap=True)
    for head in ("paper", "ours", "difference"):
        table.add_column(head, justify="right")
    for published, row in rows:
        ours = {
            "storage MB": (published.storage_mb, row["storage_bytes"] / 1e6),
            "GFLOPs": (published.gflops, row["flops"] / 1e9),
            "QuantOps Gbit": (published.gquantops, row["quantops"] / 1e9),
            "runtime": (published.runtime, row["runtime"]),
        }
        for cell, (theirs, own) in ours.items():
            if theirs is not None:
                difference = f"{own - theirs:+.2f} ({own / theirs - 1:+.1%})"
                table.add_row(published.name, cell, f"{theirs:.2f}", f"{own:.2f}", difference)
        table.add_section()
    return table
