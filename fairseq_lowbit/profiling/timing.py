"""Running models to measure them: wall time, real-time factor, peak memory.

Every model is first loaded alone, for its memory. Then all are loaded together and take turns, so
that other load on the machine affects all of them.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models.architecture import SAMPLE_RATE
from fairseq_lowbit.models.protocols import HiddenStates, SpeechModel
from fairseq_lowbit.nn import calibrate, is_quantized, quantizers
from fairseq_lowbit.profiling.memory import peak_resident_bytes, resident_bytes
from fairseq_lowbit.quantization import Criterion, SquashedQuantizer

FLOAT = "fp32"
FAKE_QUANTIZATION = "fake quantization in fp32"
_CALIBRATION_SAMPLES = SAMPLE_RATE // 2


@dataclass(frozen=True)
class Runnable:
    """A model that is ready to run.

    Attributes:
        run: on a waveform [1, samples], fp32 at 16 kHz.
        arithmetic: the kind of numbers it computes with, in words.
    """

    run: Callable[[Tensor], object]
    arithmetic: str


@dataclass(frozen=True)
class TimedModel:
    """A model to measure, under a name of its own; ``load`` gives a new copy of it."""

    name: str
    load: Callable[[], Runnable]


@dataclass(frozen=True)
class Condition:
    """Length of the audio and number of threads within an operator."""

    seconds: float
    threads: int

    def __str__(self) -> str:
        return f"{self.seconds:g} s, {self.threads} {'thread' if self.threads == 1 else 'threads'}"


@dataclass
class TimingRecord:
    """What has been measured so far, by name and condition.

    Attributes:
        times: seconds of each run, one per turn.
        peaks: bytes, see :func:`peak_resident_bytes`, with no other model loaded; None where the
            system does not report it.
        arithmetic: by name, see :class:`Runnable`.
        failures: by name, why a model was not measured.
        libraries: resident bytes with no model loaded, after all have run.
    """

    times: dict[tuple[str, Condition], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )
    peaks: dict[tuple[str, Condition], int | None] = field(default_factory=dict)
    arithmetic: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    libraries: int | None = None


@dataclass(frozen=True)
class Timing:
    """One model under one condition.

    Attributes:
        times: seconds, one per run.
        runtime: in units of the reference model's: the median over the turns of the quotient of
            neighbouring runs; None when the reference was not measured.
        peak_resident_bytes: see :class:`TimingRecord`.
    """

    condition: Condition
    times: tuple[float, ...]
    runtime: float | None
    peak_resident_bytes: int | None

    @property
    def time(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.times)

    @property
    def real_time_factor(self) -> float:
        """Processing time over the length of the audio: below 1 is faster than real time."""
        return self.time / self.condition.seconds

    def to_mapping(self) -> dict[str, Any]:
        return {
            "seconds": self.condition.seconds,
            "threads": self.condition.threads,
            "measured_runtime": self.runtime,
            "time_s": self.time,
            "time_min_s": min(self.times),
            "time_max_s": max(self.times),
            "times_s": list(self.times),
            "real_time_factor": self.real_time_factor,
            "peak_resident_bytes": self.peak_resident_bytes,
        }


def runnable(model: HiddenStates) -> Runnable:
    """Wraps ``model``; a run computes the output of every layer."""
    return Runnable(model.hidden_states, FAKE_QUANTIZATION if is_quantized(model) else FLOAT)


def with_random_weights(build: Callable[[], SpeechModel]) -> SpeechModel:
    """What ``build`` makes, in eval mode and ready to run: its weights are drawn from a fixed seed,
    its quantizers calibrated on noise. Time and memory do not depend on the values.

    Raises:
        LowbitError: see ``build``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        noise = torch.randn(1, _CALIBRATION_SAMPLES)
    for _, quantizer in quantizers(model):
        if isinstance(quantizer, SquashedQuantizer):
            # The random weights are used as squashed ones, since fitting those takes a minute.
            quantizer.mark_calibrated(True)
    calibrate(model, [noise], model.final_output, Criterion("absmax"))
    return model


def conditions(lengths: Sequence[float], threads: Sequence[int]) -> list[Condition]:
    """All combinations, each once, the shortest and fewest first."""
    return [Condition(s, t) for s in sorted(set(lengths)) for t in sorted(set(threads))]


def time_models(
    models: Sequence[TimedModel],
    grid: Sequence[Condition],
    repeats: int,
    record: TimingRecord,
    progress: Callable[[str], None] = lambda what: None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Runs every model under every condition, at batch 1.

    A model that cannot be loaded is left out of the rest.

    Args:
        repeats: timed runs of each model under each condition.
        record: filled run by run, so that an interruption leaves what was measured.
        progress: called with what is measured next.
    """
    for model in models:
        progress(f"memory of {model.name}")
        try:
            _measure_memory(model, grid, record)
        except LowbitError as error:
            record.failures[model.name] = str(error)
    record.libraries = resident_bytes()
    left = [model for model in models if model.name not in record.failures]
    if not left:
        return
    loaded = {model.name: model.load() for model in left}
    for condition in grid:
        progress(f"timing {condition}")
        _take_turns(loaded, condition, repeats, record, clock)


def timings(record: TimingRecord, name: str, reference: str) -> list[Timing]:
    """The timings of the model ``name``, with runtimes in units of the model ``reference``."""
    found = []
    for (own, condition), times in record.times.items():
        if own == name:
            pairs = zip(times, record.times.get((reference, condition), ()), strict=False)
            quotients = [time / other for time, other in pairs]
            runtime = statistics.median(quotients) if quotients else None
            peak = record.peaks[name, condition]
            found.append(Timing(condition, tuple(times), runtime, peak))
    return found


def _measure_memory(model: TimedModel, grid: Sequence[Condition], record: TimingRecord) -> None:
    runnable = model.load()
    record.arithmetic[model.name] = runnable.arithmetic
    for condition in grid:
        with _running(condition):
            run = partial(runnable.run, _noise(condition))
            record.peaks[model.name, condition] = peak_resident_bytes(run)


def _take_turns(
    models: dict[str, Runnable],
    condition: Condition,
    repeats: int,
    record: TimingRecord,
    clock: Callable[[], float],
) -> None:
    waveform = _noise(condition)
    with _running(condition):
        for model in models.values():
            model.run(waveform)  # the first run is slower
        for turn in range(repeats):
            # In alternating order, so that a machine that gets slower or faster favours no model.
            for name in models if turn % 2 == 0 else reversed(models):
                start = clock()
                models[name].run(waveform)
                record.times[name, condition].append(clock() - start)


def _noise(condition: Condition) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, int(condition.seconds * SAMPLE_RATE), generator=generator)


@contextmanager
def _running(condition: Condition) -> Iterator[None]:
    """Inference with as many threads as the condition says."""
    before = torch.get_num_threads()
    torch.set_num_threads(condition.threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
