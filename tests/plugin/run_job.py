"""One run of ``fairseq-hydra-train`` in a process forked from one that has imported fairseq.

A fresh process spends four seconds on these imports; nothing else is saved. ``runpy`` runs this
file with ``JOB`` as a global: the arguments, the working folder, the log, and ``kill``, the name of
a moment at which the process ends as by ``kill -9``.
"""

import builtins
import multiprocessing
import os
import shutil
import signal
import sys

import torch
from fairseq_cli.hydra_train import cli_main

HALF_OF_A_FILE = 10_000


def kill_while_copying(count: int) -> None:
    """Dies with half of a file copied, at the ``count``-th copy to checkpoint_last.pt."""
    copies = []

    def copy(source: str, target: str) -> None:
        copies.extend([target] if "checkpoint_last" in target else [])
        if len(copies) == count:
            with open(source, "rb") as whole, open(target, "wb") as part:
                part.write(whole.read(HALF_OF_A_FILE))
            os.kill(os.getpid(), signal.SIGKILL)
        shutil_copyfile(source, target)

    shutil_copyfile, shutil.copyfile = shutil.copyfile, copy


def kill_while_saving(count: int) -> None:
    """Dies with half of a checkpoint written, at the ``count``-th one."""
    saves = []

    def save(state: dict, file: builtins.object) -> None:
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


def run(arguments: list[str], folder: str, log: str, kill: tuple[str, int] | None) -> None:
    # As in a fresh process: workers of a forkserver would outlive a killed run.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if kill is not None:
        globals()[f"kill_{kill[0]}"](kill[1])
    sys.argv = ["fairseq-hydra-train", *arguments]
    cli_main()


if "JOB" in globals():
    run(**globals()["JOB"])
