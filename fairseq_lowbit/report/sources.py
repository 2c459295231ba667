"""The sources of a report: folders of runs, checkpoints, and tables of other commands."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.compare import COMPARISON_FILE, Comparison
from fairseq_lowbit.runs.collection import record_of_quality
from fairseq_lowbit.runs.columns import ModelRecord
from fairseq_lowbit.runs.folder import find_runs
from fairseq_lowbit.runs.run import CALIBRATION
from fairseq_lowbit.runs.tables import read_csv


@dataclass(frozen=True)
class Sources:
    """The sources of a report, as far as they could be read.

    Attributes:
        places: folders of runs, and checkpoints.
        records: the rows of tables.
        findings: of comparisons, in sentences.
        problems: what could not be read, and why.
    """

    places: list[Path] = field(default_factory=list)
    records: list[ModelRecord] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_sources(paths: Iterable[Path]) -> Sources:
    """Reads the tables among the sources, and a comparison that a folder of runs contains."""
    sources = Sources()
    for path in paths:
        try:
            _read_source(path, sources)
        except LowbitError as error:
            sources.problems.append(str(error))
    return sources


def _read_source(path: Path, sources: Sources) -> None:
    if path.suffix == ".csv":
        sources.records.extend(read_csv(path))
    elif path.suffix == ".json":
        _read_comparison(path, sources)
    elif (path / COMPARISON_FILE).is_file():
        if find_runs(path):
            sources.places.append(path)
        _read_comparison(path / COMPARISON_FILE, sources)
    else:
        sources.places.append(path)


def _read_comparison(path: Path, sources: Sources) -> None:
    comparison = Comparison.read(path)
    for row in comparison.rows:
        precision = "float" if row is comparison.teacher else None
        loss = CALIBRATION if row.is_calibrated_only else None
        known = {"status": "finished", "precision": precision, "loss": loss}
        sources.records.append(record_of_quality(row, **known))
    sources.findings.extend(comparison.findings())
