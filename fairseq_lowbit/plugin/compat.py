"""What fairseq needs on today's torch. Each mend says which failure it answers."""

import argparse
import os
import shutil

import torch
from fairseq.data import Dictionary
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

_BUFFER_BYTES = 16384


def apply() -> None:
    """Applies every mend once."""
    _allow_checkpoint_classes()
    _copy_atomically()
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


def _gather_on_cpu() -> None:
    # all_gather_list allocates CUDA buffers unless it finds buffers of its own.
    size = _BUFFER_BYTES * max(1, int(os.environ.get("WORLD_SIZE", "64")))
    distributed_utils.all_gather_list._buffer = torch.ByteTensor(size)
    distributed_utils.all_gather_list._cpu_buffer = torch.ByteTensor(_BUFFER_BYTES)
