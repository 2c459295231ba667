"""Measured times with a clock of our own: who runs when, and what is made of the times."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.nn import is_calibrated
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.profiling.timing import (
    FAKE_QUANTIZATION,
    Condition,
    Runnable,
    TimedModel,
    TimingRecord,
    conditions,
    runnable,
    time_models,
    timings,
    with_random_weights,
)
from tests.shapes import TINY

REPEATS = 3
ANY = Condition(2.0, 1)


class Stage:
    """Models whose runs take what they are told to, by a clock that nothing else moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[tuple[str, int, int]] = []
        self.loaded: list[str] = []

    def clock(self) -> float:
        return self.now

    def candidate(self, name: str, takes: Callable[[int], float]) -> TimedModel:
        """``takes``: seconds, from the number of runs before."""

        def run(waveform: Tensor) -> None:
            assert waveform.shape[0] == 1
            assert torch.is_inference_mode_enabled()
            count = sum(own == name for own, *_ in self.runs)
            self.runs.append((name, waveform.shape[1], torch.get_num_threads()))
            self.now += takes(count)

        def load() -> Runnable:
            self.loaded.append(name)
            return Runnable(run, "fp32")

        return TimedModel(name, load)


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_lengths_and_threads_are_combined_once() -> None:
    grid = conditions([5.0, 2.0, 5.0], [2, 1, 1])
    assert grid == [Condition(s, t) for s in (2.0, 5.0) for t in (1, 2)]


def test_models_take_turns_under_every_condition(stage: Stage) -> None:
    grid = conditions([2.0, 5.0], [1, 2])
    candidates = [stage.candidate(name, lambda _: 1.0) for name in "abc"]
    record, steps = TimingRecord(), []
    time_models(candidates, grid, REPEATS, record, steps.append, stage.clock)

    cells = [(int(16_000 * c.seconds), c.threads) for c in grid]
    # Alone, one after the other, for the memory.
    alone = [(name, *cell) for name in "abc" for cell in cells]
    assert stage.runs[: len(alone)] == alone
    assert stage.loaded == list("abc") * 2
    # Then together: a warm-up, and turns in alternating order.
    order = "abc" + "abc" + "cba" + "abc"
    assert stage.runs[len(alone) :] == [(name, *cell) for cell in cells for name in order]

    for name in "abc":
        found = timings(record, name, "a")
        assert [one.condition for one in found] == grid
        assert all(one.times == (1.0,) * REPEATS for one in found)
    assert steps[:3] == [f"memory of {name}" for name in "abc"]
    assert steps[3:] == [f"timing {condition}" for condition in grid]


def test_medians_spread_and_real_time_factor(stage: Stage) -> None:
    # The first two runs are those for the memory and the warm-up.
    slow = stage.candidate("slow", lambda count: [9.0, 9.0, 4.0, 1.0, 3.0][count])
    record = TimingRecord()
    time_models([slow], [ANY], REPEATS, record, clock=stage.clock)
    (found,) = timings(record, "slow", "slow")
    assert found.to_mapping() == {
        "seconds": 2.0,
        "threads": 1,
        "measured_runtime": 1.0,
        "time_s": 3.0,
        "time_min_s": 1.0,
        "time_max_s": 4.0,
        "times_s": [4.0, 1.0, 3.0],
        "real_time_factor": 1.5,
        "peak_resident_bytes": found.peak_resident_bytes,
    }


def test_runtimes_compare_runs_of_the_same_turn(stage: Stage) -> None:
    # The machine becomes slower between turns. The quotients of times in the same turn are 2, 2 and
    # 1.5; the quotient of the medians would be 1.5.
    reference = stage.candidate("reference", lambda n: [1.0, 1.0, 1.0, 10.0, 10.0][n])
    other = stage.candidate("other", lambda n: [1.0, 1.0, 2.0, 20.0, 15.0][n])
    record = TimingRecord()
    time_models([reference, other], [ANY], REPEATS, record, clock=stage.clock)
    (found,) = timings(record, "other", "reference")
    assert found.runtime == 2.0


def test_an_interruption_leaves_what_was_measured(stage: Stage) -> None:
    def until_the_second_turn(count: int) -> float:
        if count == 3:
            raise KeyboardInterrupt
        return 2.0

    before = torch.get_num_threads()
    candidates = [
        stage.candidate("reference", lambda _: 1.0),
        stage.candidate("other", until_the_second_turn),
    ]
    record = TimingRecord()
    condition = Condition(2.0, before + 1)
    with pytest.raises(KeyboardInterrupt):
        time_models(candidates, [condition], REPEATS, record, clock=stage.clock)
    assert torch.get_num_threads() == before
    (found,) = timings(record, "other", "reference")
    assert (found.times, found.runtime) == ((2.0,), 2.0)


def test_a_model_that_fails_leaves_the_others(stage: Stage) -> None:
    def broken() -> Runnable:
        raise LowbitError("checkpoint b.pt is truncated")

    before = torch.get_num_threads()
    candidates = [
        stage.candidate("a", lambda _: 1.0),
        TimedModel("broken", broken),
    ]
    record = TimingRecord()
    time_models(candidates, [ANY], 1, record, clock=stage.clock)
    assert record.failures == {"broken": "checkpoint b.pt is truncated"}
    assert len(timings(record, "a", "a")) == 1
    # Without the reference there is a time and no runtime.
    assert timings(record, "a", "broken")[0].runtime is None
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "precision", ["float", "sqwq_w2", "bitla_w1a1", "bitl_w2a2", "minmax_w4a8"]
)
def test_models_of_random_weights_run(precision: str) -> None:
    build = partial(Hubert, TINY, precision=Precision(precision))
    state = torch.get_rng_state()
    model, again = (with_random_weights(build) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert is_calibrated(model)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    ready = runnable(model)
    layers, _ = ready.run(torch.randn(1, 4000))
    assert len(layers) == TINY.encoder_layers
    assert all(layer.isfinite().all() for layer in layers)
    assert (ready.arithmetic == FAKE_QUANTIZATION) == (precision != "float")


def test_a_plan_without_quantizers_is_no_fake_quantization() -> None:
    assert runnable(Hubert(TINY, precision=Precision("bitl_w16a16"))).arithmetic == "fp32"
