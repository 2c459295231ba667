"""Whether two ways to train differ beyond chance, from what probes have measured of runs."""

from collections.abc import Sequence

import pytest

from fairseq_lowbit.evaluation.probing.result import Probe
from fairseq_lowbit.runs.collection import Entry
from fairseq_lowbit.runs.pairs import find_pairs
from fairseq_lowbit.runs.tables import pair_markdown
from tests.runs.test_schedules import ORIGINAL, entry

RECORDINGS = 40


def probe(errors: Sequence[float]) -> Probe:
    speakers = tuple(f"s{index % 8}" for index in range(RECORDINGS))
    return Probe(tuple(errors), (10,) * RECORDINGS, speakers, (0.0,), (1.0,))


def measured(mean: float, loss: str, seed: int = 1, stages: tuple = (), **more: object) -> Entry:
    """A run of BiT-LA W1A1 with so many phones wrong in each recording of ten, more or less."""
    errors = [mean + 0.5 * (-1) ** index for index in range(RECORDINGS)]
    found = entry("w1a1", 1.0, seed, stages, loss=loss, **more)
    found.quality.own.probes = {"phone_error": probe(errors)}
    return found


def test_what_is_the_same_in_every_recording_is_beyond_chance() -> None:
    runs = [measured(mean, loss) for mean, loss in ((4.0, "distillation"), (5.0, "hubert"))]
    (pair,) = find_pairs(runs[::-1])
    assert (pair.precision, pair.other, pair.paper) == ("bitla_w1a1", "hubert", (15.96, 18.93))
    assert [rate.value for rate in pair.rates] == pytest.approx([0.4, 0.5])
    assert pair.difference.interval.value == pytest.approx(-0.1)
    assert pair.difference.is_beyond_chance
    # The speakers differ, and the bootstrap knows; what both models have in common cancels.
    rates = "40.0 (36.2 to 43.8) | 50.0 (46.2 to 53.8) | -10.0 (-10.0 to -10.0) | -10.0"
    line = f"| bitla_w1a1 | hubert | phone error % | {rates} | yes | 15.96 18.93 |"
    assert line in pair_markdown([pair])


def test_what_depends_on_the_recording_is_not() -> None:
    usual, other = measured(4.0, "distillation"), measured(4.0, "hubert")
    errors = [8.0 if index % 8 == 0 else 4.0 for index in range(RECORDINGS)]  # one speaker's
    other.quality.own.probes = {"phone_error": probe(errors)}
    (pair,) = find_pairs([usual, other])
    assert pair.difference.interval.value < 0
    assert not pair.difference.is_beyond_chance


def test_seeds_that_contradict_each_other() -> None:
    """However sure each of them is."""
    means = {("distillation", 1): 4.0, ("hubert", 1): 6.0, ("distillation", 2): 5.0}
    runs = [measured(mean, *which) for which, mean in means.items()]
    (pair,) = find_pairs(runs)
    assert pair.difference.by_seed == pytest.approx([-0.2])  # only one seed has both
    (pair,) = find_pairs([*runs, measured(4.0, "hubert", 2)])
    assert pair.difference.by_seed == pytest.approx([-0.2, 0.1])
    assert pair.difference.interval.value == pytest.approx(-0.05)
    assert pair.difference.interval.excludes_zero
    assert not pair.difference.is_beyond_chance


def test_schedules_of_as_many_updates() -> None:
    usual = measured(4.0, "distillation")
    (pair,) = find_pairs([usual, measured(5.0, "distillation", 1, ORIGINAL)])
    assert pair.other == "w8a8 > w2a2 > w1a1 (original)"
    assert pair.paper == (15.96, None)
    assert find_pairs([usual, measured(5.0, "distillation", 1, ORIGINAL[1:])]) == []


@pytest.mark.parametrize(
    "more",
    [
        {"teacher": None},
        {"precision": "bitl_w1a1"},
        {"rules": 1},
        {"is_finished": False},
        {"planned": 90},
    ],
)
def test_runs_that_make_no_pair(more: dict) -> None:
    other = measured(5.0, "hubert", **more)
    assert find_pairs([measured(4.0, "distillation"), other]) == []


def test_runs_that_differ_in_something_else() -> None:
    """Two of one seed: which of them would be compared?"""
    runs = [measured(mean, "hubert") for mean in (5.0, 6.0)]
    assert find_pairs([measured(4.0, "distillation"), *runs]) == []
