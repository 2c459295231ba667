"""Which of many models are worth their cost."""

import math
from collections.abc import Sequence


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """The points that no other point beats: cheaper and no worse, or better and no dearer.

    Args:
        costs: less is better.
        qualities: more is better; one for each cost.

    Returns:
        indices, cheapest first; equal points stand or fall together. A point with a value that is
        not a number is on no front.

    >>> pareto_front([1, 2, 2, 3], [0.5, 0.9, 0.8, 0.9])
    [0, 1]
    """
    known = [i for i, pair in enumerate(zip(costs, qualities, strict=True)) if not _has_nan(pair)]
    front: list[int] = []
    for index in sorted(known, key=lambda i: (costs[i], -qualities[i])):
        point = costs[index], qualities[index]
        last = (costs[front[-1]], qualities[front[-1]]) if front else None
        if last is None or point == last or point[1] > last[1]:
            front.append(index)
    return front


def _has_nan(pair: tuple[float, float]) -> bool:
    return any(math.isnan(value) for value in pair)
