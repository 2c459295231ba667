"""One run of ``fairseq-hydra-train`` in a process forked from one that has imported fairseq.

A fresh process spends four seconds on these imports; nothing else is saved. ``runpy`` runs this
file with ``JOB`` as a global: the arguments, the working folder, the log, more environment, and the
``accident`` that happens to it: the name of a function here and the count of the moment at which.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable

import torch
from fairseq_cli.hydra_train import cli_main

from fairseq_lowbit.plugin.processes import rank
from fairseq_lowbit.plugin.trainer import LowbitTrainer

HALF_OF_A_FILE = 10_000


def kill_while_copying(count: int) -> None:
    """Dies with half of a file copied, at the ``count``-th copy to checkpoint_last.pt."""
    copies = []

    def copy(source: object, target: object) -> None:
        copies.extend([target] if "checkpoint_last" in target.name else [])
        if len(copies) == count:
            target.write(source.read(HALF_OF_A_FILE))
            target.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        copy_whole(source, target)

    copy_whole, shutil.copyfileobj = shutil.copyfileobj, copy


def kill_while_saving(count: int) -> None:
    """Dies with half of a checkpoint written, at the ``count``-th one."""
    saves = []

    def save(state: dict, file: object) -> None:
        saves.append(file)
        if len(saves) == count:
            file.write(b"PK" * (HALF_OF_A_FILE // 2))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch_save(state, file)

    torch_save, torch.save = torch.save, save


def kill_in_update(count: int) -> None:
    """Dies in the optimizer's ``count``-th step, half of the parameters changed."""
    step = torch.optim.AdamW.step
    steps = []

    def half_a_step(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        steps.append(self)
        if len(steps) == count:
            for parameter in self.param_groups[0]["params"][::2]:
                parameter.data.add_(1.0)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = half_a_step


def signal_in_update(count: int, which: str = "SIGTERM") -> None:
    """A signal to the whole process group, as launchers send it, in the ``count``-th update."""
    step = torch.optim.AdamW.step
    steps = []

    def signalled(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        steps.append(self)
        if len(steps) == count:
            os.killpg(0, signal.Signals[which])
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = signalled


def signal_in_validation(count: int) -> None:
    """The same in the ``count``-th batch of validation."""
    valid_step = LowbitTrainer.valid_step
    batches = []

    def signalled(self: LowbitTrainer, *args: object, **kwargs: object) -> object:
        batches.append(self)
        if len(batches) == count:
            os.killpg(0, signal.SIGTERM)
        return valid_step(self, *args, **kwargs)

    LowbitTrainer.valid_step = signalled


def fill_disk(count: int) -> None:
    """No room for the ``count``-th checkpoint."""
    torch.save = _without_room(torch.save, count, lambda state, file: True)


def fill_disk_while_copying(count: int) -> None:
    """No room for the ``count``-th copy to checkpoint_last.pt."""
    shutil.copyfileobj = _without_room(
        shutil.copyfileobj, count, lambda source, file: "checkpoint_last" in file.name
    )


def _without_room(write: Callable, count: int, counts: Callable) -> Callable:
    calls = []

    def limited(source: object, file: object) -> None:
        calls.extend([file] if counts(source, file) else [])
        room = HALF_OF_A_FILE if len(calls) == count else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            write(source, file)
            file.flush()
        finally:
            # Else the log, which is longer, could not tell.
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    return limited


def poison_update(count: int) -> None:
    """One weight is not a number after the ``count``-th update."""
    step = torch.optim.AdamW.step
    steps = []

    def poisoned(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        done = step(self, *args, **kwargs)
        steps.append(self)
        if len(steps) == count:
            self.param_groups[0]["params"][3].data.view(-1)[0] = float("nan")
        return done

    torch.optim.AdamW.step = poisoned


def keep_weights(count: int) -> None:
    """Writes each process's weights into the run's folder, before its ``count``-th epoch."""
    begin_epoch = LowbitTrainer.begin_epoch

    def keep(self: LowbitTrainer, epoch: int) -> None:
        if epoch == count:
            torch.save(self.get_model().state_dict(), f"weights{rank()}.pt")
        begin_epoch(self, epoch)

    LowbitTrainer.begin_epoch = keep


def run(
    arguments: list[str],
    folder: str,
    log: str,
    accident: tuple | None,
    environment: dict[str, str],
) -> None:
    # A process group of its own, to which signals may be sent.
    os.setsid()
    os.environ.update(environment)
    # As in a fresh process: workers of a forkserver would outlive a killed run.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if accident is not None:
        name, *values = accident
        globals()[name](*values)
    sys.argv = ["fairseq-hydra-train", *arguments]
    cli_main()


if "JOB" in globals():
    run(**globals()["JOB"])
