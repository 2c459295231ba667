"""Quality layer by layer: where a student leaves its teacher."""

from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fairseq_lowbit.report.drawing import Drawing, numbers
from fairseq_lowbit.report.overview.choice import grey_first, note_on_grey, standing_out
from fairseq_lowbit.report.style import add_legend, new_figure, styled
from fairseq_lowbit.report.subjects import Subject

# Field of a record -> name, unit, factor, what it says.
_FIGURES = {
    "cosine_layers": (
        "cosine to the teacher",
        "",
        1,
        "Mean cosine between the frames of each layer and the teacher's, each centred",
    ),
    "snr_db_layers": (
        "SNR against the teacher",
        "dB",
        1,
        "Signal-to-noise ratio of each layer against the teacher's",
    ),
    "word_probe_layers": (
        "word probe",
        "%",
        100,
        "Words that a linear classifier reads off each frozen layer, on unseen voices",
    ),
}


def layer_drawings(subjects: Sequence[Subject], colors: Mapping[str, str]) -> list[Drawing]:
    """A figure for every quality that was measured of each layer of some subject."""
    known = {key: [s for s in subjects if s.record[key]] for key in _FIGURES}
    return [_drawing(members, colors, key) for key, members in known.items() if members]


@styled()
def _drawing(subjects: Sequence[Subject], colors: Mapping[str, str], key: str) -> Drawing:
    name, unit, factor, what = _FIGURES[key]
    figure, last = new_figure(), {}
    axes = figure.subplots()
    for subject in grey_first(subjects, lambda subject: colors[subject.name]):
        values = [factor * float(value) for value in subject.record[key].split()]
        last[subject.name] = values[-1]
        axes.plot(range(1, len(values) + 1), values, "o-", color=colors[subject.name])
    axes.set(xlabel="layer", ylabel=f"{name} ({unit})" if unit else name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    shown = standing_out(subjects, colors)
    marks = [Line2D([], [], marker="o", color=colors[s.name], label=s.name) for s in shown]
    add_legend(figure, marks)
    return Drawing(
        key,
        f"{name[0].upper()}{name[1:]} by layer",
        f"{what}.{note_on_grey(subjects, colors)}",
        figure,
        numbers(last, f"{name} in the last layer", unit),
    )
