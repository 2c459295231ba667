"""This package's own file: a model in one safetensors file, with its configuration and its plan.

The header's metadata, which are strings, hold JSON: ``checkpoint`` is what a fairseq checkpoint has
beside the weights, as far as it describes the model, and ``plan`` is the resolved precision, one
entry per module, for readers other than this package. The tensors are the state dict.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.precision import Plan

SUFFIX = ".safetensors"
FORMAT, VERSION = "fairseq_lowbit", 1


def read(path: Path) -> dict[str, Any]:
    """The file in the form of :func:`fairseq_lowbit.interop.checkpoint.read_checkpoint`.

    Raises:
        LowbitError: the file is truncated, of another kind, or of a later version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LowbitError(
            f"{path} is truncated, corrupt or another kind of file: {error}"
        ) from error
    if header.get("format") != FORMAT:
        raise LowbitError(
            f"{path} was not written by this package: of a Hugging Face model name the folder that "
            "holds config.json"
        )
    try:
        version = int(header["version"])
        described = json.loads(header["checkpoint"]) if version <= VERSION else {}
    except (KeyError, ValueError) as error:
        raise LowbitError(
            f"{path} has a header that cannot be read ({type(error).__name__}: {error}): export "
            "the model again"
        ) from error
    if version > VERSION:
        raise LowbitError(
            f"{path} has version {version} of its format, and this package reads up to {VERSION}: "
            "update fairseq_lowbit"
        )
    return {**described, "model": weights}


def write(path: str | Path, state: dict[str, Any], plan: Plan) -> None:
    """Writes what :func:`fairseq_lowbit.interop.checkpoint.as_checkpoint` gives.

    Raises:
        LowbitError: ``path`` cannot be written.
    """
    described = {key: value for key, value in state.items() if key != "model"}
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "checkpoint": json.dumps(described),
        "plan": json.dumps(plan.to_mapping()),
    }
    # Shared and strided tensors have no place in the format.
    weights = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state["model"].items()
    }
    with atomic_write(path, "wb") as file:
        save_file(weights, file.name, header)
