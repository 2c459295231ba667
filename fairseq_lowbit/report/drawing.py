"""A figure of a report with its texts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """One figure of a report.

    Attributes:
        name: file name without suffix, [a-z0-9_]+, unique in a report.
        title: a few words.
        caption: one or two sentences on how to read it, with units.
        figure: as drawn under :func:`fairseq_lowbit.report.style.styled`.
        alt: its content in numbers, for readers who cannot see it; if empty the caption serves.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    alt: str = ""


def numbers(values: Mapping[str, float], name: str, unit: str) -> str:
    """Values in words for an alternative text: a single one, or the least and the greatest.

    >>> numbers({"a": 0.5, "b": 2, "c": 1}, "cosine", "dB")
    'cosine from 0.5 dB (a) to 2 dB (b)'
    """
    unit = "%" if unit == "%" else f" {unit}" if unit else ""
    named = {key: f"{value:.3g}{unit} ({key})" for key, value in values.items()}
    low, high = (named[choose(values, key=values.__getitem__)] for choose in (min, max))
    text = low if len(values) == 1 else f"from {low} to {high}"
    return f"{name} {text}".strip()


def slug(text: str) -> str:
    """``text`` as a part of a drawing's name.

    >>> slug("QAT w1a1")
    'qat_w1a1'
    """
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "other"
