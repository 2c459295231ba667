"""Reads a report as a browser would, strictly."""

import re
from html.parser import HTMLParser
from pathlib import Path

# Elements that have no end.
VOID = {"meta", "img", "br", "hr", "link", "input"}


class ReportPage(HTMLParser):
    """A page; an element that is not closed, or closed by another, is an error.

    Attributes:
        links, sources: values of ``href`` and ``src``.
        ids: in the order of the page.
        images: alternative texts.
        tables: texts of the cells of the rows of every table.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.images: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self._cell: list[str] | None = None
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    @classmethod
    def read(cls, path: Path) -> "ReportPage":
        return cls(path.read_text(encoding="utf-8"))

    @property
    def text(self) -> str:
        """What is there to read, with single spaces."""
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def comparison(self) -> list[list[str]]:
        """The first table, its heads first."""
        return self.tables[0]

    def row(self, name: str) -> list[str]:
        """The one row of the comparison whose first cell begins with ``name``."""
        (found,) = (row for row in self.comparison if row[0].split(" ")[0] == name)
        return found

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        assert len(values) == len(attributes), f"{tag} has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)
        for key, kept in (("href", self.links), ("src", self.sources), ("id", self.ids)):
            if key in values:
                kept.append(values[key] or "")
        if tag == "img":
            self.images.append(values["alt"] or "")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"
        if tag in ("td", "th"):
            self.tables[-1][-1].append(re.sub(r"\s+", " ", " ".join(self._cell or [])).strip())
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)
