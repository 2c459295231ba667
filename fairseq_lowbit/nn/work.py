"""What a module computes in one call, as the module itself states it: what profiling counts."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Steps(NamedTuple):
    """Frames (of a waveform, samples) that a module reads and writes in one call."""

    read: int
    written: int


class Work(NamedTuple):
    """A module's work in one call, or a part of it.

    Attributes:
        multiply_accumulates: of matrix products and convolutions.
        values: activations that it reads and writes, or the norm or activation function behind it
            if these are more.
        part: name of the part; empty for the whole module.
        operands: names of the attention operands that a product multiplies; empty where the
            module's own weight and input are multiplied, or nothing is.
    """

    multiply_accumulates: int
    values: int
    part: str = ""
    operands: tuple[str, ...] = ()


@runtime_checkable
class HasWork(Protocol):
    """A module that states its work.

    Attributes:
        input_features, output_features: values of one frame.
    """

    input_features: int
    output_features: int

    def work(self, steps: Steps) -> Sequence[Work]:
        """The work of one call on a single utterance."""


def modules_with_work(model: nn.Module) -> Iterator[tuple[str, HasWork]]:
    """(name, module) of every module that states its work, in model order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, HasWork))


@torch.no_grad()
def recorded_steps(model: nn.Module, run: Callable[[], object]) -> dict[str, list[Steps]]:
    """The steps of every call of a module that states its work while ``run`` runs, by name. Modules
    that are not called are left out."""
    steps: dict[str, list[Steps]] = {}

    def record(name: str, module: HasWork):
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            read = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            written = output if isinstance(output, Tensor) else output[0]
            call = Steps(
                read.numel() // module.input_features, written.numel() // module.output_features
            )
            steps.setdefault(name, []).append(call)

        return module.register_forward_hook(hook, with_kwargs=True)

    handles = [record(name, module) for name, module in modules_with_work(model)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return steps
