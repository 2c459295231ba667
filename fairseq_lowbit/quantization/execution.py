"""How the formulas are executed: on whole tensors, in blocks on a CPU, or compiled.

A formula is a function of a level set and of tensors, whose last ones it fills in or adds to. Every
executor calls the same formulas, so all give the same integers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.quantization.levels import LevelSet

Formula = Callable[..., None]
# Values per thread, half a megabyte in fp32. With fewer, calls cost more than they save.
BLOCK = 2**17


def run_whole(formula: Formula, levels: LevelSet, *tensors: Tensor | None) -> None:
    """One call on whole tensors."""
    formula(levels, *tensors)


def run_in_blocks(formula: Formula, levels: LevelSet, *tensors: Tensor | None) -> None:
    """On a CPU a call per block, on other devices one. A chain of operations on a whole weight or
    activation writes every intermediate result to memory, often to pages that the system has to
    clear first; in blocks that a cache holds, only the operands and the result travel."""
    for part in blocks(*tensors):
        formula(levels, *part)


def run_compiled(formula: Formula, levels: LevelSet, *tensors: Tensor | None) -> None:
    """One call of the formula compiled by ``torch.compile``, which fuses its operations."""
    _compiled(formula, levels)(*tensors)


EXECUTORS = {"whole": run_whole, "blocks": run_in_blocks, "compiled": run_compiled}
_chosen = "blocks"


def run(formula: Formula, levels: LevelSet, *tensors: Tensor | None) -> None:
    """Runs a formula by the executor in use, ``blocks`` unless :func:`use_executor` says otherwise.

    Args:
        tensors: the first one has the shape that all others broadcast to.
    """
    # Inside of what is compiled as a whole the compiler decides.
    chosen = "whole" if torch.compiler.is_compiling() else _chosen
    EXECUTORS[chosen](formula, levels, *tensors)


@contextmanager
def use_executor(name: str) -> Iterator[None]:
    """Has every quantizer compute by another executor inside the block.

    Args:
        name: ``whole``, ``blocks`` or ``compiled``; the last needs a compiler at run time.

    Raises:
        LowbitError: an unknown name.
    """
    global _chosen
    if name not in EXECUTORS:
        raise LowbitError(f"executor {name!r}; allowed are {', '.join(EXECUTORS)}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


@cache
def _compiled(formula: Formula, levels: LevelSet) -> Callable[..., None]:
    def call(*tensors: Tensor | None) -> None:
        formula(levels, *tensors)

    return torch.compile(call, dynamic=True)


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
