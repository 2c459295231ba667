#!/usr/bin/env python
"""What quantization-aware training costs: the distillation step of a quantized student against the
same step of a float student.

    python scripts/bench_training.py                        # base size, minutes
    python scripts/bench_training.py --size tiny --precision bitla_w2a2 --precision sqwq_w2
    python scripts/bench_training.py --updates 1 --updates 4 --compile
    python scripts/bench_training.py --precision bitla_w1a1 --health   # and the health figures

A step is what training does between two updates, with the objects of a training run: the shipped
configuration, the criterion (teacher and shared frozen front-end on both sides), backward, division
of the gradients, their clipping, and Adam over its parameter groups. Weights and audio are random.
Both students compare attention maps with the teacher's, so both compute them explicitly. With
--compile two more students run the layers of the encoder compiled, as task.compile does, and their
teacher too.

Time: the students of a row live in one process and take turns, so that whatever else the machine
does hits all of them. Printed are medians with the smallest and largest value, and as ratio the
median over neighbouring steps: of quantized to float steps, both eager or both compiled.

Memory: each student trains alone in a new process; what counts is its peak of resident memory
(ru_maxrss) beyond the one that the imported libraries left: teacher, student, gradients, Adam's
moments and everything that a step holds. Swapped-out pages would be missing: let there be memory.
On a GPU it is the peak of what tensors take there; and every time is taken when the GPU has done
all that it was asked for.
The compiler's own memory would hide that of a compiled student, which is not measured.

Parts: in steps of their own, because timers cost time, every quantizer is timed: where weights are
encoded, once per step; in the forward; where its operator's backward decodes again, instead of
keeping the decoded values; and in its own backward. What is left of the difference is in no
quantizer: the regulariser of squashed weights, and noise.

Health (with --health): the student takes turns with itself, a step against a step after which the
health figures of training are measured, on a batch of the configured size, and written. Their share
of the step time is the difference over as many steps as lie between two records.
"""

import argparse
import json
import logging
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.table import Table

from fairseq_lowbit.cli.device_option import add_device_argument, read_device
from fairseq_lowbit.configurations import compose_config
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.machine import this_machine
from fairseq_lowbit.models import Architecture, Hubert, LoadedModel, start_from
from fairseq_lowbit.monitoring.health import measure_health
from fairseq_lowbit.nn import calibrate, quantizers
from fairseq_lowbit.plugin import register
from fairseq_lowbit.precision import Precision, parse_precision
from fairseq_lowbit.quantization import Quantizer, weights_encoded_once
from fairseq_lowbit.terminal import print_table

register()
# Importing fairseq leaves it at DEBUG.
logging.getLogger().setLevel(logging.WARNING)
from fairseq_lowbit.plugin.compiling import compile_layers  # noqa: E402
from fairseq_lowbit.plugin.criterions import LowbitKdConfig, LowbitKdCriterion  # noqa: E402
from fairseq_lowbit.plugin.models import HubertFastConvModel  # noqa: E402
from fairseq_lowbit.plugin.optimizer import LowbitAdam, LowbitAdamConfig  # noqa: E402
from fairseq_lowbit.plugin.run_files import write_health  # noqa: E402

FLOAT = "float"
PRECISIONS = ("bitla_w1a1", "bitl_w1a1", "sqwq_w1")
SAMPLE_RATE = 16_000
# The first step makes Adam's moments; the second one holds everything that training holds.
MEMORY_STEPS = 3
WARM_UP_STEPS = 2
PART_STEPS = 2
PHASES = ("encode", "forward", "again", "backward")


@dataclass(frozen=True)
class Setting:
    """What is measured; ``seconds`` of audio per utterance, ``updates`` micro-batches per step."""

    size: str
    batch: int
    seconds: float
    updates: int
    threads: int
    repeats: int
    device: str


class Student:
    """A student with its criterion and optimizer, as a training run builds them."""

    def __init__(
        self, setting: Setting, precision: str, teacher: Hubert, is_compiled: bool = False
    ) -> None:
        config = compose_config("bitla_w1a1", [f"model=fastconv_{setting.size}"])
        self.setting = setting
        torch.manual_seed(0)
        samples = int(setting.seconds * SAMPLE_RATE)
        self.samples = [
            {"waveform": wave, "lengths": None, "sizes": [samples] * setting.batch}
            for wave in torch.randn(setting.updates, setting.batch, samples).to(setting.device)
        ]
        model = HubertFastConvModel(teacher.shape, precision=Precision(precision))
        self.model = model.to(setting.device)
        source = LoadedModel(teacher, Path("random"), 0, True, False)
        start_from(self.model, source)
        self.model.feature_extractor.requires_grad_(False)
        calibrate(self.model, [self.samples[0]["waveform"]], self.model.final_output)
        task = SimpleNamespace(model=self.model, teacher=source, shares_front_end=True)
        self.criterion = LowbitKdCriterion(task, _values(LowbitKdConfig, config.criterion))
        adam = _values(LowbitAdamConfig, {**config.optimizer, "lr": config.optimization.lr})
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = LowbitAdam(adam, trained)
        self.clip_norm = config.optimization.clip_norm
        self.health_interval = config.task.health_interval
        batch = config.task.calibration
        health_batch = torch.randn(batch.batch_size, int(batch.max_seconds * SAMPLE_RATE))
        self._health_batch = health_batch.to(setting.device)
        self.clock = clock_of(setting.device)
        self.model.train()
        if is_compiled and not compile_layers(self.model, teacher):
            raise SystemExit("--compile: torch.compile does not work here")

    def step(self) -> None:
        """One update, in the order of fairseq's trainer."""
        self.optimizer.zero_grad()
        frames = 0
        with weights_encoded_once():
            for sample in self.samples:
                loss, count, _ = self.criterion(self.model, sample)
                self.optimizer.backward(loss)
                frames += count
        self.optimizer.multiply_grads(1 / frames)
        self.optimizer.clip_grad_norm(self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def record_health(self, folder: Path) -> None:
        """What training does every ``health_interval`` updates."""
        write_health(folder, 0, measure_health(self.model, self._health_batch))


def _values(config_class: type, values: Any) -> Any:
    return config_class(**{key: value for key, value in values.items() if key != "_name"})


def build_teacher(setting: Setting) -> Hubert:
    """A float model of the distilled student's shape with random weights, frozen."""
    config = compose_config("bitla_w1a1", [f"model=fastconv_{setting.size}"])
    torch.manual_seed(1)
    model = Hubert(Architecture.from_mapping(OmegaConf.to_container(config.model)))
    return model.eval().requires_grad_(False).to(setting.device)


def clock_of(device: str) -> Callable[[], float]:
    """Seconds; of a GPU, once it has done everything that it was asked for."""
    if device == "cpu":
        return time.perf_counter

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def peak_memory(setting: Setting, precision: str) -> float:
    """GB that training alone in a new process takes beyond the imported libraries."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak_memory, setting, precision).result()


def _peak_memory(setting: Setting, precision: str) -> float:
    torch.set_num_threads(setting.threads)
    before = _peak(setting.device)
    student = Student(setting, precision, build_teacher(setting))
    for _ in range(MEMORY_STEPS):
        student.step()
    return (_peak(setting.device) - before) / 1e9


def _peak(device: str) -> int:
    """Bytes of tensors on a GPU; else of the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def take_turns(
    steps: tuple[Callable[[], object], ...],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Milliseconds of ``repeats`` calls of each, in alternating order."""
    for _ in range(WARM_UP_STEPS):
        for step in steps:
            step()
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats):
        order = range(len(steps)) if turn % 2 == 0 else reversed(range(len(steps)))
        for index in order:
            start = clock()
            steps[index]()
            times[index].append(1e3 * (clock() - start))
    return times


class PartTimer:
    """Times every quantizer of a student: milliseconds by part and phase."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.times: dict[tuple[str, str], float] = defaultdict(float)
        self._start = 0.0

    @contextmanager
    def watch(self, student: Student) -> Iterator[None]:
        handles = []
        for name, quantizer in quantizers(student.model):
            part = part_of(name)
            handles.append(quantizer.register_forward_pre_hook(self._begin))
            handles.append(quantizer.register_forward_hook(self._end_forward(part)))
            quantizer.codes = self._timed(quantizer.codes, part, "encode")
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for _, quantizer in quantizers(student.model):
                del quantizer.codes

    def _begin(self, *_: object) -> None:
        self._start = self._clock()

    def _end(self, part: str, phase: str) -> None:
        self.times[part, phase] += 1e3 * (self._clock() - self._start)

    def _end_forward(self, part: str) -> Callable[..., None]:
        def end(_: Quantizer, __: tuple, output: torch.Tensor) -> None:
            self._end(part, "forward")
            node = output.grad_fn
            if node is not None:
                node.register_prehook(self._begin)
                node.register_hook(lambda *_: self._end(part, "backward"))
            source = getattr(output, "source", None)
            if source is not None:
                decode = self._timed(source.decode, part, "again")
                output.source = replace(source, decode=decode)

        return end

    def _timed(self, function: Callable[..., Any], part: str, phase: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            self._begin()
            result = function(*arguments, **named)
            self._end(part, phase)
            return result

        return timed


def part_of(quantizer: str) -> str:
    """A quantizer's name without its layer: ``weights``, ``input of fc1``, ``probabilities``."""
    *path, slot = quantizer.split(".")
    operand = slot.removesuffix("_quantizer")
    if operand == "weight":
        return "weights"
    if operand == "input":
        return f"input of {'q, k, v' if path[-1] == 'self_attn' else path[-1]}"
    return operand


def time_parts(student: Student) -> dict[tuple[str, str], float]:
    """Milliseconds per step."""
    timer = PartTimer(student.clock)
    with timer.watch(student):
        for _ in range(PART_STEPS):
            student.step()
    return {key: total / PART_STEPS for key, total in timer.times.items()}


def health_cost(student: Student, repeats: int) -> dict[str, Any]:
    """Milliseconds of steps without and with the health figures, and their share of training."""
    with tempfile.TemporaryDirectory() as folder:

        def step_with_health() -> None:
            student.step()
            student.record_health(Path(folder))

        plain, watched = take_turns((student.step, step_with_health), repeats, student.clock)
    added = statistics.median(own - other for own, other in zip(watched, plain, strict=True))
    return {
        "interval": student.health_interval,
        "without_ms": plain,
        "with_ms": watched,
        "share": added / (student.health_interval * statistics.median(plain)),
    }


def measure(
    setting: Setting, precisions: list[str], health: bool, compiled: bool
) -> list[dict[str, Any]]:
    """One row per precision, with the float student that it took turns with, and one more of
    compiled students."""
    memory = {name: peak_memory(setting, name) for name in (FLOAT, *precisions)}
    ways = (False, True) if compiled else (False,)
    teachers = {way: build_teacher(setting) for way in ways}
    references = {way: Student(setting, FLOAT, teachers[way], way) for way in ways}
    rows = []
    for name in precisions:
        students = {way: Student(setting, name, teachers[way], way) for way in ways}
        steps = tuple(s.step for way in ways for s in (references[way], students[way]))
        times = take_turns(steps, setting.repeats, clock_of(setting.device))
        for way, float_ms, quantized_ms in zip(ways, times[::2], times[1::2], strict=True):
            row = {
                "precision": name,
                "updates": setting.updates,
                "compiled": way,
                "float_ms": float_ms,
                "quantized_ms": quantized_ms,
                "time_ratio": _ratio(quantized_ms, float_ms),
            }
            rows.append(row if way else row | _beside(students[way], name, memory, health))
        del students, steps
    return rows


def _ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(own / other for own, other in zip(times, others, strict=True))


def _beside(student: Student, name: str, memory: dict[str, float], health: bool) -> dict[str, Any]:
    """What is measured of an eager student besides its time."""
    parts = time_parts(student)
    return {
        "float_gb": memory[FLOAT],
        "quantized_gb": memory[name],
        "memory_ratio": memory[name] / memory[FLOAT],
        "parts_ms": [
            {"part": part, "phase": phase, "ms": ms} for (part, phase), ms in parts.items()
        ],
        "health": health_cost(student, student.setting.repeats) if health else None,
    }


def machine(device: str) -> dict[str, Any]:
    here = this_machine()
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}
    return {
        **gpu,
        "cpu": here.cpu,
        "cores": here.cores,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def cost_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="distillation step: quantized student against float", title_justify="left")
    table.add_column("precision")
    table.add_column("layers")
    for column in ("update_freq", "float ms", "quantized ms", "time"):
        table.add_column(column, justify="right")
    memory = {"float GB": "float_gb", "quantized GB": "quantized_gb", "memory": "memory_ratio"}
    for column in memory:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["precision"],
            "compiled" if row["compiled"] else "eager",
            str(row["updates"]),
            _spread(row["float_ms"]),
            _spread(row["quantized_ms"]),
            f"{row['time_ratio']:.2f}",
            *(f"{row[key]:.2f}" if key in row else "-" for key in memory.values()),
        )
    return table


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} [{min(values):,.0f}, {max(values):,.0f}]"


def parts_table(row: dict[str, Any]) -> Table:
    """Where the difference of one row goes, in ms per step and per cent of the float step."""
    step = statistics.median(row["float_ms"])
    difference = statistics.median(row["quantized_ms"]) - step
    title = f"{row['precision']}, update_freq {row['updates']}: the difference, in ms"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for column in ("encode", "forward", "decode again", "backward", "% of the float step"):
        table.add_column(column, justify="right")
    times: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for entry in row["parts_ms"]:
        times[entry["part"]][entry["phase"]] = entry["ms"]
    for part, phases in times.items():
        cells = (f"{phases[phase]:,.1f}" for phase in PHASES)
        table.add_row(part, *cells, f"{100 * sum(phases.values()) / step:.1f}")
    timed = sum(entry["ms"] for entry in row["parts_ms"])
    table.add_row("everything else", "", "", "", "", f"{100 * (difference - timed) / step:.1f}")
    table.add_section()
    table.add_row("difference", "", "", "", "", f"{100 * difference / step:.1f}")
    return table


def health_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="health figures in training", title_justify="left")
    table.add_column("precision")
    for column in ("step ms", "with figures ms", "every", "% of step time"):
        table.add_column(column, justify="right")
    for row in rows:
        health = row["health"]
        table.add_row(
            row["precision"],
            _spread(health["without_ms"]),
            _spread(health["with_ms"]),
            f"{health['interval']} updates",
            f"{100 * health['share']:.2f}",
        )
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--precision", action="append", help=f"repeatable; default: {', '.join(PRECISIONS)}"
    )
    parser.add_argument("--size", choices=("base", "tiny"), default="base", help="of the model")
    parser.add_argument("--batch", type=_positive(int), default=2, help="utterances")
    parser.add_argument("--seconds", type=_positive(float), default=5.0, help="of each utterance")
    parser.add_argument(
        "--updates",
        action="append",
        type=_positive(int),
        help="micro-batches per step (update_freq); repeatable; default: 1",
    )
    parser.add_argument(
        "--compile", action="store_true", help="two students with compiled layers too"
    )
    parser.add_argument(
        "--threads", type=_positive(int), default=os.cpu_count(), help="default: all cores"
    )
    parser.add_argument("--repeats", type=_positive(int), default=5, help="timed steps per side")
    add_device_argument(parser)
    parser.add_argument("--health", action="store_true", help="the cost of the health figures too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    given = parser.parse_args(arguments)
    given.precision = given.precision or list(PRECISIONS)
    given.updates = given.updates or [1]
    try:
        given.device = read_device(given)
        for name in given.precision:
            parse_precision(name)
    except LowbitError as error:
        parser.error(str(error))
    return given


def _positive(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    return convert


def main(arguments: list[str] | None = None) -> int:
    given = parse_arguments(arguments)
    setting = Setting(
        given.size, given.batch, given.seconds, 1, given.threads, given.repeats, given.device
    )
    torch.set_num_threads(setting.threads)
    rows = [
        row
        for updates in given.updates
        for row in measure(
            replace(setting, updates=updates), given.precision, given.health, given.compile
        )
    ]
    about = {**machine(given.device), **asdict(setting), "updates": given.updates}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print_table(cost_table(rows))
    eager = [row for row in rows if not row["compiled"]]
    for row in eager:
        print_table(parts_table(row))
    if given.health:
        print_table(health_table(eager))
    if given.json:
        given.json.write_text(json.dumps({"setting": about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
