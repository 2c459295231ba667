"""What a report shows besides tables."""

from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """One figure of a report.

    Attributes:
        name: file name without suffix, [a-z0-9_]+, unique in a report.
        title: a few words.
        caption: one or two sentences how to read it, with units.
        figure: as drawn under :func:`fairseq_lowbit.report.style.styled`.
    """

    name: str
    title: str
    caption: str
    figure: Figure
