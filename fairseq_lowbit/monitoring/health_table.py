"""The health of a model as a table for the terminal."""

from typing import Any

from rich.table import Table

from fairseq_lowbit.monitoring.health import QuantizerHealth


def health_table(record: dict[str, Any]) -> Table:
    """One row per encoder layer of a health record (a line of ``health.jsonl``)."""
    table = Table(title=f"health at update {record['update']}", title_justify="left")
    for column in (
        "layer",
        "centred std",
        "quantizers",
        "SQNR dB (mean)",
        "clipped (max)",
        "levels used (min)",
    ):
        table.add_column(column, justify="right")
    entries = [QuantizerHealth(**values) for values in record["quantizers"]]
    rows: list[tuple[int | None, str]] = [
        (layer, f"{value:.3f}") for layer, value in enumerate(record["centered_std"])
    ]
    if any(entry.layer is None for entry in entries):
        rows.append((None, "-"))
    for layer, std in rows:
        members = [entry for entry in entries if entry.layer == layer]
        table.add_row("other" if layer is None else str(layer + 1), std, *_health_cells(members))
    return table


def _health_cells(members: list[QuantizerHealth]) -> tuple[str, ...]:
    if not members:
        return ("0", "-", "-", "-")
    return (
        str(len(members)),
        f"{sum(m.sqnr_db for m in members) / len(members):.1f}",
        f"{max(m.clipped for m in members):.1%}",
        f"{min(m.levels_used for m in members):.0%}",
    )
