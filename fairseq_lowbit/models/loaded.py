"""A model that was read from somewhere, and how another model starts from it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models.model import Hubert
from fairseq_lowbit.nn import float_state, forget_calibration

StateDict = dict[str, Tensor]
LABEL_EMBEDDINGS = "label_embs_concat"
_HEADS = (LABEL_EMBEDDINGS, "ctc_proj.weight", "ctc_proj.bias")


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and what is known of where it came from.

    Attributes:
        source: the file, folder or id, as it was named.
        updates: training updates behind it.
        has_final_projection: False when the source has no ``final_proj`` (a fine-tuned or converted
            teacher); the model's own is then untrained.
        normalize: whether it was trained on utterances of zero mean and unit variance.
        is_calibrated_only: quantized without training.
        left_out: what the source holds and the model does not, such as the head of a fine-tuned
            model.
        units: what the outputs of the CTC head stand for, the blank first as an empty string; empty
            for a model without this head.
    """

    model: Hubert
    source: str
    updates: int
    has_final_projection: bool
    normalize: bool
    is_calibrated_only: bool = False
    left_out: tuple[str, ...] = ()
    units: tuple[str, ...] = ()


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, and wants its inputs: where its parameters are."""
    return next(model.parameters()).device


def start_from(
    model: Hubert, source: LoadedModel, role: str = "init_from", front_end: bool = True
) -> None:
    """Copies ``source``'s weights into ``model``, whose precision may differ.

    Quantizers are left out: scales belong to a bit width and are calibrated anew; squashed weights
    arrive as the float weights they stand for. Label embeddings and a CTC head that either side
    lacks, or has for another number of classes or units, are left out too.

    Args:
        role: of the source, for messages.
        front_end: False leaves the model its own convolutions in front of the encoder, which may be
            of another shape.

    Raises:
        LowbitError: the shapes differ, with the first differing tensors.
    """
    state = float_state(source.model)
    weights = _required(state, front_end)
    own = _required(model.state_dict(), front_end)
    _check_names_and_shapes(own, weights, f"{role} {source.source}")
    own_state = model.state_dict()
    weights |= {
        key: state[key]
        for key in _HEADS
        if key in state and key in own_state and own_state[key].shape == state[key].shape
    }
    model.load_state_dict(weights, strict=False)
    forget_calibration(model)


def continue_from(model: Hubert, source: LoadedModel, role: str = "init_from") -> None:
    """Copies ``source``'s weights into ``model`` as :func:`start_from` does, and where both have
    the same precision its quantizers too, as they were trained: nothing is calibrated anew.

    Raises:
        LowbitError: see :func:`start_from`.
    """
    start_from(model, source, role)
    if model.plan.precision == source.model.plan.precision:
        state = source.model.state_dict()
        model.load_state_dict({k: v for k, v in state.items() if k not in _HEADS}, strict=False)


def check_same_shapes(model: nn.Module, weights: StateDict, path: object) -> None:
    """Raises LowbitError that names the first tensors that differ between model and checkpoint."""
    _check_names_and_shapes(model.state_dict(), weights, f"checkpoint {path}")


def _check_names_and_shapes(expected: StateDict, weights: StateDict, what: str) -> None:
    differing = differences(expected, weights)
    if differing:
        raise LowbitError(
            f"{what} is of another shape than the model: {differing}. "
            "Give the model the checkpoint's architecture, for example model=fastconv_tiny"
        )


def differences(expected: StateDict, weights: StateDict) -> str:
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


def _required(weights: StateDict, front_end: bool) -> StateDict:
    """All but quantizers and heads for classes or units, and the front-end where it is not
    wanted."""
    return {
        key: tensor
        for key, tensor in weights.items()
        if key not in _HEADS
        and "_quantizer." not in key
        and (front_end or not key.startswith("feature_extractor."))
    }
