#!/usr/bin/env python
"""What an ONNX file of a model costs: its size, and its time in ONNX Runtime against torch's.

    python scripts/bench_onnx.py                                     # base size, minutes
    python scripts/bench_onnx.py --size tiny --seconds 2 --precision float --precision bitl_w8a8

Weights and audio are random, every precision is calibrated on noise. All of them, in both runtimes,
live in one process, compute on one thread and take turns, so that whatever else the machine does
hits all alike. Printed are medians of the processor's time for one utterance, with the smallest and
the largest value.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from rich.table import Table
from torch import Tensor

from fairseq_lowbit.configurations import compose_config
from fairseq_lowbit.interop import onnx
from fairseq_lowbit.machine import this_machine
from fairseq_lowbit.models import Architecture, Hubert, LoadedModel
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.terminal import print_table

PRECISIONS = ("float", "bitl_w8a8", "bitla_w8a8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and size of ONNX files.")
    parser.add_argument("--size", choices=("tiny", "base"), default="base")
    parser.add_argument("--precision", action="append", help=f"default: {', '.join(PRECISIONS)}")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the utterance")
    parser.add_argument("--repeats", type=int, default=9, help="measured turns")
    args = parser.parse_args()
    torch.set_num_threads(1)
    waveform = 0.1 * torch.randn(1, int(args.seconds * onnx.SAMPLE_RATE))
    config = compose_config("bitla_w1a1", [f"model=fastconv_{args.size}"])
    shape = Architecture.from_mapping(dict(config.model))
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in args.precision or PRECISIONS:
            model, path = calibrated(shape, precision), Path(folder) / f"{precision}.onnx"
            onnx.export(LoadedModel(model, precision, 0, True, False), path)
            sizes[precision] = path.stat().st_size / 1e6
            runs[precision, "torch"] = lambda model=model: model.representations(waveform)
            runs[precision, "ONNX Runtime"] = in_onnx_runtime(path, waveform)
    print(f"{this_machine()}; torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}")
    print_table(table(args.seconds, sizes, measure(runs, args.repeats)))


@torch.no_grad()
def calibrated(shape: Architecture, precision: str) -> Hubert:
    torch.manual_seed(0)
    model = Hubert(shape, precision=Precision(precision))
    calibrate(model, [0.1 * torch.randn(1, 2 * onnx.SAMPLE_RATE)], model.final_output)
    return model.eval()


def in_onnx_runtime(path: Path, waveform: Tensor) -> Callable[[], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"waveform": waveform.numpy()})


@torch.no_grad()
def measure(
    runs: dict[tuple[str, str], Callable[[], object]], repeats: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of the processor in every turn but the first, which warms up."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(1 + repeats):
        for key, call in runs.items():
            start = time.process_time()
            call()
            seconds[key].append(time.process_time() - start)
    return {key: values[1:] for key, values in seconds.items()}


def table(
    seconds: float, sizes: dict[str, float], times: dict[tuple[str, str], list[float]]
) -> Table:
    columns = ("precision", "file, MB", "runtime", f"seconds for {seconds:g} s", "range")
    result = Table(*columns)
    for (precision, runtime), values in times.items():
        middle, size = statistics.median(values), f"{sizes[precision]:.1f}"
        span = f"{min(values):.2f} - {max(values):.2f}"
        result.add_row(precision, size, runtime, f"{middle:.2f}", span)
    return result


if __name__ == "__main__":
    main()
