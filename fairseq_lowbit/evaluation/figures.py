"""The figure of a comparison."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from fairseq_lowbit.evaluation.compare import Comparison
from fairseq_lowbit.evaluation.quality import Quality


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Agreement by layer, probe by layer, masked accuracy against storage; PNG or PDF by suffix."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    colors = {row.name: f"C{index}" for index, row in enumerate(comparison.rows)}
    students = [row for row in comparison.rows if row.agreement is not None]
    for row in students:
        layers = range(1, len(row.agreement.cosine) + 1)
        axes[0].plot(layers, row.agreement.cosine, "o-", color=colors[row.name], label=row.name)
        axes[1].plot(layers, row.agreement.snr_db, "o-", color=colors[row.name], label=row.name)
    axes[0].set(title="centred cosine to the teacher", xlabel="layer", ylim=(None, 1.0))
    axes[1].set(title="SNR against the teacher", xlabel="layer", ylabel="dB")
    _draw_probe(axes[2], comparison, colors)
    _draw_storage(axes[3], comparison.rows, colors)
    for axis in axes[:3]:
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    for axis in axes:
        axis.grid(alpha=0.3)
    handles = [plt.Line2D([], [], color=c, marker="o", label=n) for n, c in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_probe(axis: Axes, comparison: Comparison, colors: dict[str, str]) -> None:
    axis.set(title="word probe on unseen voices", xlabel="layer", ylabel="% correct")
    for row in comparison.rows:
        if row.probe is None:
            axis.text(0.5, 0.5, "no words in this data", ha="center", transform=axis.transAxes)
            return
        layers = range(1, len(row.probe.mean) + 1)
        mean, std = ([100 * v for v in values] for values in (row.probe.mean, row.probe.std))
        axis.errorbar(layers, mean, std, fmt="o-", capsize=3, color=colors[row.name])
    untrained = [100 * value for value in comparison.untrained_probe.mean]
    axis.plot(range(1, len(untrained) + 1), untrained, "k:", label="untrained network")
    axis.legend(frameon=False)


def _draw_storage(axis: Axes, rows: tuple[Quality, ...], colors: dict[str, str]) -> None:
    axis.set(title="masked-frame label accuracy", xlabel="stored MB (log)", ylabel="% correct")
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(plt.NullFormatter())
    axis.set_xticks(sizes := sorted({row.storage_mb for row in rows}))
    axis.set_xticklabels([f"{size:.2f}" for size in sizes], rotation=45)
    for row in rows:
        if row.masked is None:
            continue
        axis.plot(row.storage_mb, 100 * row.masked.accuracy, "o", color=colors[row.name])
    if rows[0].masked is not None:
        axis.axhline(100 * rows[0].masked.chance, color="k", linestyle=":", label="chance")
        axis.legend(frameon=False)
