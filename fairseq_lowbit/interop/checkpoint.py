"""Checkpoint files as plain data: fairseq's ``.pt`` and this package's own safetensors."""

import argparse
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write, check_writable
from fairseq_lowbit.interop import own_file
from fairseq_lowbit.models import Architecture, Hubert, LoadedModel

CALIBRATED_ONLY = "is_calibrated_only"  # beside cfg and model: quantized without training


class _Dictionary:
    """Stands for fairseq's class of this name, which checkpoints of fairseq's own tasks hold; it
    takes up the labels and does nothing, so that fairseq need not be there."""


# All that a checkpoint may hold beside tensors and Python's own containers. None of it does
# anything when it is made. Numbers of numpy stand in what older fairseq wrote.
_ALLOWED = (
    argparse.Namespace,
    (_Dictionary, "fairseq.data.dictionary.Dictionary"),
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
    type(np.dtype(np.int64)),
)


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint as plain data, read without executing anything in it.

    Args:
        mmap: leave tensors on disk until they are used, for who only wants what stands beside
            them.

    Returns:
        fairseq's form, whatever the file's: ``cfg`` with a ``model`` section, ``model`` with the
        weights, ``optimizer_history``.

    Raises:
        LowbitError: the file is missing, truncated, of another kind, or holds objects that are
            not plain data.
    """
    path = Path(path)
    if path.is_dir():
        raise LowbitError(
            f"{path} is a folder without config.json, and so no model of Hugging Face: name a file "
            "in it, of a run checkpoints/checkpoint_best.pt"
        )
    if not path.is_file():
        raise LowbitError(f"checkpoint {path} does not exist")
    if path.suffix == own_file.SUFFIX:
        return own_file.read(path)
    state = load_pickled(path, mmap)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise LowbitError(
            f"checkpoint {path} is not a fairseq checkpoint with cfg and model; of a Hugging Face "
            "model name the folder that holds config.json"
        )
    state["cfg"] = _configuration(state, path)
    return state


def load_pickled(path: Path, mmap: bool = False) -> Any:
    """What ``torch.load`` finds in a file of plain data.

    Raises:
        LowbitError: the file is truncated, of another kind, or holds anything else.
    """
    try:
        with _only_allowed():
            # Files of before torch 1.6 cannot be mapped.
            mmap = mmap and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what torch.load raises for a file of noise is of many kinds
        raise LowbitError(f"checkpoint {path} {_what_is_wrong(error)}") from error


@contextmanager
def _only_allowed() -> Iterator[None]:
    """Lets ``torch.load`` make objects of the allowed classes only, whatever this process allows
    elsewhere.

    torch's own ``safe_globals`` would mix them with fairseq's real ones, and forget in the end that
    those had been allowed before.
    """
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(_ALLOWED))
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _configuration(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration with its ``model`` and ``task`` sections.

    Before its sections, fairseq kept every setting in one namespace, ``args``; and WavLM's
    checkpoints are of fairseq's form with one flat table.
    """
    config, args = state.get("cfg"), state.get("args")
    if isinstance(config, dict) and isinstance(config.get("model"), dict):
        return config
    if isinstance(config, dict) and "encoder_layers" in config:
        return {"model": {"_name": "wavlm", **config}, "task": config}
    if isinstance(args, argparse.Namespace):
        settings = vars(args)
        return {"model": {"_name": settings.get("arch"), **settings}, "task": settings}
    raise LowbitError(f"checkpoint {path} is not a fairseq checkpoint with cfg and model")


def updates_of(state: dict[str, Any]) -> int:
    """Training updates behind what :func:`read_checkpoint` read."""
    return int(_last_history(state).get("num_updates", 0))


def is_calibrated_only(state: dict[str, Any]) -> bool:
    """Whether what :func:`read_checkpoint` read was quantized without training."""
    # Version 0.1 left the optimizer's name empty instead.
    return state.get(CALIBRATED_ONLY, _last_history(state).get("optimizer_name") == "")


def _last_history(state: dict[str, Any]) -> dict[str, Any]:
    return (state.get("optimizer_history") or [{}])[-1]


def as_checkpoint(loaded: LoadedModel, data: Path | None = None) -> dict[str, Any]:
    """A model in the form of :func:`read_checkpoint`, which fairseq reads too.

    Args:
        data: folder of the manifests it belongs to, where tables find held-out audio.
    """
    model = loaded.model
    # A file is read where there may be no such device.
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    if not loaded.has_final_projection:
        weights = {k: v for k, v in weights.items() if not k.startswith("final_proj.")}
    name = "lowbit_asr" if loaded.units else "lowbit_distillation"
    task = {"_name": name, "normalize": loaded.normalize}
    if data is not None:
        task["data"] = str(data.absolute())
    return {
        "args": None,
        "cfg": {
            "model": {
                "_name": "lowbit_hubert",
                **{entry.name: getattr(model.shape, entry.name) for entry in fields(Architecture)},
                "precision": model.plan.precision.to_mapping(),
            },
            "task": task,
            # What fairseq's task looks up in other sections.
            "checkpoint": {"save_dir": "checkpoints"},
            "common": {"seed": 1},
            "dataset": {"train_subset": "train", "max_tokens": None},
        },
        "model": weights,
        "task_state": {"units": list(loaded.units)} if loaded.units else {},
        # What fairseq wants to find in any checkpoint, here of no training.
        "optimizer_history": [
            {"optimizer_name": None, "lr_scheduler_state": {}, "num_updates": loaded.updates}
        ],
        "extra_state": {"train_iterator": {"epoch": 1}},
        CALIBRATED_ONLY: loaded.is_calibrated_only,
    }


def write_model(path: str | Path, model: Hubert, source: LoadedModel, data: Path) -> None:
    """Writes ``model``, made from ``source`` by calibration, as a checkpoint that everything here
    reads: a teacher, a start for training, a row of a comparison. Replaces ``path`` at once or not
    at all.

    Args:
        path: ends in ``.safetensors`` for this package's own file; else it is fairseq's.
        data: folder of the manifests it was calibrated on.

    Raises:
        LowbitError: ``path`` cannot be written.
    """
    made = LoadedModel(
        model,
        str(path),
        source.updates,
        source.has_final_projection,
        source.normalize,
        is_calibrated_only=True,
        units=source.units,
    )
    state = as_checkpoint(made, data)
    teacher = Path(source.source)  # or an id of a hub
    state["cfg"]["task"]["teacher"] = str(teacher.absolute() if teacher.exists() else teacher)
    if Path(path).suffix == own_file.SUFFIX:
        own_file.write(path, state, model.plan)
        return
    with atomic_write(path, "wb") as file:
        torch.save(state, file)


def obstacle(model: Hubert) -> str:
    """Why ``model`` cannot be this package's own file: any model can."""
    return ""


def export(loaded: LoadedModel, out: Path) -> None:
    """Writes ``loaded`` as this package's own file, which needs neither fairseq nor the teacher.

    Raises:
        LowbitError: ``out`` cannot be written.
    """
    check_writable(out)
    own_file.write(out, as_checkpoint(loaded), loaded.model.plan)


def _what_is_wrong(error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"cannot be read safely: it holds {refused[1]}, which is not plain data"
    return f"is truncated, corrupt or another kind of file ({type(error).__name__})"
