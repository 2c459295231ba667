"""``fairseq-lowbit probe``: error rates of small heads on frozen models."""

import argparse
import json
import logging
from dataclasses import asdict
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.table import Table

from fairseq_lowbit.errors import LowbitError, require_number
from fairseq_lowbit.evaluation.probing.data import (
    ProbeData,
    read_labelled_folder,
    read_probe_data,
    read_transcribed_folder,
)
from fairseq_lowbit.evaluation.probing.measure import SEEDS, measure_probes
from fairseq_lowbit.evaluation.probing.result import Probe
from fairseq_lowbit.evaluation.probing.tasks import (
    LABELS,
    MEASURES,
    PROTOCOL,
    TASKS,
    tasks_named,
)
from fairseq_lowbit.evaluation.quality import SECONDS
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.interop import SOURCES, open_model
from fairseq_lowbit.terminal import print_table

HELP = "probe what frozen models know: phones, letters, words, speakers, accents, or your labels"
PROBES_FILE = "probes.json"
_Rows = dict[str, dict[str, Probe]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="[NAME=]MODEL", help=SOURCES)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", type=Path, help="folder with manifests, as synthesize writes it")
    where.add_argument("--audio", type=Path, help="folder of recordings in a folder for each label")
    parser.add_argument("--transcripts", type=Path, help="for --audio: lines of path<TAB>text")
    names = ",".join(task.name for task in TASKS)
    parser.add_argument(
        "--tasks", default=names, help="for --data: with commas between (%(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, help="heads a task (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for --data: a measure of the audio used"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, added to")


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    require_number("--seeds", args.seeds, 1)
    require_number("--seconds", args.seconds, 0, excluded=True)
    if args.transcripts and args.data:
        raise LowbitError("--transcripts belongs to --audio; a data folder has its own")
    named = dict(_named(text) for text in args.models)
    if len(named) < len(args.models):
        raise LowbitError("two models have the same name: write NAME=MODEL")
    read = lru_cache(maxsize=None)(lambda normalize: _read(args, normalize))
    data = read(False)
    for task, why in data.left_out.items():
        print(f"{task} left out: {why}")
    if not data.tasks:
        raise LowbitError(f"{args.data} has the targets of none of the tasks")
    protocol = {
        "id": PROTOCOL,
        "seeds": args.seeds,
        "tasks": {task.task.name: task.digest() for task in data.tasks},
    }
    rows = _stored(args.out / PROBES_FILE, protocol)
    for name, source in named.items():
        print(f"probing {name} ...", flush=True)
        loaded = open_model(source)
        rows[name] = measure_probes(loaded.model, read(loaded.normalize), args.seeds)
        _write(args.out / PROBES_FILE, protocol, rows)
    print_table(_table(rows))
    print("\n".join(_differences(rows)))
    print(f"numbers {args.out / PROBES_FILE}")
    return 0


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals else (text, Path(text))


def _read(args: argparse.Namespace, normalize: bool) -> ProbeData:
    if args.data:
        tasks = tasks_named(args.tasks.split(","))
        return read_probe_data(args.data, tasks, args.seconds, normalize)
    if args.transcripts:
        return read_transcribed_folder(args.audio, args.transcripts, normalize)
    return read_labelled_folder(args.audio, normalize)


def _stored(path: Path, protocol: dict[str, Any]) -> _Rows:
    """The rows of an earlier command.

    Raises:
        LowbitError: they were measured by another protocol, or it is no such file.
    """
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        before = stored["protocol"]
        rows = {
            name: {key: Probe.from_json(values) for key, values in row.items()}
            for name, row in stored["rows"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LowbitError(f"{path} holds no probes; take another --out") from error
    for key in protocol:
        if before.get(key) != protocol[key]:
            raise LowbitError(
                f"{path} was measured by another protocol (its {key} differ): rows would not be "
                "comparable; take another --out"
            )
    return rows


def _write(path: Path, protocol: dict[str, Any], rows: _Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        name: {key: asdict(probe) for key, probe in row.items()} for name, row in rows.items()
    }
    with atomic_write(path) as file:
        json.dump({"protocol": protocol, "rows": stored}, file)


def _known_measures(rows: _Rows) -> list:
    return [m for m in (*MEASURES, *LABELS.measures) if all(m.key in row for row in rows.values())]


def _table(rows: _Rows) -> Table:
    table = Table(title="errors in % and their 95 % interval; ± over seeds", title_justify="left")
    table.add_column("model", no_wrap=True)
    measures = _known_measures(rows)
    for measure in measures:
        table.add_column(measure.name, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_cell(row[measure.key]) for measure in measures))
    return table


def _cell(probe: Probe) -> str:
    value, low, high = (100 * x for x in (probe.rate.value, probe.rate.low, probe.rate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}] ±{100 * probe.seed_spread:.1f}"


def _differences(rows: _Rows) -> list[str]:
    """For each measure, which pairs of rows it tells apart, by a paired bootstrap."""
    lines = []
    for measure in _known_measures(rows):
        apart, alike = [], []
        for (first, a), (second, b) in combinations(rows.items(), 2):
            difference = a[measure.key].less(b[measure.key])
            (apart if difference.excludes_zero else alike).append(
                f"{first} and {second} ({100 * difference.value:+.1f})"
            )
        if apart:
            lines.append(f"The {measure.name} separates {'; '.join(apart)}.")
        if alike:
            lines.append(f"The {measure.name} does NOT separate {'; '.join(alike)}.")
    return lines
