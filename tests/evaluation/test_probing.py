"""Heads on features that are made up, so that what they can tell is known."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.probing.data import Example, ProbeData, TaskData
from fairseq_lowbit.evaluation.probing.features import frozen_features
from fairseq_lowbit.evaluation.probing.measure import measure_probes
from fairseq_lowbit.evaluation.probing.result import Probe
from fairseq_lowbit.evaluation.probing.tasks import LETTERS, PHONES, WORDS, Task, tasks_named
from fairseq_lowbit.evaluation.utterances import Utterances
from fairseq_lowbit.models import Hubert
from tests.evaluation.conftest import build_teacher

UNITS = "abcd"
UNIT_FRAMES, DIM = 8, 16


class Upstream(torch.nn.Module):
    """Features are the samples themselves: [batch, frames * DIM] as two equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def representations(self, waveform: torch.Tensor, lengths: torch.Tensor) -> tuple:
        states = waveform.unflatten(1, (-1, DIM))
        padding = torch.arange(states.shape[1]) >= (lengths // DIM)[:, None]
        return [states, states], padding


def task_data(task: Task, told: float, count: int = 90) -> ProbeData:
    """Recordings with units from ``UNITS``, ``told`` times visible in otherwise random features."""
    rng = np.random.default_rng(0)
    codes = torch.eye(DIM)
    waves, examples = [], []
    for number in range(count):
        units = rng.permutation(len(UNITS))[: rng.integers(2, 5) if task.is_sequence else 1]
        silence = [len(UNITS)]
        path = np.repeat([*silence, *units, *silence], UNIT_FRAMES)
        noise = torch.from_numpy(rng.standard_normal((len(path), DIM), dtype=np.float32))
        waves.append((told * codes[path] + 0.1 * noise).flatten())
        joint = "" if task is LETTERS else " "
        target = joint.join(UNITS[unit] for unit in units)
        examples.append(Example(number, target, f"speaker{number % 5}"))
    lengths = torch.tensor([len(wave) for wave in waves])
    rows = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    batch = Utterances(list(range(count)), rows, lengths)
    train, test = tuple(examples[: count * 2 // 3]), tuple(examples[count * 2 // 3 :])
    return ProbeData((batch,), (TaskData(task, train, test),), {})


@pytest.mark.parametrize("task", [PHONES, LETTERS, WORDS])
def test_what_is_written_in_the_features_is_told(task: Task) -> None:
    probes = measure_probes(Upstream(), task_data(task, told=1.0), seeds=2)
    assert list(probes) == [measure.key for measure in task.measures]
    for probe in probes.values():
        assert probe.rate.value <= 0.02
        assert len(probe.layer_weights) == 2
        assert sum(probe.layer_weights) == pytest.approx(1)


@pytest.mark.parametrize(("task", "key"), [(PHONES, "phone_error"), (WORDS, "keyword_error")])
def test_what_is_not_there_is_not_told(task: Task, key: str) -> None:
    probe = measure_probes(Upstream(), task_data(task, told=0.0), seeds=2)[key]
    assert 0.5 < probe.rate.value < 1.1  # chance is 0.75 for one of four labels


def test_measured_twice_nothing_differs() -> None:
    first, second = (measure_probes(Upstream(), task_data(PHONES, 0.2)) for _ in range(2))
    assert first == second
    difference = first["phone_error"].less(second["phone_error"])
    assert difference.by_seed == (0.0, 0.0, 0.0)
    assert not difference.is_beyond_chance


def test_less_in_the_features_is_beyond_chance() -> None:
    clear, blurred = (
        measure_probes(Upstream(), task_data(PHONES, told), 2)["phone_error"] for told in (1.0, 0.1)
    )
    difference = clear.less(blurred)
    assert difference.interval.value < 0
    assert difference.is_beyond_chance


def test_seeds_that_contradict_the_interval() -> None:
    def probe(rate: float, *seeds: float) -> Probe:
        names = tuple(map(str, range(20)))
        return Probe((rate,) * 20, (1,) * 20, names, seeds, (1.0,))

    difference = probe(0.5, 0.4, 0.6).less(probe(0.55, 0.6, 0.5))
    assert difference.interval.excludes_zero
    assert not difference.is_beyond_chance
    assert probe(0.5, 0.4, 0.6).less(probe(0.65, 0.6, 0.7)).is_beyond_chance
    with pytest.raises(LowbitError, match="numbers of seeds"):
        probe(0.5, 0.5).less(probe(0.5, 0.5, 0.5))
    with pytest.raises(LowbitError, match="different recordings"):
        probe(0.5, 0.5).less(Probe((0.5,), (1,), ("a",), (0.5,), (1.0,)))


def test_the_batch_of_a_recording_changes_nothing() -> None:
    model: Hubert = build_teacher()
    waves = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (8000, 5000)]
    lengths = torch.tensor([len(wave) for wave in waves])
    rows = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    together = frozen_features(model, [Utterances([0, 1], rows, lengths)])
    alone = frozen_features(
        model,
        [Utterances([i], waves[i][None], lengths[i : i + 1]) for i in (1, 0)],
    )
    for number in (0, 1):
        assert together[number].shape == alone[number].shape
        torch.testing.assert_close(together[number], alone[number], rtol=1e-3, atol=1e-4)


def test_unknown_tasks(tmp_path: Path) -> None:
    assert tasks_named(["words", "phones"]) == (PHONES, WORDS)
    with pytest.raises(LowbitError, match="no task 'speech': choose among phones, letters"):
        tasks_named(["speech"])
