"""Attaching quantizers to a float model's operators by a plan, and calibrating them."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.nn.attention import OPERANDS, SelfAttention
from fairseq_lowbit.nn.operators import Conv1d, Linear, Operator, PositionalConv1d
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
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            found += [_operand_site(name, module, operand) for operand in OPERANDS]
        elif isinstance(module, Operator):
            found.append(_operator_site(name, module, groups.get(module, "")))
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
    total = sum(p.numel() for p in module.parameters())
    shape = module.weight_shape
    kind = "linear" if isinstance(module, Linear) else "conv"
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
        shifts=1,
    )


def attach(model: nn.Module, precision: Precision) -> Plan:
    """Resolves ``precision`` for a float ``model`` and puts the planned quantizers into its slots.

    Raises:
        LowbitError: see :func:`fairseq_lowbit.precision.resolve_plan`.
    """
    places = sites(model)
    inside = sum(site.weights + site.others for site in places)
    outside = sum(p.numel() for p in model.parameters()) - inside
    plan = resolve_plan(precision, places, outside)
    for entry in plan.entries:
        if entry.kind == "operand":
            _attach_operand(model, entry, precision)
        else:
            _attach_operator(model.get_submodule(entry.module), entry, precision)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            _share_input_quantizer(module)
            if precision.length_scaled:
                module.reference_frames = precision.reference_frames
    return plan


def _attach_operator(module: Operator, entry: PlanEntry, precision: Precision) -> None:
    if entry.weight_bits < FLOAT_BITS:
        module.weight_quantizer = _weight_quantizer(module, entry, precision.squash_std)
        module.name_groups()
    if entry.activation_bits < FLOAT_BITS:
        module.input_quantizer = _input_quantizer(module, entry)


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


def _attach_operand(model: nn.Module, entry: PlanEntry, precision: Precision) -> None:
    if entry.activation_bits == FLOAT_BITS:
        return
    path, operand = entry.module.rsplit(".", 1)
    attention = model.get_submodule(path)
    quantizer = _operand_quantizer(attention, operand, entry, precision.reference_frames)
    setattr(attention, f"{operand}_quantizer", quantizer)


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


def is_quantized(module: nn.Module) -> bool:
    """Whether anything in ``module`` is quantized."""
    return next(quantizers(module), None) is not None


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
    was_training = model.training
    model.eval()
    for quantizer in activations:
        quantizer.start_calibration(Calibrator(criterion))
    try:
        for batch in batches:
            forward(batch)
    finally:
        for quantizer in activations:
            quantizer.finish_calibration()
        model.train(was_training)
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
                getattr(module, key).copy_(value)
    return clipped


def describe_squashing(clipped: dict[str, float]) -> str:
    """One line about what :func:`calibrate` returns."""
    worst = max(clipped, key=clipped.get)
    mean = sum(clipped.values()) / len(clipped)
    return (
        f"squashed the weights of {len(clipped)} modules, clipping {mean:.3%} of them on average "
        f"and most in {worst} ({clipped[worst]:.3%})"
    )
