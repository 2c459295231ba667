"""What fairseq needs on today's torch. Each mend says which failure it answers."""

import argparse
import logging
import os
import pickle
import shutil
from functools import wraps
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq_cli import train as fairseq_train

from fairseq_lowbit.errors import LowbitError

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 16384


def apply() -> None:
    """Applies every mend once."""
    _allow_checkpoint_classes()
    _copy_atomically()
    _explain_broken_checkpoints()
    _leave_finished_runs_alone()
    if not torch.cuda.is_available():
        _gather_on_cpu()


def _allow_checkpoint_classes() -> None:
    # torch >= 2.6 loads plain data only; fairseq stores these two classes beside it.
    torch.serialization.add_safe_globals([Dictionary, argparse.Namespace])


def _copy_atomically() -> None:
    # fairseq writes one checkpoint atomically, then copies it over checkpoint_last.pt in place:
    # killed there, a run could not resume.
    def copy(src: str, dst: str, overwrite: bool = False) -> bool:
        if os.path.exists(dst) and not overwrite:
            return False
        temporary = f"{dst}.tmp"
        shutil.copyfile(src, temporary)
        os.replace(temporary, dst)
        return True

    PathManager.copy = staticmethod(copy)


def _explain_broken_checkpoints() -> None:
    # Resuming from a damaged file would end in torch's own words, which do not name it.
    load = checkpoint_utils.load_checkpoint_to_cpu

    @wraps(load)
    def explain(path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return load(path, *args, **kwargs)
        except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise LowbitError(
                f"checkpoint {os.path.abspath(path)} is truncated or corrupt "
                f"({type(error).__name__}). Copy another checkpoint of its folder over it to go on "
                "from there, or delete it to start anew"
            ) from error

    checkpoint_utils.load_checkpoint_to_cpu = explain


def _leave_finished_runs_alone() -> None:
    # Started again, a finished run would make one more update and save it.
    train_epoch = fairseq_train.train

    @wraps(train_epoch)
    def train(cfg: Any, trainer: Any, *args: Any) -> tuple[list[float | None], bool]:
        last = cfg.optimization.max_update
        if last and trainer.get_num_updates() >= last:
            logger.info(f"this run has made its {last} updates; raise optimization.max_update")
            return [None], True
        return train_epoch(cfg, trainer, *args)

    fairseq_train.train = train


def _gather_on_cpu() -> None:
    # all_gather_list allocates CUDA buffers unless it finds buffers of its own.
    size = _BUFFER_BYTES * max(1, int(os.environ.get("WORLD_SIZE", "64")))
    distributed_utils.all_gather_list._buffer = torch.ByteTensor(size)
    distributed_utils.all_gather_list._cpu_buffer = torch.ByteTensor(_BUFFER_BYTES)
