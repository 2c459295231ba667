"""What fairseq needs on today's torch. Each fix says which failure it answers."""

import argparse
import logging
import multiprocessing.util
import os
import pickle
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import IO, Any

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.logging import progress_bar
from fairseq_cli import train
from omegaconf import DictConfig
from torch.multiprocessing import ProcessExitedException

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import writing
from fairseq_lowbit.plugin import interruption, register
from fairseq_lowbit.plugin.processes import part, uses_gpus

_BUFFER_BYTES = 16384
_CPU_BACKENDS = ("legacy_ddp", "no_c10d")
# What torchrun leaves for the processes it starts.
_LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


def apply() -> None:
    """Applies every fix once."""
    _allow_checkpoint_classes()
    _save_whole_files()
    _explain_broken_checkpoints()
    _explain_tensorboard_failures()
    _close_tensorboard_writers()
    _log_no_configuration()
    _launch_processes()


def _allow_checkpoint_classes() -> None:
    # torch >= 2.6 loads plain data only; fairseq stores these two classes beside it.
    torch.serialization.add_safe_globals([Dictionary, argparse.Namespace])


def _save_whole_files() -> None:
    # fairseq tries a failed write again behind the half that it wrote, and copies one checkpoint
    # over checkpoint_last.pt in place: a full disk or a kill there would leave neither.
    save_in_place = checkpoint_utils.torch_persistent_save

    def save(state: Any, filename: str, async_write: bool = False) -> None:
        if async_write or not PathManager.supports_rename(filename):
            save_in_place(state, filename, async_write)
            return
        with _replacing(filename) as file:
            torch.save(state, file)

    def copy(src: str, dst: str, overwrite: bool = False) -> bool:
        if os.path.exists(dst) and not overwrite:
            return False
        with open(src, "rb") as source, _replacing(dst) as file:
            shutil.copyfileobj(source, file)
        return True

    checkpoint_utils.torch_persistent_save = save
    PathManager.copy = staticmethod(copy)


@contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A neighbour of ``path`` that takes its place once it is on the disk."""
    temporary = f"{path}.tmp"
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise


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


def _explain_tensorboard_failures() -> None:
    # On a full disk the writer's thread dies, and the next events wait for it for ever.
    log = progress_bar.TensorboardProgressBarWrapper._log_to_tensorboard

    @wraps(log)
    def explained(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            with writing(self.tensorboard_logdir):
                log(self, *args, **kwargs)
        except LowbitError:
            # They would try again, with a traceback each, when the interpreter ends.
            for writer in progress_bar._tensorboard_writers.values():
                for file in getattr(writer, "all_writers", {}).values():
                    file.event_writer._closed = True
            progress_bar._tensorboard_writers.clear()
            raise

    progress_bar.TensorboardProgressBarWrapper._log_to_tensorboard = explained


def _close_tensorboard_writers() -> None:
    # fairseq closes them when the interpreter ends, which spawned processes end without: their
    # threads would lose the last events and print tracebacks.
    multiprocessing.util.Finalize(None, progress_bar._close_writers, exitpriority=100)


def _log_no_configuration() -> None:
    # fairseq logs it as one line of thousands of characters; Hydra keeps it in .hydra/config.yaml.
    def is_readable(record: logging.LogRecord) -> bool:
        return not (isinstance(record.msg, DictConfig) and "job_logging_cfg" in record.msg)

    train.logger.addFilter(is_readable)


def _launch_processes() -> None:
    # The stages of a schedule share their process group, of which fairseq warns.
    warnings.filterwarnings("ignore", message="Distributed is already initialized")
    # fairseq spawns a process per device and waits. The signal of a cluster, sent to the one that
    # waits, would end it and with it the others before they have saved. On CPUs it spawns none.
    call_main = distributed_utils.call_main

    @wraps(call_main)
    def launch(cfg: Any, main: Any, **kwargs: Any) -> None:
        training = cfg.distributed_training
        spawn, infer = call_main, distributed_utils.infer_init_method
        if not uses_gpus(cfg.common):
            spawn, infer = _spawn_on_cpu, infer_on_cpu
            _gather_on_cpu()
        if training.distributed_init_method is None:
            infer(training)
        if training.distributed_init_method is None or training.distributed_no_spawn:
            call_main(cfg, main, **kwargs)
            return
        try:
            with interruption.forwarding():
                spawn(cfg, main, **kwargs)
        except ProcessExitedException as error:
            if error.exit_code != interruption.STOPPED:
                raise
            interruption.leave()

    distributed_utils.call_main = launch


def _spawn_on_cpu(cfg: Any, main: Any, **kwargs: Any) -> None:
    training = cfg.distributed_training
    count, first = training.distributed_world_size, training.distributed_rank
    training.distributed_rank = None  # distributed_main counts on from the first
    # As torchrun does: with all cores for each, the processes would be in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    arguments = (main, cfg, {**kwargs, "start_rank": first})
    torch.multiprocessing.spawn(_train_and_part, arguments, nprocs=count)


def _train_and_part(index: int, main: Any, cfg: Any, kwargs: dict[str, Any]) -> None:
    # To find this function, the new process has imported the package before fairseq could by its
    # user directory, which then registers nothing.
    register()
    _gather_on_cpu()
    distributed_utils.distributed_main(index, main, cfg, kwargs)
    part()


def infer_on_cpu(training: Any) -> None:
    """fairseq's ``infer_init_method`` for a run on CPUs: that one divides the ranks among GPUs, by
    zero where there are none.

    Args:
        training: the section ``distributed_training``, which is filled in.

    Raises:
        LowbitError: a backend that needs GPUs; SLURM is to start one process of several.
    """
    if training.distributed_init_method is not None or training.distributed_world_size == 1:
        return
    if training.ddp_backend not in _CPU_BACKENDS:
        raise LowbitError(
            f"distributed_training.ddp_backend {training.ddp_backend} needs GPUs; on CPUs set "
            f"{_CPU_BACKENDS[0]}"
        )
    training.distributed_backend = "gloo"
    if all(key in os.environ for key in _LAUNCHER):
        training.distributed_init_method = "env://"
        training.distributed_world_size = int(os.environ["WORLD_SIZE"])
        training.distributed_rank = int(os.environ["RANK"])
        training.distributed_no_spawn = True
    elif training.distributed_port > 0 and distributed_utils._infer_slurm_init(training, None):
        if not training.distributed_no_spawn:
            raise LowbitError(
                "on CPUs SLURM has to start every process: give sbatch or srun "
                "--ntasks-per-node with the number of processes of each node"
            )
    else:
        training.distributed_init_method = f"tcp://127.0.0.1:{_free_port()}"
    training.device_id = 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _gather_on_cpu() -> None:
    # all_gather_list allocates CUDA buffers unless it finds buffers of its own.
    size = _BUFFER_BYTES * max(1, int(os.environ.get("WORLD_SIZE", "64")))
    distributed_utils.all_gather_list._buffer = torch.ByteTensor(size)
    distributed_utils.all_gather_list._cpu_buffer = torch.ByteTensor(_BUFFER_BYTES)
