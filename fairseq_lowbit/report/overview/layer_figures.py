"""Quality layer by layer: where a student leaves its teacher."""

from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fairseq_lowbit.report.drawing import Drawing, numbers
from fairseq_lowbit.report.overview.choice import grey_first, note_on_grey, standing_out
from fairseq_lowbit.report.style import add_legend, new_figure, styled
from fairseq_lowbit.report.subjects import Subject
from fairseq_lowbit.runs.columns import COSINE, SNR, Column

_COLUMNS = (COSINE, SNR)


def layer_drawings(subjects: Sequence[Subject], colors: Mapping[str, str]) -> list[Drawing]:
    """A figure for every quality that was measured of each layer of some subject."""
    known = {column: [s for s in subjects if column.layers(s.record)] for column in _COLUMNS}
    return [_drawing(members, colors, column) for column, members in known.items() if members]


@styled()
def _drawing(subjects: Sequence[Subject], colors: Mapping[str, str], column: Column) -> Drawing:
    figure, last = new_figure(), {}
    axes = figure.subplots()
    for subject in grey_first(subjects, lambda subject: colors[subject.name]):
        values = column.layers(subject.record)
        last[subject.name] = values[-1]
        axes.plot(range(1, len(values) + 1), values, "o-", color=colors[subject.name])
    axes.set(xlabel="layer", ylabel=column.axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    shown = standing_out(subjects, colors)
    marks = [Line2D([], [], marker="o", color=colors[s.name], label=s.name) for s in shown]
    add_legend(figure, marks)
    return Drawing(
        f"{column.key}_layers",
        f"{column.label[0].upper()}{column.label[1:]} by layer",
        f"{column.note[0].upper()}{column.note[1:]}.{note_on_grey(subjects, colors)}",
        figure,
        numbers(last, f"{column.label} in the last layer", column.unit),
    )
