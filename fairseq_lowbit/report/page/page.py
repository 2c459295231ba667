"""The page: one HTML file with everything in it, and the figures as files beside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from fairseq_lowbit import __version__
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.report.drawing import Drawing
from fairseq_lowbit.report.style import as_bytes
from fairseq_lowbit.runs.columns import Column

# A larger SVG is slower to show than the same figure as PNG.
_MOST_SVG = 200_000
_FILES = ("png", "pdf")


@dataclass(frozen=True)
class Picture:
    """A figure as it stands on the page.

    Attributes:
        source: the image as a data URI.
        alt: what it shows, in words.
    """

    title: str
    caption: str
    source: str
    alt: str


@dataclass(frozen=True)
class Group:
    """Pictures that belong together.

    Attributes:
        title: None for the only group of a section.
        notes: paragraphs before them.
    """

    pictures: Sequence[Picture] = ()
    title: str | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page with figures or a table.

    Attributes:
        anchor: what links lead to.
        heads, rows: of the table, a model's name first; no rows without one.
        legend: sentences below the table.
    """

    anchor: str
    title: str
    groups: Sequence[Group] = ()
    notes: Sequence[str] = ()
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    legend: Sequence[str] = ()


@dataclass(frozen=True)
class Line:
    """A row of the comparison.

    Attributes:
        anchor: of the details.
        color: in the figures.
        details: what differs from the others, in small letters.
        status: empty for a finished run.
        message: why something is missing; empty where nothing is.
    """

    name: str
    anchor: str
    color: str
    precision: str
    details: str
    status: str
    message: str
    cells: Sequence[str]


@dataclass(frozen=True)
class Details:
    """What a run was, in full.

    Attributes:
        facts: (what, value).
        plan_heads, plan_rows: the resolved precision, the total last; no rows without a plan.
        configuration: YAML; empty if it is not known.
    """

    anchor: str
    name: str
    summary: str
    facts: Sequence[tuple[str, str]]
    plan_heads: Sequence[str]
    plan_rows: Sequence[Sequence[str]]
    configuration: str


@dataclass(frozen=True)
class Page:
    """The content of a report.

    Attributes:
        created: date and time.
        problems: what could not be read, or did not work.
        environment: (topic, lines).
    """

    created: str
    summary: str
    problems: Sequence[str]
    columns: Sequence[Column]
    lines: Sequence[Line]
    sections: Sequence[Section]
    details: Sequence[Details]
    environment: Sequence[tuple[str, Sequence[str]]]
    version: str = __version__


@dataclass
class Pictures:
    """Makes pictures of drawings, and writes each into a folder as PNG and PDF too."""

    folder: Path
    names: list[str] = field(default_factory=list)

    def add(self, drawing: Drawing) -> Picture:
        """Raises LowbitError when the folder cannot be written."""
        stem = self._unused(drawing.name)
        files = {kind: as_bytes(drawing.figure, kind) for kind in _FILES}
        for kind, content in files.items():
            with atomic_write(self.folder / f"{stem}.{kind}", "wb") as file:
                file.write(content)
        vectors = as_bytes(drawing.figure, "svg")
        kind, content = "svg+xml", vectors
        if len(vectors) > max(_MOST_SVG, len(files["png"])):
            kind, content = "png", files["png"]
        source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        return Picture(drawing.title, drawing.caption, source, drawing.alt or drawing.caption)

    def _unused(self, name: str) -> str:
        """A file name that no other drawing has, since two models may have the same name."""
        numbered = (f"{name}_{number}" for number in count(2))
        free = next(stem for stem in chain([name], numbered) if stem not in self.names)
        self.names.append(free)
        return free


def render(page: Page) -> str:
    """The HTML, in which all text of users is escaped."""
    environment = Environment(
        loader=PackageLoader("fairseq_lowbit.report.page", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(page=page)


def write_page(page: Page, path: Path) -> None:
    """Replaces ``path`` at once or not at all; raises LowbitError when it cannot be written."""
    html = render(page)
    with atomic_write(path) as file:
        file.write(html)
