"""Attaching quantizers to a float model's operators by a plan, and calibrating them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.nn.attention import OPERANDS, SelfAttention
from fairseq_lowbit.nn.operators import Conv1d, Embedding, Linear, Operator, PositionalConv1d
from fairseq_lowbit.precision import InputKind, Plan, PlanEntry, Precision, Role, Site, resolve_plan
from fairseq_lowbit.precision.grammar import FLOAT_BITS, LEARNED_SCALE, PLAIN_RANGE
from fairseq_lowbit.quantization import (
    Criterion,
    ElasticQuantizer,
    Quantizer,
    SquashedQuantizer,
    UniformQuantizer,
    after_gelu,
    mid_rise,
    non_negative,
    signed,
)
from fairseq_lowbit.quantization.calibration import MSE, Calibrator, fit_weight_scale
from fairseq_lowbit.quantization.quantizer import LearnedQuantizer

Batch = TypeVar("Batch")


def sites(model: nn.Module) -> list[Site]:
    """Everything in ``model`` that a plan can quantize, in model order; meta device too."""
    found, groups = [], _input_groups(model)
    first_users: dict[object, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            found += [_operand_site(name, module, operand) for operand in OPERANDS]
        elif isinstance(module, Operator):
            site = _operator_site(name, module, groups.get(module, ""))
            first = first_users.setdefault(module._parameters.get("weight", module), name)
            # The plan counts a shared weight once.
            found.append(site if first == name else replace(site, tied_to=first, weights=0))
    return found


def _input_groups(model: nn.Module) -> dict[nn.Module, str]:
    """The name of the attention for each of its projections that read one tensor."""
    return {
        projection: name
        for name, module in model.named_modules()
        if isinstance(module, SelfAttention)
        for projection in module.input_projections
    }


def _operand_site(name: str, attention: SelfAttention, operand: str) -> Site:
    is_probabilities = operand == "probabilities"
    return Site(
        f"{name}.{operand}",
        "operand",
        Role.ATTENTION_OPERAND,
        InputKind.PROBABILITIES if is_probabilities else InputKind.ANY,
        shifts=1 if is_probabilities else attention.dim,
    )


def _operator_site(name: str, module: Operator, input_group: str) -> Site:
    total = _float_parameters(module)
    shape = module.weight_shape
    is_embedding = isinstance(module, Embedding)
    kind = "linear" if isinstance(module, Linear) else "embedding" if is_embedding else "conv"
    weights = shape.numel()
    return Site(
        name,
        kind,
        module.role,
        module.input_kind,
        input_group,
        weights=weights,
        others=total - weights,
        channels=shape[0],
        shifts=0 if is_embedding else 1,
    )


def _float_parameters(module: nn.Module) -> int:
    """How many values there are to train in the float model."""
    of_quantizers = {p for _, quantizer in quantizers(module) for p in quantizer.parameters()}
    return sum(p.numel() for p in module.parameters() if p not in of_quantizers)


def planned(model: nn.Module, precision: Precision) -> Plan:
    """Resolves ``precision`` for ``model``, which stays as it is.

    Raises:
        LowbitError: see :func:`fairseq_lowbit.precision.resolve_plan`; or a weight that several
            modules share is not quantized in the same way by all of them.
    """
    places = sites(model)
    inside = sum(site.weights + site.others for site in places)
    plan = resolve_plan(precision, places, _float_parameters(model) - inside)
    _check_ties(model, places, plan)
    return plan


def attach(model: nn.Module, precision: Precision) -> Plan:
    """Puts the planned quantizers into the slots of ``model``.

    What was attached before is gone, as if the model were a fresh float one. On an error nothing
    has changed.

    Raises:
        LowbitError: see :func:`planned`; or a quantizer that cannot be made.
    """
    plan = planned(model, precision)
    made = [
        (module, slot, quantizer)
        for entry in plan.entries
        for module, slot, quantizer in _made_quantizers(model, entry, precision)
    ]
    for module in model.modules():
        if isinstance(module, Operator | SelfAttention):
            module.clear_quantizers()
    for module, slot, quantizer in made:
        setattr(module, slot, quantizer)
    for site in sites(model):
        if site.tied_to:
            reader, owner = (model.get_submodule(name) for name in (site.name, site.tied_to))
            reader.weight_quantizer = owner.weight_quantizer
    for module in model.modules():
        if isinstance(module, Operator):
            module.name_groups()
        elif isinstance(module, SelfAttention):
            _share_input_quantizer(module)
            if precision.length_scaled:
                module.reference_frames = precision.reference_frames
    return plan


def _check_ties(model: nn.Module, places: list[Site], plan: Plan) -> None:
    """A weight has one quantizer, so all who share it are quantized in one way or not at all."""
    entries = {entry.module: entry for entry in plan.entries}

    def decision(name: str) -> tuple:
        entry = entries[name]
        method = entry.method if entry.weight_bits < FLOAT_BITS else "none"
        return method, entry.weight_bits, entry.granularity, entry.group_size

    for site in places:
        if site.tied_to and decision(site.name) != decision(site.tied_to):
            raise LowbitError(
                f"{site.name} and {site.tied_to} share one weight, which precision "
                f"{plan.precision.name} and its rules quantize with "
                f"{_bits(entries[site.name])} and {_bits(entries[site.tied_to])}: name both in "
                "one rule, or leave both float with method none"
            )
    weights = {
        model.get_submodule(entry.module)._parameters.get("weight"): entry.module
        for entry in plan.entries
        if entry.weight_bits < FLOAT_BITS
    }
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in weights and not isinstance(module, Operator):
                raise LowbitError(
                    f"the weight of {weights[parameter]} is {name}.{key} too, in a "
                    f"{type(module).__name__}, which has no quantizer: leave both float with a "
                    "rule of method none"
                )


def _bits(entry: PlanEntry) -> str:
    method = "" if entry.method == "none" else f" {entry.method}"
    return f"{entry.weight_bits} bits{method}"


def _made_quantizers(
    model: nn.Module, entry: PlanEntry, precision: Precision
) -> Iterator[tuple[nn.Module, str, Quantizer]]:
    """What ``entry`` puts into which slot of which module."""
    if entry.kind == "operand":
        path, operand = entry.module.rsplit(".", 1)
        attention = model.get_submodule(path)
        if entry.activation_bits < FLOAT_BITS:
            frames = precision.reference_frames
            quantizer = _operand_quantizer(attention, operand, entry, frames)
            yield attention, f"{operand}_quantizer", quantizer
        return
    module = model.get_submodule(entry.module)
    if entry.weight_bits < FLOAT_BITS:
        quantizer = _weight_quantizer(module, entry, precision.squash_std)
        yield module, "weight_quantizer", quantizer
    if entry.activation_bits < FLOAT_BITS:
        yield module, "input_quantizer", _input_quantizer(module, entry)


def _weight_quantizer(module: Operator, entry: PlanEntry, squash_std: float) -> Quantizer:
    shape = module.weight_shape
    channels, inputs = shape[0], shape[1:].numel()
    row_size = {"per_tensor": None, "per_channel": inputs, "per_group": entry.group_size}[
        entry.granularity
    ]
    bits = entry.weight_bits
    if entry.method == "squashed":
        return SquashedQuantizer(bits, channels, inputs, squash_std)
    if entry.method in PLAIN_RANGE:
        return UniformQuantizer(entry.method, bits, row_size)
    levels = mid_rise(bits) if entry.method == "stretched" else signed(bits)
    scales = None if row_size is None else shape.numel() // row_size
    return ElasticQuantizer(levels, row_size or shape.numel(), scales, row_size)


def _input_quantizer(module: Operator, entry: PlanEntry) -> Quantizer:
    if entry.method in LEARNED_SCALE:
        levels = (after_gelu if module.input_kind == InputKind.GELU else signed)(
            entry.activation_bits
        )
        values = module.in_features if isinstance(module, Linear) else _input_channels(module)
        return ElasticQuantizer(levels, values, shift_shape=())
    kind = "minmax" if entry.method == "minmax" else "absmax"
    return UniformQuantizer(kind, entry.activation_bits, frame_dim=_frame_dim(module, entry))


def _frame_dim(module: Operator, entry: PlanEntry) -> int | tuple[int, int]:
    """Dimensions of the input that share a range: the features of a frame."""
    if isinstance(module, Linear):
        return -1
    if _input_channels(module) > 1:
        return 1
    # A single value is its own range: a waveform has one per utterance. Padding is zero there,
    # which widens no range but would lower a mean.
    if entry.activation_bits == 1:
        raise LowbitError(
            f"precision {entry.rule}: 1 bit of the waveform, the input of {entry.module}, needs a "
            "learned scale: give method elastic, or more activation_bits"
        )
    return (1, 2)


def _input_channels(module: Conv1d | PositionalConv1d) -> int:
    return len(module.bias) if isinstance(module, PositionalConv1d) else module.in_channels


def _operand_quantizer(
    attention: SelfAttention, operand: str, entry: PlanEntry, reference_frames: int
) -> Quantizer:
    bits = entry.activation_bits
    is_probabilities = operand == "probabilities"
    if entry.method in PLAIN_RANGE:
        # Of values that are never negative, min-max with its zero point at 0 is the absmax.
        kind = "minmax" if is_probabilities else entry.method
        return UniformQuantizer(kind, bits, frame_dim=-1)
    if is_probabilities:
        # Values per frame are heads * keys; the reference length stands for the keys, so that
        # the step does not depend on the length of the audio.
        values = attention.heads * reference_frames
        return ElasticQuantizer(non_negative(bits), values, shift_shape=())
    return ElasticQuantizer(signed(bits), attention.dim, shift_shape=(attention.dim,))


def _share_input_quantizer(attention: SelfAttention) -> None:
    projections = attention.input_projections
    inputs = [p.input_quantizer for p in projections]
    if any(q is None for q in inputs) or len({(type(q), q.levels) for q in inputs}) > 1:
        return
    attention.input_quantizer = inputs[0]
    for projection in projections:
        projection.input_quantizer = None


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer) of every quantizer, in model order."""
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, Quantizer)
    )


def is_calibrated(model: nn.Module) -> bool:
    """Whether every quantizer has its scale; True for a float model."""
    return all(quantizer.is_calibrated for _, quantizer in quantizers(model))


def forget_calibration(model: nn.Module) -> None:
    """Has :func:`calibrate` fit everything anew; a squashed weight is taken for a float one."""
    for _, quantizer in quantizers(model):
        if isinstance(quantizer, LearnedQuantizer):
            quantizer.mark_calibrated(False)


def squashed_weights(model: nn.Module) -> list[Tensor]:
    """The unsquashed weights P of every squashed operator, with their graph."""
    return [operator.stored_weight() for _, operator in _squashed_operators(model)]


def float_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with squashed weights as the float weights that they stand for: exp(g) tanh(P)
    in place of P."""
    state = model.state_dict()
    for name, operator in _squashed_operators(model):
        if operator.weight_quantizer.is_calibrated:
            weight = operator.weight_quantizer.target(operator.stored_weight().detach())
            values = operator.weight_state(weight)
            state |= {f"{name}.{key}": value for key, value in values.items()}
    return state


def _squashed_operators(model: nn.Module) -> Iterator[tuple[str, Operator]]:
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Operator) and isinstance(module.weight_quantizer, SquashedQuantizer)
    )


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Batch], object],
    criterion: Criterion = MSE,
) -> dict[str, float]:
    """Fits every quantizer's scale to what it sees: weights first, then activations.

    Squashed weights take their unsquashed form here. An activation quantizer refits at every batch
    on all values seen so far and quantizes with the result, so what lies behind it is calibrated on
    quantized inputs.

    Args:
        batches: without padding, the same on every process.
        forward: runs ``model`` on one batch; every quantizer must be reached.
        criterion: what makes a scale fit.

    Returns:
        by module, the share of its weights that squashing clipped.

    Raises:
        RuntimeError: a quantizer that ``forward`` never called.
    """
    clipped = _calibrate_weights(model, criterion)
    activations = [
        quantizer
        for name, quantizer in quantizers(model)
        if isinstance(quantizer, ElasticQuantizer) and not name.endswith("weight_quantizer")
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for quantizer in activations:
        quantizer.start_calibration(Calibrator(criterion))
    try:
        for batch in batches:
            forward(batch)
    finally:
        for quantizer in activations:
            quantizer.finish_calibration()
        for module, is_training in modes.items():
            module.training = is_training
    idle = [name for name, quantizer in quantizers(model) if not quantizer.is_calibrated]
    if idle:
        raise RuntimeError(f"calibration never reached {len(idle)} quantizers, first {idle[0]}")
    return clipped


def _calibrate_weights(model: nn.Module, criterion: Criterion) -> dict[str, float]:
    clipped = {}
    for name, module in model.named_modules():
        quantizer = module.weight_quantizer if isinstance(module, Operator) else None
        if isinstance(quantizer, ElasticQuantizer):
            weight = module.stored_weight()
            quantizer.set_scale(
                fit_weight_scale(weight, quantizer.levels, quantizer.row_size, criterion)
            )
        elif isinstance(quantizer, SquashedQuantizer) and not quantizer.is_calibrated:
            weight = module.stored_weight()
            unsquashed = quantizer.fit(weight)
            clipped[name] = quantizer.clipped_share(weight)
            # Last, because the stored weight may be the parameter itself.
            for key, value in module.weight_state(unsquashed).items():
                module.get_parameter(key).copy_(value)
    return clipped


def describe_squashing(clipped: dict[str, float]) -> str:
    """One line about what :func:`calibrate` returns."""
    worst = max(clipped, key=clipped.get)
    mean = sum(clipped.values()) / len(clipped)
    return (
        f"squashed the weights of {len(clipped)} modules, clipping {mean:.3%} of them on average "
        f"and most in {worst} ({clipped[worst]:.3%})"
    )
