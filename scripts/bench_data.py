#!/usr/bin/env python
"""How fast audio is read and labelled, against how fast training takes it.

    python scripts/bench_data.py                              # tiny model, a minute
    python scripts/bench_data.py --size base --cores 32       # what 960 h take on 32 cores
    python scripts/bench_data.py --model teacher.pt --layer 6 --data /data/librispeech

Everything runs in one thread, and its processor time is measured, so that a rate is that of a core:
seconds of audio in a second. Files, shards and processes share nothing, so that N cores do N times
as much where the disk keeps up, whose waiting does not count here.

- read: FLAC to samples.
- MFCC labels: read, MFCC, nearest of 100 centres.
- layer labels: read, the model up to a layer, nearest of 500 centres.
- training: the distillation step of a quantized student, with the objects of a training run; see
  scripts/bench_training.py. Its audio is in memory.

The four take turns, so that whatever else the machine does hits all. Printed are medians with the
smallest and largest rate.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One core, before numpy and torch start their threads.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import torch
from bench_training import Setting, Student, build_teacher, take_turns
from rich.table import Table

from fairseq_lowbit.data.audio import SAMPLE_RATE, read_audio
from fairseq_lowbit.data.clusters import Clusters
from fairseq_lowbit.data.features import Mfcc
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.data.synthetic.librispeech import synthesize_librispeech
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.layer_features import layer_output
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.machine import this_machine, usable_cores
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.terminal import print_table

LIBRISPEECH_HOURS = 960
MFCC_CLUSTERS, LAYER_CLUSTERS = 100, 500
TRAINING = "training step"


@dataclass(frozen=True)
class Sample:
    """Files to read, of ``seconds`` in all."""

    paths: list[Path]
    seconds: float


def choose_files(data: Path | None, seconds: float, stack: ExitStack) -> Sample:
    """The first files of a corpus, or of synthesized speech, of about ``seconds`` in all."""
    if data is None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        synthesize_librispeech(folder, minutes=seconds / 60)
        paths = sorted(folder.rglob("*.flac"))
        sizes = [len(read_audio(path)) for path in paths]
    else:
        manifest = read_manifest(data / "train.tsv")
        paths, sizes = list(manifest.files()), manifest.sizes.tolist()
    ends = np.cumsum(sizes)
    count = min(len(paths), 1 + int(np.searchsorted(ends, seconds * SAMPLE_RATE)))
    return Sample(paths[:count], float(ends[count - 1]) / SAMPLE_RATE)


def random_clusters(clusters: int, dimensions: int) -> Clusters:
    """Assignment takes as long with random centres as with fitted ones."""
    centers = np.random.default_rng(0).standard_normal((clusters, dimensions)).astype(np.float32)
    return Clusters(centers, np.zeros(dimensions, np.float32), np.ones(dimensions, np.float32))


def actions(
    sample: Sample, model: Hubert, layer: int, student: Student
) -> dict[str, Callable[[], None]]:
    mfcc, mfcc_clusters = Mfcc(), random_clusters(MFCC_CLUSTERS, 39)
    layer_clusters = random_clusters(LAYER_CLUSTERS, model.features)

    def read() -> None:
        for path in sample.paths:
            read_audio(path)

    def label_by_mfcc() -> None:
        for path in sample.paths:
            mfcc_clusters.assign(mfcc(read_audio(path))[::2])

    def label_by_layer() -> None:
        for path in sample.paths:
            waveform = torch.from_numpy(read_audio(path))
            layer_clusters.assign(layer_output(model, waveform, layer).numpy())

    return {
        "read": read,
        "MFCC labels": label_by_mfcc,
        f"labels of layer {layer}": label_by_layer,
        TRAINING: student.step,
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Rates of every action in seconds of audio per second, one per repeat."""
    torch.set_num_threads(1)
    setting = Setting(given.size, given.batch, given.seconds, 1, 1, given.repeats, "cpu")
    model = build_teacher(setting) if given.model is None else open_model(given.model).model
    layers = len(model.layers)
    layer = (layers + 1) // 2 if given.layer is None else given.layer
    if not 0 <= layer <= layers:
        raise LowbitError(f"--layer {layer}: the model has layers 1 to {layers}")
    with ExitStack() as stack:
        sample = choose_files(given.data, given.audio, stack)
        student = Student(setting, given.precision, model.requires_grad_(False))
        named = actions(sample, model, layer, student)
        times = take_turns(tuple(named.values()), given.repeats, time.process_time)
    eaten = dict.fromkeys(named, sample.seconds) | {TRAINING: given.batch * given.seconds}
    return {
        "machine": str(this_machine()),
        "torch": torch.__version__,
        "model": given.model or f"fastconv_{given.size}, random weights",
        "files": len(sample.paths),
        "mean_seconds": sample.seconds / len(sample.paths),
        "rates": {
            name: [1e3 * eaten[name] / ms for ms in times_ms]
            for name, times_ms in zip(named, times, strict=True)
        },
    }


def rates_table(rates: dict[str, list[float]], cores: int) -> Table:
    table = Table(title=f"{LIBRISPEECH_HOURS} h of LibriSpeech", title_justify="left")
    table.add_column("what")
    for column in ("audio s per s and core", "hours on 1 core", f"hours on {cores} cores"):
        table.add_column(column, justify="right")
    for name, values in rates.items():
        rate = statistics.median(values)
        hours = LIBRISPEECH_HOURS / rate
        name = f"{name}, one epoch" if name == TRAINING else name
        spread = f"{rate:,.1f} [{min(values):,.1f}, {max(values):,.1f}]"
        table.add_row(name, spread, f"{hours:,.2f}", f"{hours / cores:,.2f}")
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("base", "tiny"), default="tiny", help="of the model")
    parser.add_argument("--model", help="a source of another model, for example a checkpoint")
    parser.add_argument("--layer", type=int, help="for labels; default: the middle one")
    parser.add_argument("--precision", default="bitla_w2a2", help="of the student that trains")
    parser.add_argument("--data", type=Path, help="with train.tsv; default: synthesized speech")
    parser.add_argument("--audio", type=float, default=60.0, help="seconds that are read (60)")
    parser.add_argument("--batch", type=int, default=4, help="utterances of a training step (4)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each of those (10)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (5)")
    parser.add_argument(
        "--cores", type=int, default=usable_cores(), help="default: of this machine"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    given = parser.parse_args(arguments)
    for name in ("audio", "batch", "seconds", "repeats", "cores"):
        if getattr(given, name) <= 0:
            parser.error(f"--{name} {getattr(given, name)} is not positive")
    return given


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    try:
        measured = measure(given)
    except LowbitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{measured['machine']}; torch {measured['torch']}")
    print(f"model: {measured['model']}")
    print(f"{measured['files']} files of {measured['mean_seconds']:.1f} s on average")
    print_table(rates_table(measured["rates"], given.cores))
    read, trained = (statistics.median(measured["rates"][name]) for name in ("read", TRAINING))
    print(f"one core that reads feeds {read / trained:,.0f} cores that train")
    if given.json:
        given.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
