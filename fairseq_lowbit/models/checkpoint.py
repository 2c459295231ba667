"""Reading checkpoints back into models, with messages that name what is wrong."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_write
from fairseq_lowbit.models.architecture import Architecture
from fairseq_lowbit.models.model import Hubert, WithoutWeights
from fairseq_lowbit.nn import float_state, forget_calibration
from fairseq_lowbit.precision import Precision

StateDict = dict[str, Tensor]
_LABELS = "label_embs_concat"
# Of fairseq and of this package; a converted checkpoint may have none.
_HUBERT_NAMES = ("hubert", "hubert_fastconv", "lowbit_hubert", None)
_CALIBRATED_ONLY = "is_calibrated_only"  # beside cfg and model: quantized without training


class _Dictionary:
    """Stands for fairseq's class of this name, which checkpoints of fairseq's own tasks hold; it
    takes up the labels and does nothing, so that fairseq need not be there."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and the checkpoint it came from.

    Attributes:
        updates: training updates behind it.
        has_final_projection: False when the checkpoint has no ``final_proj`` (a fine-tuned or
            converted teacher); the model's own is then untrained.
        normalize: whether it was trained on utterances of zero mean and unit variance.
        is_calibrated_only: written by :func:`write_model`, quantized without training.
    """

    model: Hubert
    path: Path
    updates: int
    has_final_projection: bool
    normalize: bool
    is_calibrated_only: bool = False


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """A fairseq checkpoint as plain data, read without executing anything in it.

    Args:
        mmap: leave tensors on disk until they are used, for who only wants what stands beside
            them.

    Raises:
        LowbitError: the file is missing, truncated, of another kind, or holds objects that are
            not plain data.
    """
    path = Path(path)
    if path.is_dir():
        raise LowbitError(
            f"checkpoint {path} is a folder: name a file in it, of a run "
            f"{path / 'checkpoints' / 'checkpoint_best.pt'}"
        )
    if not path.is_file():
        raise LowbitError(f"checkpoint {path} does not exist")
    try:
        with _only_allowed(argparse.Namespace, (_Dictionary, "fairseq.data.dictionary.Dictionary")):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what torch.load raises for a file of noise is of many kinds
        raise LowbitError(f"checkpoint {path} {_what_is_wrong(error)}") from error
    if not _is_fairseq(state):
        raise LowbitError(f"checkpoint {path} is not a fairseq checkpoint with cfg and model")
    return state


@contextmanager
def _only_allowed(*classes: type | tuple[type, str]) -> Iterator[None]:
    """Lets ``torch.load`` make objects of ``classes`` only, whatever this process allows elsewhere.

    torch's own ``safe_globals`` would mix them with fairseq's real ones, and forget in the end that
    those had been allowed before.
    """
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(classes))
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def load_model(path: str | Path) -> LoadedModel:
    """Loads a checkpoint at its own shape and precision, in eval mode.

    Raises:
        LowbitError: see :func:`read_checkpoint`; another kind of model, or weights that do not fit
            the checkpoint's own configuration.
    """
    state = read_checkpoint(path)
    model, weights = _build(state, path)
    model.load_state_dict(weights)
    has_final_projection = "final_proj.weight" in state["model"]
    normalize = bool((state["cfg"].get("task") or {}).get("normalize", False))
    return LoadedModel(
        model.eval(),
        Path(path),
        updates_of(state),
        has_final_projection,
        normalize,
        is_calibrated_only(state),
    )


def load_without_weights(path: str | Path) -> Hubert:
    """A checkpoint's model on the meta device, for who wants its shape, plan and cost only.

    Raises:
        LowbitError: see :func:`load_model`.
    """
    with WithoutWeights():
        return _build(read_checkpoint(path, mmap=True), path)[0]


def _build(state: dict[str, Any], path: str | Path) -> tuple[Hubert, StateDict]:
    """The model that a checkpoint asks for, and the weights that fit it."""
    weights: StateDict = state["model"]
    config = dict(state["cfg"]["model"])
    if config.get("_name") not in _HUBERT_NAMES:
        raise LowbitError(f"checkpoint {path} holds a {config['_name']}, not a HuBERT")
    precision = config.get("precision")
    model = Hubert(
        Architecture.from_mapping(config),
        len(weights.get(_LABELS, ())),
        Precision.from_mapping(precision) if precision else None,
    )
    if "final_proj.weight" not in weights:
        weights = {**weights, **model.final_proj.state_dict(prefix="final_proj.")}
    differing = _differences(model.state_dict(), weights)
    if differing:
        raise LowbitError(
            f"checkpoint {path} holds weights of another shape than its own configuration: "
            f"{differing}"
        )
    return model, weights


def updates_of(state: dict[str, Any]) -> int:
    """Training updates behind what :func:`read_checkpoint` read."""
    return int(_last_history(state).get("num_updates", 0))


def is_calibrated_only(state: dict[str, Any]) -> bool:
    """Whether what :func:`read_checkpoint` read was written by :func:`write_model`."""
    # Version 0.1 left the optimizer's name empty instead.
    return state.get(_CALIBRATED_ONLY, _last_history(state).get("optimizer_name") == "")


def _last_history(state: dict[str, Any]) -> dict[str, Any]:
    return (state.get("optimizer_history") or [{}])[-1]


def start_from(model: Hubert, source: LoadedModel, role: str = "init_from") -> None:
    """Copies ``source``'s weights into ``model``, whose precision may differ.

    Quantizers are left out: scales belong to a bit width and are calibrated anew; squashed weights
    arrive as the float weights they stand for. Label embeddings that either side lacks are left out
    too.

    Raises:
        LowbitError: the shapes differ, with the first differing tensors.
    """
    state = float_state(source.model)
    weights = {k: v for k, v in state.items() if not _is_optional(k)}
    own = {k: v for k, v in model.state_dict().items() if not _is_optional(k)}
    _check_names_and_shapes(own, weights, f"{role} {source.path}")
    labels = state.get(_LABELS)
    if labels is not None and model.state_dict().get(_LABELS, labels[:0]).shape == labels.shape:
        weights[_LABELS] = labels
    model.load_state_dict(weights, strict=False)
    forget_calibration(model)


def write_model(path: str | Path, model: Hubert, source: LoadedModel, data: Path) -> None:
    """Writes ``model``, made from ``source`` without training, as a checkpoint that everything here
    reads: a teacher, a start for training, a row of a comparison. Replaces ``path`` at once or not
    at all.

    Args:
        data: folder of the manifests it was calibrated on, where tables find held-out audio.

    Raises:
        LowbitError: ``path`` cannot be written.
    """
    state = read_checkpoint(source.path)
    config = dict(state["cfg"])
    config["model"] = {
        **config["model"],
        "_name": "lowbit_hubert",
        "precision": model.plan.precision.to_mapping(),
    }
    config["task"] = {
        "_name": "lowbit_distillation",
        "normalize": source.normalize,
        "teacher": str(Path(source.path).absolute()),
        "data": str(data.absolute()),
    }
    # What fairseq wants to find in any checkpoint, here of no training.
    history = {
        "optimizer_name": None,
        "lr_scheduler_state": {},
        "num_updates": source.updates,
    }
    training = {
        "args": None,
        "optimizer_history": [history],
        "extra_state": {"train_iterator": {"epoch": 1}},
        _CALIBRATED_ONLY: True,
    }
    weights = model.state_dict()
    if not source.has_final_projection:
        weights = {k: v for k, v in weights.items() if not k.startswith("final_proj.")}
    with atomic_write(path, "wb") as file:
        torch.save({**training, "cfg": config, "model": weights}, file)


def check_same_shapes(model: nn.Module, weights: StateDict, path: str | Path) -> None:
    """Raises LowbitError that names the first tensors that differ between model and checkpoint."""
    _check_names_and_shapes(model.state_dict(), weights, f"checkpoint {path}")


def _check_names_and_shapes(expected: StateDict, weights: StateDict, what: str) -> None:
    differing = _differences(expected, weights)
    if differing:
        raise LowbitError(
            f"{what} is of another shape than the model: {differing}. "
            "Give the model the checkpoint's architecture, for example model=fastconv_tiny"
        )


def _differences(expected: StateDict, weights: StateDict) -> str:
    """The first tensors that differ; empty when none does."""
    differing = [
        f"{name} is {tuple(weights[name].shape)} where {tuple(tensor.shape)} is wanted"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    differing += [f"{name} is missing" for name in expected if name not in weights]
    differing += [f"{name} is unknown to the model" for name in weights if name not in expected]
    more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
    return "; ".join(differing[:3]) + more


def _what_is_wrong(error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"cannot be read safely: it holds {refused[1]}, which is not plain data"
    return f"is truncated, corrupt or another kind of file ({type(error).__name__})"


def _is_fairseq(state: object) -> bool:
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        return False
    config = state.get("cfg")
    return isinstance(config, dict) and isinstance(config.get("model"), dict)


def _is_optional(key: str) -> bool:
    return key == _LABELS or "_quantizer." in key
