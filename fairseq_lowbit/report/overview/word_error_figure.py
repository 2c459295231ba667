"""The figure of a word error table: what the errors of each system are, and how sure they are."""

from pathlib import Path

from fairseq_lowbit.evaluation.recognition import Recognition
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.report.style import (
    INK,
    PALETTE,
    add_legend,
    as_bytes,
    new_figure,
    shortened,
    styled,
)


@styled()
def draw_word_errors(recognition: Recognition, path: Path) -> None:
    """Writes the figure, PNG or PDF by its suffix."""
    rows = recognition.rows
    figure = new_figure(7, 1.2 + 0.35 * len(rows))
    axes = figure.subplots()
    places, base = range(len(rows)), [0.0] * len(rows)
    bars = []
    for kind, color in zip(("substitutions", "deletions", "insertions"), PALETTE, strict=False):
        shares = [100 * getattr(row, kind) / recognition.words for row in rows]
        bars.append(axes.barh(places, shares, left=base, height=0.6, color=color, label=kind))
        base = [left + share for left, share in zip(base, shares, strict=True)]
    rates = [row.wer for row in rows]
    bounds = [[100 * (r.value - r.low) for r in rates], [100 * (r.high - r.value) for r in rates]]
    axes.errorbar(base, places, xerr=bounds, fmt="none", ecolor=INK, capsize=3)
    axes.set_yticks(places, [shortened(row.name) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(
        title=f"{len(recognition.references)} sentences, {recognition.words} words",
        xlabel=f"word error rate, % ({rates[0].level:.0%} interval)",
    )
    add_legend(figure, bars)
    with atomic_write(path, "wb") as file:
        file.write(as_bytes(figure, path.suffix.lstrip(".")))
