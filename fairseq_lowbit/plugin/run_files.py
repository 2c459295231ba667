"""What a run leaves beside its checkpoints: the precision plan, health records, skipped files.

Only the first process writes.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairseq.logging import progress_bar

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write, writing
from fairseq_lowbit.monitoring.health import Health
from fairseq_lowbit.monitoring.health_table import health_table
from fairseq_lowbit.plugin.processes import is_first
from fairseq_lowbit.precision import Plan
from fairseq_lowbit.precision.plan_table import plan_table
from fairseq_lowbit.runs.folder import (
    HEALTH_FILE,
    PLAN_FILE,
    UNUSABLE_FILE,
    read_health,
)
from fairseq_lowbit.terminal import print_table


class RunFiles:
    """The precision plan and the health records of one run."""

    def __init__(self, folder: Path, tensorboard_logdir: str | None) -> None:
        self.folder = folder
        self._writes = is_first()
        self._records_health = False
        self._tensorboard_logdir = tensorboard_logdir

    def write_plan(self, plan: Plan) -> None:
        if not self._writes:
            return
        path = self.folder / PLAN_FILE
        with atomic_write(path) as file:
            json.dump(plan.to_mapping(), file, indent=1)
        print_table(plan_table(plan))

    def write_health(self, update: int, health: Health) -> None:
        if not self._writes:
            return
        path = self.folder / HEALTH_FILE
        with writing(path):
            if not self._records_health:
                self._forget_from(update)
            self._records_health = True
            with open(path, "a") as file:
                file.write(json.dumps({"update": update, **health.to_mapping()}) + "\n")
        if self._tensorboard_logdir:
            with writing_tensorboard(self._tensorboard_logdir):
                self._write_tensorboard(update, health)

    def _forget_from(self, update: int) -> None:
        """Drops what a killed run recorded after the checkpoint that this run starts from."""
        kept = [r for r in read_health(self.folder) if r["update"] < update]
        with atomic_write(self.folder / HEALTH_FILE) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)

    def _write_tensorboard(self, update: int, health: Health) -> None:
        # Among fairseq's own, which are closed in time.
        writers = progress_bar._tensorboard_writers
        if "health" not in writers:
            folder = Path(self._tensorboard_logdir) / "health"
            writers["health"] = progress_bar.SummaryWriter(str(folder))
        writer = writers["health"]
        for layer, value in enumerate(health.centered_std, 1):
            writer.add_scalar(f"centered_std/layer{layer}", value, update)
        for entry in health.quantizers:
            for key in ("sqnr_db", "clipped", "levels_used"):
                writer.add_scalar(f"{key}/{entry.name}", getattr(entry, key), update)
        writer.flush()


class UnusableFiles:
    """The list of a run's training files that no model can learn from."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / UNUSABLE_FILE

    def read(self) -> dict[str, str]:
        """Names and reasons an interrupted run found before."""
        if not self.path.is_file():
            return {}
        lines = self.path.read_text().splitlines()
        return dict(line.split("\t", 1) for line in lines if "\t" in line)

    def write(self, unusable: dict[str, str]) -> None:
        if is_first():
            with atomic_write(self.path) as file:
                file.writelines(f"{name}\t{reason}\n" for name, reason in unusable.items())


@contextmanager
def writing_tensorboard(folder: str) -> Iterator[None]:
    """:func:`writing`, after which nothing is written to ``folder`` any more."""
    try:
        with writing(folder):
            yield
    except LowbitError:
        # They would try again, with a traceback each, when the interpreter ends.
        writers = progress_bar._tensorboard_writers
        for writer in writers.values():
            for file in getattr(writer, "all_writers", {}).values():
                file.event_writer._closed = True
        writers.clear()
        raise


def print_summary(folder: Path) -> None:
    """The short table at the end of a run, from its last health record; nothing without one."""
    records = read_health(folder)
    if records:
        print_table(health_table(records[-1]))
    skipped = folder / UNUSABLE_FILE
    if skipped.is_file():
        names = skipped.read_text().splitlines()
        print(f"{len(names)} unusable files were skipped, listed in {skipped}; first: {names[0]}")
