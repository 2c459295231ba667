"""What the processes of one run do together. Alone, all of it costs nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.plugin.dataset import SpeechDataset
from fairseq_lowbit.precision import Plan

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


def refuse_different_data(split: str, dataset: SpeechDataset) -> None:
    """Raises the same LowbitError on every process when not all have the same files and labels.

    Where they lie may differ from machine to machine.
    """
    if not distributed.is_initialized():
        return
    manifest = dataset.manifest
    held = gather(
        {
            f"{len(manifest)} files": manifest.digest(),
            **{f"labels {label.path.suffix}": label.digest() for label in dataset.labels},
        }
    )
    others = [str(number) for number, data in enumerate(held) if data != held[0]]
    if others:
        raise SharedError(
            f"split {split}: rank {', '.join(others)} and rank 0 have different data: "
            f"{_difference(held)} ({manifest.path}). Give every process the same manifests and "
            "labels"
        )


def refuse_different_models(plan: Plan, folder: Path) -> None:
    """Raises the same LowbitError on every process when not all train the same model into
    ``folder``: some of them may not see which stages of a schedule are finished."""
    held = gather((plan.to_mapping(), folder.name))
    others = [str(number) for number, own in enumerate(held) if own != held[0]]
    if others:
        other = next(own for own in held if own != held[0])
        names = [f"{model['precision']['name']} in {name}" for model, name in (other, held[0])]
        raise SharedError(
            f"rank {', '.join(others)} and rank 0 train different models ({' and '.join(names)}): "
            "give every process the same configuration, and one hydra.run.dir that all of them see"
        )


def _difference(held: list[dict[str, str]]) -> str:
    other = next(data for data in held if data != held[0])
    what = [name for name in other if held[0].get(name) != other[name]]
    if what[0] in held[0]:
        return f"their {what[0]} differ in content"
    return f"{what[0]} instead of {next(iter(held[0]))}"


@torch.no_grad()
def share_weights(model: torch.nn.Module) -> None:
    """Gives every process the weights and buffers of the first."""
    if distributed.is_initialized():
        for tensor in (*model.parameters(), *model.buffers()):
            distributed.broadcast(tensor.data, 0)
