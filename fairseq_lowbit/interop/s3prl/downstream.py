"""s3prl's ``run_downstream`` with our upstream, in this process."""

import argparse
import importlib
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


def run_downstream(arguments: Sequence[str], lists: Path | None = None) -> None:
    """Runs s3prl's command line, in s3prl's folder, where its configurations name files from.

    Changes this process for good: its working directory, ``sys.argv``, what ``torch.load`` accepts,
    and s3prl replaces ``isinstance``. Nothing but s3prl should be run afterwards.

    Args:
        lists: folder for the lists of files that the speaker tasks make. By default they are kept
            beside s3prl's code, and taken for those of any other corpus.

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

        keep_workers()
        if lists is not None:
            _keep_lists(lists)
        main()


def keep_workers() -> None:
    """Of the task ``ctc``: its first loader takes the number of workers out of the configuration,
    and the others would start 12 each."""
    data = importlib.import_module("s3prl.downstream.ctc.data")
    load = data.load_dataset
    data.load_dataset = lambda split, tokenizer, corpus: load(split, tokenizer, dict(corpus))


def _keep_lists(folder: Path) -> None:
    for task in ("voxceleb1", "sv_voxceleb1"):
        dataset = importlib.import_module(f"s3prl.downstream.{task}.dataset")
        dataset.__file__ = str(folder / "dataset.py")
        if hasattr(dataset, "CACHE_PATH"):
            dataset.CACHE_PATH = str(folder)


def write_emotion_lists(root: Path, test: str, train: Sequence[str], out: Path) -> None:
    """What emotion recognition is trained and tested on, by s3prl's own reading of IEMOCAP.

    Args:
        root: IEMOCAP.
        test, train: names of sessions.
        out: gets ``train_meta_data.json`` and ``test_meta_data.json``.
    """
    with stand_ins(), missing_modules_named():
        from s3prl.downstream.emotion.IEMOCAP_preprocess import preprocess

        out.mkdir(parents=True, exist_ok=True)
        for name, sessions in (("train", list(train)), ("test", [test])):
            preprocess(str(root), sessions, str(out / f"{name}_meta_data.json"))
