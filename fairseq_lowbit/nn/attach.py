"""Attaching quantizers to a float model's operators by a plan, and calibrating them."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import nn

from fairseq_lowbit.nn.attention import OPERANDS, SelfAttention
from fairseq_lowbit.nn.operators import Conv1d, Linear, PositionalConv1d
from fairseq_lowbit.precision import Plan, PlanEntry, Precision, Site, resolve_plan
from fairseq_lowbit.precision.grammar import FLOAT_BITS
from fairseq_lowbit.quantization import ElasticQuantizer, after_gelu, non_negative, signed
from fairseq_lowbit.quantization.calibration import Calibrator, fit_weight_scale

OPERATORS = (Linear, Conv1d, PositionalConv1d)
Batch = TypeVar("Batch")


def sites(model: nn.Module) -> list[Site]:
    """Everything in ``model`` that a plan can quantize, in model order; meta device too."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            found += [_operand_site(name, module, operand) for operand in OPERANDS]
        elif isinstance(module, OPERATORS):
            found.append(_operator_site(name, module))
    return found


def _operand_site(name: str, attention: SelfAttention, operand: str) -> Site:
    shifts = 1 if operand == "probabilities" else attention.dim
    return Site(f"{name}.{operand}", "operand", shifts=shifts)


def _operator_site(name: str, module: nn.Module) -> Site:
    total = sum(p.numel() for p in module.parameters())
    weight = module.weight_v if isinstance(module, PositionalConv1d) else module.weight
    kind = "linear" if isinstance(module, Linear) else "conv"
    others = total - weight.numel()
    return Site(name, kind, weight.numel(), others, channels=weight.shape[0], shifts=1)


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
            _attach_operator(model.get_submodule(entry.module), entry)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            _share_input_quantizer(module)
            if precision.length_scaled:
                module.reference_frames = precision.reference_frames
    return plan


def _attach_operator(module: nn.Module, entry: PlanEntry) -> None:
    weight = module.weight_v if isinstance(module, PositionalConv1d) else module.weight
    if entry.weight_bits < FLOAT_BITS:
        per_channel = entry.granularity == "per_channel"
        shape = (weight.shape[0], *[1] * (weight.dim() - 1)) if per_channel else ()
        values = weight.numel() // (weight.shape[0] if per_channel else 1)
        module.weight_quantizer = ElasticQuantizer(signed(entry.weight_bits), values, shape)
    if entry.activation_bits < FLOAT_BITS:
        levels = (after_gelu if module.follows_gelu else signed)(entry.activation_bits)
        values = module.in_features if isinstance(module, Linear) else _input_channels(module)
        module.input_quantizer = ElasticQuantizer(levels, values, shift_shape=())


def _input_channels(module: nn.Module) -> int:
    return len(module.bias) if isinstance(module, PositionalConv1d) else module.in_channels


def _attach_operand(model: nn.Module, entry: PlanEntry, precision: Precision) -> None:
    if entry.activation_bits == FLOAT_BITS:
        return
    path, operand = entry.module.rsplit(".", 1)
    attention = model.get_submodule(path)
    if operand == "probabilities":
        # Values per frame are heads * keys; the reference length stands for the keys, so that
        # the step does not depend on the length of the audio.
        values = attention.heads * precision.reference_frames
        quantizer = ElasticQuantizer(non_negative(entry.activation_bits), values, shift_shape=())
    else:
        quantizer = ElasticQuantizer(
            signed(entry.activation_bits), attention.dim, shift_shape=(attention.dim,)
        )
    setattr(attention, f"{operand}_quantizer", quantizer)


def _share_input_quantizer(attention: SelfAttention) -> None:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    inputs = [p.input_quantizer for p in projections]
    if any(q is None for q in inputs) or len({q.levels for q in inputs}) > 1:
        return
    attention.input_quantizer = inputs[0]
    for projection in projections:
        projection.input_quantizer = None


def quantizers(model: nn.Module) -> Iterator[tuple[str, ElasticQuantizer]]:
    """(name, quantizer) of every quantizer, in model order."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ElasticQuantizer)
    )


def is_calibrated(model: nn.Module) -> bool:
    """Whether every quantizer has its scale; True for a float model."""
    return all(quantizer.is_calibrated for _, quantizer in quantizers(model))


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Batch], forward: Callable[[Batch], object]
) -> None:
    """Fits every quantizer's scale by least squared error: weights first, then activations.

    An activation quantizer refits at every batch on all values seen so far and quantizes with
    the result, so what lies behind it is calibrated on quantized inputs.

    Args:
        batches: without padding, the same on every process.
        forward: runs ``model`` on one batch; every quantizer must be reached.

    Raises:
        RuntimeError: a quantizer that ``forward`` never called.
    """
    for module in model.modules():
        if isinstance(module, OPERATORS) and module.weight_quantizer is not None:
            quantizer = module.weight_quantizer
            shape = tuple(quantizer.log_scale.shape)
            quantizer.set_scale(fit_weight_scale(module.stored_weight(), quantizer.levels, shape))
    activations = [q for name, q in quantizers(model) if not name.endswith("weight_quantizer")]
    was_training = model.training
    model.eval()
    for quantizer in activations:
        quantizer.start_calibration(Calibrator())
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
