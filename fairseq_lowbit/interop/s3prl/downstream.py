"""s3prl's ``run_downstream`` with our upstream, in this process."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import s3prl
import torch
from s3prl import hub

from fairseq_lowbit.interop.s3prl.compat import (
    complete_huggingface_hub,
    missing_modules_named,
    stand_ins,
)

FOLDER = Path(s3prl.__file__).resolve().parent


def upstream_names() -> list[str]:
    """Upstreams that s3prl has, ours included."""
    return hub.options()


def run_downstream(arguments: Sequence[str]) -> None:
    """Runs s3prl's command line, in s3prl's folder, where its configurations name files from.

    Changes this process for good: its working directory, ``sys.argv``, what ``torch.load`` accepts,
    and s3prl replaces ``isinstance``. Call it last.

    Raises:
        LowbitError: what our upstream refuses; a module that the task needs and is not installed.
        SystemExit: what s3prl's own parser refuses.
    """
    complete_huggingface_hub()
    # s3prl keeps its command line in its checkpoints.
    torch.serialization.add_safe_globals([argparse.Namespace])
    os.chdir(FOLDER)
    sys.argv = ["fairseq-lowbit s3prl", *arguments]
    with stand_ins(), missing_modules_named():
        from s3prl.run_downstream import main

        main()
