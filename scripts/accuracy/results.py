"""The file of finished runs, and which runs are missing in it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accuracy.rows import Row
from accuracy.training import CHOICE, Outcome, Run, Teacher
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write

_FIRST_SEED = 1


@dataclass(frozen=True)
class Plan:
    """What is asked for: every row on every teacher, at the best of the rates, with so many
    seeds."""

    teachers: Sequence[Teacher]
    rows: Sequence[Row]
    rates: Sequence[float]
    seeds: int

    @property
    def runs(self) -> int:
        """The first seed has every rate, the others have the best one."""
        return len(self.teachers) * len(self.rows) * (len(self.rates) + self.seeds - 1)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Names of teacher and row."""
        return ((teacher.name, row.name) for teacher in self.teachers for row in self.rows)


class Results:
    """Finished runs, in a file that is whole after every one of them.

    Args:
        setting: what runs have to share to be compared; what earlier ones were made with is kept.
        machine: that this start runs on.

    Raises:
        LowbitError: the file has runs of another setting, or is another kind of file.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any], machine: str) -> None:
        self.path, self.setting, self.machine = path, dict(setting), machine
        self.outcomes: dict[Run, Outcome] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            setting = dict(stored["setting"])
            self.outcomes = {Run(**e["run"]): Outcome(**e["outcome"]) for e in stored["runs"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LowbitError(
                f"{self.path} is no file of this script ({error}): take another --out"
            ) from error
        for key, value in self.setting.items():
            if setting.get(key, value) != value:
                raise LowbitError(
                    f"{self.path} has runs with {key} {setting[key]}, not {value}, which would not "
                    "compare: take another --out, or what they have"
                )
        self.setting = setting | self.setting

    def add(self, run: Run, outcome: Outcome) -> None:
        """Raises LowbitError if the file cannot be written."""
        self.outcomes[run] = outcome
        runs = [{"run": asdict(r), "outcome": asdict(o)} for r, o in self.outcomes.items()]
        kept = {"machine": self.machine, "setting": self.setting, "runs": runs}
        with atomic_write(self.path) as file:
            json.dump(kept, file, indent=1)
            file.write("\n")

    def known(self, plan: Plan) -> list[Run]:
        """The runs that the plan takes, as far as is known: the best rate of a row is known when
        all have been tried."""
        runs = [
            Run(teacher, row, rate, _FIRST_SEED)
            for teacher, row in plan.pairs()
            for rate in plan.rates
        ]
        for teacher, row in plan.pairs():
            if self._tried(plan, teacher, row):
                runs += self.at_best_rate(plan, teacher, row)
        return list(dict.fromkeys(runs))

    def missing(self, plan: Plan) -> list[Run]:
        """Of the known ones."""
        return [run for run in self.known(plan) if run not in self.outcomes]

    def at_best_rate(self, plan: Plan, teacher: str, row: str) -> list[Run]:
        """The runs of every seed at the rate whose first seed is best on the split for choices."""
        tried = self._tried(plan, teacher, row)
        best = max(tried, key=lambda run: self.outcomes[run].trained.get(CHOICE, float("-inf")))
        seeds = range(_FIRST_SEED, _FIRST_SEED + plan.seeds)
        return [Run(teacher, row, best.rate, seed) for seed in seeds]

    def _tried(self, plan: Plan, teacher: str, row: str) -> list[Run]:
        """The runs that the rate is chosen by; none if one is missing."""
        runs = [Run(teacher, row, rate, _FIRST_SEED) for rate in plan.rates]
        return runs if all(run in self.outcomes for run in runs) else []
