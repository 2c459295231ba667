"""The Pareto front."""

import math

import pytest

from fairseq_lowbit.report.overview.choice import pareto_front


@pytest.mark.parametrize(
    "costs, qualities, front",
    [
        ([], [], []),
        ([3.0], [0.1], [0]),
        # Cheapest first, whatever the order; what is dearer and worse is not on it.
        ([3, 1, 2, 4], [0.9, 0.2, 0.6, 0.8], [1, 2, 0]),
        # As good for more, or worse for as much, is beaten.
        ([1, 2, 1], [0.5, 0.5, 0.4], [0]),
        # Equal points beat nobody and are beaten by nobody.
        ([1, 1, 2], [0.5, 0.5, 0.7], [0, 1, 2]),
        ([2, 2, 1], [0.7, 0.7, 0.9], [2]),
        ([1, 2], [-math.inf, 0.1], [0, 1]),
    ],
)
def test_front(costs: list[float], qualities: list[float], front: list[int]) -> None:
    assert pareto_front(costs, qualities) == front


def test_every_point_is_beaten_or_on_the_front() -> None:
    costs = [(7 * i) % 11 for i in range(40)]
    qualities = [(5 * i) % 13 for i in range(40)]
    found = pareto_front(costs, qualities)

    def is_beaten(i: int) -> bool:
        return any(
            costs[j] <= costs[i]
            and qualities[j] >= qualities[i]
            and (costs[j], qualities[j]) != (costs[i], qualities[i])
            for j in range(40)
        )

    assert sorted(found) == [i for i in range(40) if not is_beaten(i)]


def test_one_quality_for_each_cost() -> None:
    with pytest.raises(ValueError):
        pareto_front([1, 2], [1])
