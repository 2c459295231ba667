"""What the recipes read from a run's progress.jsonl: lines for the screen, and how many updates fit
into a time. It imports nothing heavy, since it runs beside every training.

    fairseq-hydra-train ... 2>&1 | python progress.py show LABEL LOG RUN
    python progress.py rate RUN
    python progress.py plan RUN SECONDS

``show`` writes its input into LOG, and shows its warnings and errors and the progress of RUN. Of a
trial in RUN, ``rate`` prints the updates a second, ``plan`` the settings by which such a run takes
SECONDS: as many updates as fit in with their validations, and an end a tenth later in case the
machine becomes slower.
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

import yaml

FILES = "checkpoints/**/progress.jsonl"  # the stages of a schedule have folders of their own
LEAST_UPDATES = 40
SLACK = 1.1
WIDTH = 150
SECONDS_BETWEEN_LOOKS = 5
SHOWN = ("[WARNING]", "[ERROR]", "Error")


def show(label: str, log: str, run: str) -> None:
    # Interrupted, the training says a last word, and ends this with its output.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    seen: dict[Path, int] = {}
    list(_new_records(Path(run), seen))  # of an earlier start
    with open(log, "a", buffering=1) as file:
        for line in _lines_in_time():
            file.write(line)
            shown = [line.rstrip()] if any(word in line for word in SHOWN) else []
            # Written before fairseq logs it.
            for text in [*shown, *map(_describe, _new_records(Path(run), seen))]:
                print(f"  {label}: {text}"[:WIDTH], flush=True)


def _lines_in_time() -> Iterator[str]:
    """The lines of the input, and an empty one whenever none has come for a while: a job of SLURM
    writes its records where they are read, and its output elsewhere."""
    lines: SimpleQueue[str | None] = SimpleQueue()
    Thread(target=_read_into, args=(lines,), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=SECONDS_BETWEEN_LOOKS)
        except Empty:
            line = ""
        yield line or ""
        if line is None:
            return


def _read_into(lines: "SimpleQueue[str | None]") -> None:
    """None comes behind the last line."""
    for line in sys.stdin:
        lines.put(line)
    lines.put(None)


def _new_records(run: Path, seen: dict[Path, int]) -> Iterator[dict]:
    """``seen``: how many lines of each file are known; a resumed run takes some back."""
    for path in sorted(run.glob(FILES)):
        lines = path.read_text().splitlines()
        known = min(seen.get(path, 0), len(lines))
        seen[path] = len(lines)
        for line in lines[known:]:
            with suppress(json.JSONDecodeError):  # the half that a kill has left
                yield json.loads(line)


def _describe(record: dict) -> str:
    terms = ", ".join(f"{name} {value:.4g}" for name, value in record["terms"].items())
    rate = record.get("updates_per_second")
    what = f"valid on {record['split']}" if rate is None else f"{rate:.2f} updates/s"
    return f"update {record['update']}, epoch {record['epoch']}, {what}: {terms}"


def rate(run: str) -> None:
    update, _ = costs(run)
    print(f"{1 / update:.2f}")


def plan(run: str, seconds: str) -> None:
    update, validation = costs(run)
    config = yaml.safe_load(Path(run, ".hydra", "config.yaml").read_text())
    update += validation / config["dataset"]["validate_interval_updates"]
    updates = max(LEAST_UPDATES, int((float(seconds) - validation) / update))
    end = SLACK * max(float(seconds), updates * update + validation)
    print(f"optimization.max_update={updates} optimization.stop_time_hours={end / 3600:.5f}")


def costs(run: str | Path) -> tuple[float, float]:
    """Seconds of an update and of a validation in a trial, which ends with a validation."""
    records = list(_new_records(Path(run), {}))
    if len(records) < 3 or records[-1]["phase"] != "valid":
        sys.exit(f"error: the trial in {run} has no two intervals and a validation")
    first, *_, last, valid = records
    # Behind the first interval, in which buffers and caches fill.
    update = (last["wall_seconds"] - first["wall_seconds"]) / (last["update"] - first["update"])
    return update, valid["wall_seconds"] - last["wall_seconds"]


def peak_memory(run: str | Path) -> float:
    """Bytes at most in a run, as :mod:`fairseq_lowbit.plugin.progress` records them."""
    return max(record["peak_memory_bytes"] for record in _new_records(Path(run), {}))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    {"show": show, "rate": rate, "plan": plan}[command](*arguments)
