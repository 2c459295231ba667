"""What the processes of one run do together. Alone, all of it costs nothing."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from fairseq_lowbit.errors import LowbitError

Value = TypeVar("Value")


class SharedError(LowbitError):
    """A mistake that every process of a run raises, so that one of them may say it for all."""


def rank() -> int:
    """Number of this process among those of its run, from 0; from the launcher's environment until
    torch.distributed is initialised."""
    if distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process speaks and writes for the run."""
    return rank() == 0


def gather(value: Value) -> list[Value]:
    """The ``value`` of every process, in the order of their ranks. Every process has to call it."""
    if not distributed.is_initialized():
        return [value]
    values: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def uses_gpus(common: Any) -> bool:
    """Whether a run trains on GPUs, as fairseq's trainer decides it.

    Args:
        common: that section of its configuration.
    """
    return torch.cuda.is_available() and not common.cpu


@contextmanager
def together() -> Iterator[None]:
    """Around work that every process does: a mistake that one meets stops all of them, so that
    none waits for it.

    Raises:
        SharedError: the mistake of the first process that met one.
    """
    mistake: LowbitError | None = None
    try:
        yield
    except LowbitError as error:
        mistake = error
    messages = gather(None if mistake is None else str(mistake))
    raise_shared(messages, mistake)


def raise_shared(messages: list[str | None], cause: BaseException | None = None) -> None:
    """Raises the first of the messages that :func:`gather` has brought, if there is any, and says
    which process it comes from unless all say the same."""
    said = [(number, message) for number, message in enumerate(messages) if message is not None]
    if not said:
        return
    number, message = said[0]
    alone = len(messages) > 1 and any(other != message for other in messages)
    raise SharedError(f"rank {number}: {message}" if alone else message) from cause


def refuse_different(what: str, read: Callable[[], object]) -> None:
    """Raises the same LowbitError on every process when ``read`` does not return the same on all.

    Args:
        what: it reads, in words.
    """
    if not distributed.is_initialized():
        return
    values = gather(read())
    others = [str(number) for number, value in enumerate(values) if value != values[0]]
    if others:
        raise SharedError(
            f"rank {', '.join(others)} and rank 0 have different {what}: give every process the "
            "same configuration and data, and one hydra.run.dir that all of them see"
        )


def part() -> None:
    """Before the processes exit by themselves: one whose threads for the others still run is now
    and then aborted by them. Every process has to call it."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


@torch.no_grad()
def share_weights(model: torch.nn.Module) -> None:
    """Gives every process the weights and buffers of the first."""
    if distributed.is_initialized():
        for tensor in (*model.parameters(), *model.buffers()):
            distributed.broadcast(tensor.data, 0)
