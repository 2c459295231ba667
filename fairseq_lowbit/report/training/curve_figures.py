"""Training curves: every loss term, and the health of quantizers, over updates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fairseq_lowbit.report.drawing import Drawing, numbers, slug
from fairseq_lowbit.report.overview.choice import grey_first, note_on_grey, standing_out
from fairseq_lowbit.report.style import add_legend, new_figure, styled
from fairseq_lowbit.report.subjects import Subject
from fairseq_lowbit.report.training.curves import Curve, HealthCurve, Training

# A term that fell this far is drawn on a logarithmic scale.
_LOG_RATIO = 20.0

# Where a line has so few points, each is marked.
_MOST_MARKERS = 12
_SHARES = ("accuracy",)

# Whose term it is, in words.
_TERMS = {
    "loss": "total loss",
    "loss_final": "final output",
    "loss_layers": "layer outputs",
    "loss_attention": "attention maps",
    "loss_squash": "spread of squashed weights",
    "loss_masked": "masked frames",
    "loss_unmasked": "unmasked frames",
    "loss_features": "feature penalty",
    "accuracy": "accuracy on masked frames",
}


@dataclass(frozen=True)
class _Health:
    """How a figure of health is told: the median ``of`` something, and what is the worst."""

    title: str
    unit: str
    of: str
    worst: str


_HEALTH = {
    "sqnr_db": _Health(
        "signal to quantization noise",
        "dB",
        "of all quantizers on one fixed batch",
        "the noisiest quantizer",
    ),
    "clipped": _Health(
        "clipped values",
        "%",
        "over all quantizers of the share of values more than half a step beyond the levels",
        "the quantizer that clips most",
    ),
    "levels_used": _Health(
        "levels used",
        "%",
        "over all quantizers of the share of levels that occur",
        "the quantizer that uses the fewest",
    ),
    "centered_std": _Health(
        "centred std. deviation",
        "of the rms",
        "of the layers: near 0 a layer is constant over time, from 0.5 to 1 it is healthy",
        "the most constant layer",
    ),
}


@dataclass(frozen=True)
class Trained:
    """A run and what it left over its updates."""

    subject: Subject
    training: Training = field(default_factory=Training)
    health: Mapping[str, HealthCurve] = field(default_factory=dict)


def loss_drawings(runs: Sequence[Trained], colors: Mapping[str, str], group: str) -> list[Drawing]:
    """A figure for every term of runs that were trained with the same loss, if it is not always 0.

    Args:
        group: name of the loss.
    """
    terms = dict.fromkeys(term for run in runs for term in run.training.terms)
    return [
        _loss_drawing([r for r in runs if term in r.training.terms], colors, group, term)
        for term in terms
        if not _is_zero(runs, term)
    ]


def health_drawings(runs: Sequence[Trained], colors: Mapping[str, str]) -> list[Drawing]:
    """A figure for every figure of health that some run has recorded."""
    return [
        _health_drawing([run for run in runs if key in run.health], colors, key)
        for key in _HEALTH
        if any(key in run.health for run in runs)
    ]


def _is_zero(runs: Sequence[Trained], term: str) -> bool:
    curves = [c for run in runs for c in _both(run.training, term)]
    return not any(value for curve in curves for value in curve.values)


def _both(training: Training, term: str) -> list[Curve]:
    return [curves[term] for curves in (training.train, training.valid) if term in curves]


@styled()
def _loss_drawing(
    runs: Sequence[Trained], colors: Mapping[str, str], group: str, term: str
) -> Drawing:
    figure = new_figure()
    axes = figure.subplots()
    for run in grey_first(runs, lambda run: colors[run.subject.name]):
        _plot_term(axes, run.training, term, colors[run.subject.name])
    name, scale = _TERMS.get(term, term), ""
    if term in _SHARES:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif _falls_far(runs, term):
        axes.set_yscale("log")
        scale = " The scale is logarithmic."
    _finish(axes, name)
    add_legend(figure, _legend(runs, colors))
    return Drawing(
        f"curve_{group}_{slug(term)}",
        name[0].upper() + name[1:],
        f"{term}. Thin: training, means over the logged intervals; thick: validation."
        f"{scale}{_grey(runs, colors)}",
        figure,
        numbers(
            {r.subject.name: _both(r.training, term)[-1].values[-1] for r in runs},
            f"{name} at the end",
            "",
        ),
    )


def _plot_term(axes: Axes, training: Training, term: str, color: str) -> None:
    if term in training.train:
        curve = training.train[term].thinned()
        axes.plot(curve.updates, curve.values, color=color, linewidth=1, alpha=0.45)
    if term in training.valid:
        curve = training.valid[term].thinned()
        marker = "o" if len(curve.updates) <= _MOST_MARKERS else ""
        axes.plot(curve.updates, curve.values, color=color, marker=marker, markersize=3)


def _falls_far(runs: Sequence[Trained], term: str) -> bool:
    """So far that a linear scale would show its start only."""
    values = [v for run in runs for c in _both(run.training, term) for v in c.thinned().values]
    return bool(values) and min(values) > 0 and max(values) > _LOG_RATIO * min(values)


@styled()
def _health_drawing(runs: Sequence[Trained], colors: Mapping[str, str], key: str) -> Drawing:
    told = _HEALTH[key]
    factor = 100 if told.unit == "%" else 1
    figure = new_figure()
    axes = figure.subplots()
    for run in grey_first(runs, lambda run: colors[run.subject.name]):
        curve, color = run.health[key], colors[run.subject.name]
        middle, worst = ([factor * v for v in values] for values in (curve.median, curve.worst))
        axes.plot(curve.updates, middle, color=color)
        axes.plot(curve.updates, worst, color=color, linestyle="--", linewidth=0.8)
    _finish(axes, f"{told.title} ({told.unit})")
    if told.unit == "%":
        axes.set_ylim(bottom=0)
    add_legend(figure, _legend(runs, colors))
    return Drawing(
        f"health_{key}",
        told.title[0].upper() + told.title[1:],
        f"Median {told.of}. Dashed: {told.worst}.{_grey(runs, colors)}",
        figure,
        numbers(
            {r.subject.name: factor * r.health[key].worst[-1] for r in runs},
            f"{told.title} at the end, {told.worst}:",
            told.unit,
        ),
    )


def _finish(axes: Axes, label: str) -> None:
    axes.set(xlabel="updates", ylabel=label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _legend(runs: Sequence[Trained], colors: Mapping[str, str]) -> list[Line2D]:
    shown = standing_out([run.subject for run in runs], colors)
    return [Line2D([], [], color=colors[s.name], label=s.name) for s in shown]


def _grey(runs: Sequence[Trained], colors: Mapping[str, str]) -> str:
    return note_on_grey([run.subject for run in runs], colors)
