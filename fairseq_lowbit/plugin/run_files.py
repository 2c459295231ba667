"""What a run leaves beside its checkpoints: the precision plan, health records, skipped files.

Only the first process writes.
"""

import json
from pathlib import Path

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
    read_text,
)
from fairseq_lowbit.terminal import print_table


def write_plan(folder: Path, plan: Plan) -> None:
    """Leaves the precision plan in ``folder``, and prints it."""
    if is_first():
        with atomic_write(folder / PLAN_FILE) as file:
            json.dump(plan.to_mapping(), file, indent=1)
        print_table(plan_table(plan))


def write_health(folder: Path, update: int, health: Health) -> None:
    """Adds a record of one update to those in ``folder``."""
    path = folder / HEALTH_FILE
    with writing(path), open(path, "a") as file:
        file.write(json.dumps({"update": update, **health.to_mapping()}) + "\n")


def read_unusable(folder: Path) -> dict[str, str]:
    """Names of training files that no model can learn from, and reasons, as found before."""
    lines = read_text(folder / UNUSABLE_FILE).splitlines()
    return dict(line.split("\t", 1) for line in lines if "\t" in line)


def write_unusable(folder: Path, unusable: dict[str, str]) -> None:
    """What :func:`read_unusable` reads."""
    if is_first():
        with atomic_write(folder / UNUSABLE_FILE) as file:
            file.writelines(f"{name}\t{reason}\n" for name, reason in unusable.items())


def print_summary(folder: Path) -> None:
    """The short table at the end of a run, from its last health record; nothing without one."""
    records = read_health(folder)
    if records:
        print_table(health_table(records[-1]))
    skipped = folder / UNUSABLE_FILE
    if skipped.is_file():
        names = skipped.read_text().splitlines()
        print(f"{len(names)} unusable files were skipped, listed in {skipped}; first: {names[0]}")
