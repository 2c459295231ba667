"""What configurations ask of a machine, ${fairseq_lowbit.gpus:8}, and the batch that they keep on
any number of processes, ${fairseq_lowbit.update_freq:...}.

Like its neighbour, Hydra imports this file at the start of every Hydra program: nothing heavy here.
"""

import os

from omegaconf import OmegaConf

_TOLERANCE = 1e-6  # of a quotient of decimal numbers


def update_freq(
    seconds: float | None, sample_rate: int, max_tokens: int | None, processes: int
) -> int:
    """Batches that each process sums up before it makes an update.

    Args:
        seconds: of audio in an update, all processes together.
        sample_rate: samples per second.
        max_tokens: samples in one batch of one process.
        processes: number of them.

    Raises:
        ValueError: that is no whole number of batches.
    """
    if not (seconds and max_tokens):
        raise ValueError(
            "without both task.seconds_per_update and dataset.max_tokens give "
            "optimization.update_freq=[N], the batches that every process sums up for an update"
        )
    together = max_tokens / sample_rate * processes
    count = round(seconds / together)
    if count < 1 or abs(count * together - seconds) > _TOLERANCE * seconds:
        raise ValueError(
            f"task.seconds_per_update={seconds:g} is no whole number of batches of "
            f"{max_tokens / sample_rate:g} s (dataset.max_tokens={max_tokens}) times {processes} "
            f"(distributed_training.distributed_world_size): change one of them, or give "
            "optimization.update_freq=[N] itself"
        )
    return count


def gpus(wanted: int) -> int:
    """``wanted``, where there are so many GPUs for the processes that this machine starts.

    Raises:
        ValueError: there are fewer; torchrun has started another number of processes.
    """
    import torch  # heavy, and every Hydra program of the environment comes by here

    started = int(os.environ.get("WORLD_SIZE", wanted))
    if started != wanted:
        raise ValueError(
            f"torchrun has started {started} processes, and run= asks for {wanted}: give it "
            f"distributed_training.distributed_world_size={started}"
        )
    here, found = int(os.environ.get("LOCAL_WORLD_SIZE", wanted)), torch.cuda.device_count()
    if found < here:
        raise ValueError(
            f"run= asks for {here} GPU{'s' * (here > 1)} and this machine has {found or 'none'}: "
            f"choose another run=, such as run=local, or set "
            "distributed_training.distributed_world_size"
        )
    return wanted


OmegaConf.register_new_resolver("fairseq_lowbit.update_freq", update_freq, replace=True)
OmegaConf.register_new_resolver("fairseq_lowbit.gpus", gpus, replace=True)
