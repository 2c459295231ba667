"""The sections of a report with figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.report.drawing import Drawing, slug
from fairseq_lowbit.report.inside.dissection import Dissected
from fairseq_lowbit.report.overview.layer_figures import layer_drawings
from fairseq_lowbit.report.overview.tradeoff_figures import tradeoff_drawings
from fairseq_lowbit.report.page.page import Group, Pictures, Section
from fairseq_lowbit.report.subjects import Subject
from fairseq_lowbit.report.training.curve_figures import (
    Trained,
    health_drawings,
    loss_drawings,
)
from fairseq_lowbit.report.training.curves import Training, read_health_curves, read_training
from fairseq_lowbit.runs.run import read_run

_LOSS_TITLES = {"distillation": "Distillation", "hubert": "HuBERT loss"}


@dataclass
class Sections:
    """Draws the sections, and collects problems on the way.

    Args:
        progress: called with what is drawn next.
    """

    subjects: Sequence[Subject]
    colors: Mapping[str, str]
    pictures: Pictures
    progress: Callable[[str], None]
    problems: list[str] = field(default_factory=list)

    def build(self, dissected: Iterable[Dissected], note: str) -> list[Section]:
        """The sections that have something to show.

        Args:
            dissected: models taken apart; an iterator keeps only one of them in memory.
            note: why these models.
        """
        sections = [self._quality(), self._training(), self._inside(dissected, note)]
        return [section for section in sections if section is not None]

    def _quality(self) -> Section | None:
        tradeoffs = tradeoff_drawings(self.subjects, self.colors)
        layers = layer_drawings(self.subjects, self.colors)
        if not tradeoffs and not layers:
            return None
        notes = []
        teachers = {s.record["teacher"] for s in self.subjects} - {None}
        if len(teachers) > 1:
            notes.append(
                f"These models have {len(teachers)} teachers. Cosine and SNR are against a model's "
                "own one: compare them between students of the same teacher only."
            )
        groups = [self._group(tradeoffs), self._group(layers, "Layer by layer")]
        groups = [group for group in groups if group.pictures]
        return Section("quality", "Quality and cost", groups, notes)

    def _training(self) -> Section | None:
        runs = [run for subject in self.subjects if (run := self._trained(subject)) is not None]
        losses = dict.fromkeys(run.subject.record["loss"] for run in runs)
        groups = [
            self._losses(loss, [run for run in runs if run.subject.record["loss"] == loss])
            for loss in losses
        ]
        health = health_drawings(runs, self.colors)
        groups = [g for g in (*groups, self._group(health, "Health of quantizers")) if g.pictures]
        return Section("training", "Training", groups) if groups else None

    def _losses(self, loss: str | None, runs: Sequence[Trained]) -> Group:
        """The terms of one loss, in which its runs are comparable."""
        drawings = loss_drawings(runs, self.colors, slug(loss or "other"))
        return self._group(drawings, _LOSS_TITLES.get(loss, loss))

    def _trained(self, subject: Subject) -> Trained | None:
        """The curves of a run; None without a run or any records of it."""
        if subject.folder is None:
            return None
        training, health = Training(), {}
        try:
            checkpoints = (subject.checkpoint or read_run(subject.folder).checkpoint).parent
            health = read_health_curves(checkpoints)
            training = read_training(checkpoints)
        except LowbitError as error:
            if subject.checkpoint is not None:  # without one it has not begun to train
                self.problems.append(f"{subject.name}: {error}")
        return Trained(subject, training, health) if training.terms or health else None

    def _inside(self, dissected: Iterable[Dissected], note: str) -> Section | None:
        groups = []
        for one in dissected:
            if one.has_failed:
                self.problems.append(f"{one.subject.name} could not be taken apart: {one.note}")
            groups.append(self._group(one.drawings, one.subject.name, [one.note]))
        return Section("inside", "Inside the models", groups, [note]) if groups else None

    def _group(
        self, drawings: Sequence[Drawing], title: str | None = None, notes: Sequence[str] = ()
    ) -> Group:
        if drawings:
            self.progress(f"{len(drawings)} figures{f' ({title})' if title else ''}")
        return Group([self.pictures.add(drawing) for drawing in drawings], title, notes)
