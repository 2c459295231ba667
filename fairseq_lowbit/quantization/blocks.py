"""Elementwise work on a CPU, block by block.

A chain of operations on a whole weight or activation writes every intermediate result to memory,
often to pages that the system has to clear first. In blocks that a cache holds, only the operands
and the result travel.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Values per thread, half a megabyte in fp32. With fewer, calls cost more than they save.
BLOCK = 2**17


def blocks(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """``first``, and the ``others`` as they broadcast to its shape, in parts (views) that belong
    together: of up to ``BLOCK`` values per thread, on devices other than CPUs one of everything."""
    block = BLOCK * torch.get_num_threads()
    if first.numel() <= block or not first.is_cpu:
        yield first, *others
        return
    length = block // first[0].numel()
    for start in range(0, len(first), length or 1):
        parts = (_part(tensor, first.dim(), start, length) for tensor in (first, *others))
        yield from blocks(*parts)


def _part(tensor: Tensor | None, dimensions: int, start: int, length: int) -> Tensor | None:
    """``length`` entries of the first of ``dimensions``; for 0 a single one, without it."""
    if tensor is None or tensor.dim() < dimensions:
        return tensor
    start = 0 if len(tensor) == 1 else start
    return tensor[start : start + length] if length else tensor[start]
