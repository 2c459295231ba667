"""How large a run is, in words, before it begins: its batch, its epochs, its end."""

from collections.abc import Iterator
from typing import Any

from fairseq.data.iterators import EpochBatchIterator
from torch import distributed

from fairseq_lowbit.plugin.dataset import SpeechDataset


def describe_scale(config: Any, batches: EpochBatchIterator, on_gpus: bool) -> Iterator[str]:
    """Sentences on the batch and the epochs of a run; none for data of fairseq's own tasks.

    Args:
        config: of the run, fairseq's whole.
        batches: of one process and one epoch of training.
        on_gpus: each process trains on a GPU.
    """
    dataset = batches.dataset
    if not isinstance(dataset, SpeechDataset):
        return
    rate, largest = config.task.sample_rate, config.dataset.max_tokens
    update_freq, planned = config.optimization.update_freq[0], config.optimization.max_update
    if largest:
        processes, seconds = _processes(), largest / rate
        total = processes * seconds * update_freq
        yield (
            f"{_kind(processes, on_gpus)} x {seconds:g} s of audio x update_freq {update_freq} = "
            f"{total:g} s of audio per update, at most"
        )
    updates = max(1, -(-len(batches) // update_freq))
    hours = dataset.sizes.sum() / rate / 3600
    told = f"{hours:.3g} h of audio per epoch, {updates} update{'s' * (updates > 1)}"
    if planned:
        epochs = planned / updates
        told += f": {planned} updates are {epochs:.3g} epochs, {epochs * hours:.3g} h"
    yield told


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _kind(processes: int, on_gpus: bool) -> str:
    kind, ending = ("GPU", "s") if on_gpus else ("process", "es")
    return f"{processes} {kind}{ending * (processes > 1)}"
