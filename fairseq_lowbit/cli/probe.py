"""``fairseq-lowbit probe``: error rates of small heads on frozen models."""

import argparse
import json
import logging
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fairseq_lowbit.cli.device_option import add_device_argument, read_device
from fairseq_lowbit.cli.names import read_named
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
    Measure,
    tasks_named,
)
from fairseq_lowbit.evaluation.quality import SECONDS
from fairseq_lowbit.files import atomic_write, check_writable
from fairseq_lowbit.interop import SOURCES, LoadedModel, open_model
from fairseq_lowbit.models import device_of
from fairseq_lowbit.report.overview.probe_figure import draw_probes
from fairseq_lowbit.terminal import print_table

HELP = "probe what frozen models know: phones, letters, words, speakers, accents, or your labels"
PROBES_FILE = "probes.json"
UNTRAINED = "untrained"


@dataclass(frozen=True)
class _Row:
    """What was measured of a model.

    Attributes:
        source: what it was opened from, and when that was written.
        probes: by the key of their measure.
    """

    source: str
    probes: dict[str, Probe]


_Rows = dict[str, _Row]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help=f"a row each; an untrained network of the first one's shape is another. {SOURCES}",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data", type=Path, help="folder with manifests, as synthesize writes it")
    where.add_argument("--audio", type=Path, help="folder of recordings in a folder for each label")
    parser.add_argument("--transcripts", type=Path, help="for --audio: lines of path<TAB>text")
    names = ",".join(task.name for task in TASKS)
    parser.add_argument(
        "--tasks", default=names, help="for --data: with commas between (default %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, help="heads for each task (default %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="for --data: a measure of the audio used (default %(default)g)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, added to")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = read_device(args)
    require_number("--seeds", args.seeds, 1)
    require_number("--seconds", args.seconds, 0, excluded=True)
    if args.transcripts and args.data:
        raise LowbitError("--transcripts belongs to --audio; a data folder has its own")
    sources = _sources(args.models)
    path = args.out / PROBES_FILE
    check_writable(path)
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
    rows = _stored(path, protocol)
    for name, source in sources.items():
        written = _written(source) + (f", {UNTRAINED}" if name == UNTRAINED else "")
        if name in rows and rows[name].source == written:
            print(f"{name}: measured before")
            continue
        print(f"probing {name} ...", flush=True)
        loaded = open_model(source, device)
        model = _untrained(loaded) if name == UNTRAINED else loaded.model
        rows[name] = _Row(written, measure_probes(model, read(loaded.normalize), args.seeds))
        _write(path, protocol, rows)
    print_table(_table(rows))
    print("\n".join(_differences(rows)))
    figure = args.out / "probes.png"
    draw_probes({name: row.probes for name, row in rows.items()}, _known_measures(rows), figure)
    print(f"figure {figure}, numbers {path}")
    return 0


def _sources(texts: list[str]) -> dict[str, str]:
    """What stands behind each name; behind :data:`UNTRAINED` the first model."""
    sources = {}
    for text in texts:
        name, source = read_named(text, "MODEL") if "=" in text else (text, text)
        if name in (UNTRAINED, *sources):
            raise LowbitError(f"two rows would have the name {name}: write OTHER_NAME=MODEL")
        sources[name] = source
    return sources | {UNTRAINED: next(iter(sources.values()))}


def _written(source: str) -> str:
    path = Path(source)
    return f"{path.absolute()} {path.stat().st_mtime}" if path.exists() else source


def _untrained(loaded: LoadedModel) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return loaded.model.untrained().eval().to(device_of(loaded.model))


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
        before = dict(stored["protocol"])
        rows = {
            name: _Row(
                row["source"],
                {key: Probe.from_json(probe) for key, probe in row["probes"].items()},
            )
            for name, row in stored["rows"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LowbitError(f"{path} holds no probes; take another --out") from error
    for key, value in protocol.items():
        if before.get(key) != value:
            raise LowbitError(
                f"{path} was measured by another protocol (its {key} differ): rows would not be "
                "comparable; take another --out"
            )
    return rows


def _write(path: Path, protocol: dict[str, Any], rows: _Rows) -> None:
    stored = {name: asdict(row) for name, row in rows.items()}
    with atomic_write(path) as file:
        json.dump({"protocol": protocol, "rows": stored}, file)


def _known_measures(rows: _Rows) -> list[Measure]:
    known = next(iter(rows.values())).probes
    return [measure for measure in (*MEASURES, *LABELS.measures) if measure.key in known]


def _table(rows: _Rows) -> Table:
    title = "errors in %, their 95 % intervals, and ± standard deviation over seeds"
    table = Table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    measures = _known_measures(rows)
    for measure in measures:
        table.add_column(measure.name, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_cell(row.probes[measure.key]) for measure in measures))
    return table


def _cell(probe: Probe) -> str:
    value, low, high = (100 * x for x in (probe.rate.value, probe.rate.low, probe.rate.high))
    return f"{value:.1f}\n[{low:.1f}, {high:.1f}]\n±{100 * probe.seed_spread:.1f}"


def _differences(rows: _Rows) -> list[str]:
    """For each measure, which pairs of rows it tells apart."""
    lines = []
    for measure in _known_measures(rows):
        apart, alike = [], []
        for (first, a), (second, b) in combinations(rows.items(), 2):
            difference = a.probes[measure.key].less(b.probes[measure.key])
            (apart if difference.is_beyond_chance else alike).append(
                f"{first} and {second} ({100 * difference.interval.value:+.1f})"
            )
        if apart:
            lines.append(f"The {measure.name} separates {'; '.join(apart)}.")
        if alike:
            lines.append(f"The {measure.name} does NOT separate {'; '.join(alike)}.")
    return lines
