"""Attaching quantizers to a float model's operators by a plan, and calibrating them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.nn.attention import OPERANDS, SelfAttention
from fairseq_lowbit.nn.eager import eagerly
from fairseq_lowbit.nn.operators import Embedding, Linear, Operator
from fairseq_lowbit.precision import InputKind, Plan, PlanEntry, Precision, Role, Site, resolve_plan
from fairseq_lowbit.quantization import (
    Criterion,
    ElasticQuantizer,
    Operand,
    Quantizer,
    SquashedQuantizer,
    UniformQuantizer,
)
from fairseq_lowbit.quantization.calibration import MSE, Calibrator, fit_weight_scale
from fairseq_lowbit.quantization.quantizer import LearnedQuantizer

Batch = TypeVar("Batch")
_NAMED = 3


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
            found.append(site if first == name else replace(site, tied_to=first))
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
    weights = shape.numel()
    return Site(
        name,
        "linear" if isinstance(module, Linear) else "embedding" if is_embedding else "conv",
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
        LowbitError: see :func:`fairseq_lowbit.precision.resolve_plan`; an input that has no
            quantizer of its bits; or a quantized weight that another kind of module uses too.
    """
    places = sites(model)
    inside = sum(site.others + (0 if site.tied_to else site.weights) for site in places)
    plan = resolve_plan(precision, places, _float_parameters(model) - inside)
    for entry in plan.entries:
        if entry.input is not None and entry.kind != "operand":
            _check_range(model.get_submodule(entry.module), entry)
    _check_other_users(model, plan)
    return plan


def _check_other_users(model: nn.Module, plan: Plan) -> None:
    """A quantized weight has no user that would read it as a float one."""
    weights = {
        model.get_submodule(entry.module)._parameters.get("weight"): entry.module
        for entry in plan.entries
        if entry.weight is not None
    }
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in weights and not isinstance(module, Operator):
                raise LowbitError(
                    f"the weight of {weights[parameter]} is {name}.{key} too, in a "
                    f"{type(module).__name__}, which has no quantizer: leave both float with a "
                    "rule of method none"
                )


def attach(model: nn.Module, precision: Precision) -> Plan:
    """Resolves ``precision`` for ``model`` and puts the planned quantizers into its slots, where
    they replace those of an earlier precision. On an error nothing has changed.

    Raises:
        LowbitError: see :func:`planned`.
    """
    plan = planned(model, precision)
    detach(model)
    for entry in plan.entries:
        if entry.kind == "operand":
            _attach_operand(model, entry, precision.reference_frames)
        else:
            _attach_operator(model, entry)
    for site in sites(model):
        if site.tied_to:
            reader, owner = (model.get_submodule(name) for name in (site.name, site.tied_to))
            reader.weight_quantizer = owner.weight_quantizer
    return plan


def detach(model: nn.Module) -> None:
    """Empties every slot for a quantizer: the model is float again, with the float weights that
    squashed ones stand for."""
    for quantizer, operator in _by_quantizer(model).items():
        weight = operator.stored_weight().detach()
        if quantizer.is_calibrated:
            weight = quantizer.target(weight)
        for name, value in operator.weight_state(weight).items():
            parameter = operator.get_parameter(name)
            parameter.data.copy_(value)
            del parameter.param_group
    for module in model.modules():
        if isinstance(module, Operator):
            _empty(module, "weight_quantizer", "input_quantizer")
        elif isinstance(module, SelfAttention):
            _empty(module, "input_quantizer", *(f"{operand}_quantizer" for operand in OPERANDS))
            module.reference_frames = None


def _empty(module: nn.Module, *slots: str) -> None:
    for slot in slots:
        # Deleted first: a slot that stayed among the modules would change the order of parameters.
        if getattr(module, slot) is not None:
            delattr(module, slot)
        setattr(module, slot, None)


def build_quantizer(
    operand: Operand, values: int, frame_dim: int | tuple[int, ...] | None = None
) -> Quantizer:
    """The quantizer that a description asks for.

    Args:
        values: N of the LSQ gradient scale: values that share a weight scale, or of one frame.
        frame_dim: dimension, or dimensions, over which a frame of an activation extends.
    """
    if operand.squash_std is not None:
        return SquashedQuantizer(
            operand.bits, operand.scales, operand.group_size, operand.squash_std
        )
    if operand.scale != "learned":
        return UniformQuantizer(operand.scale, operand.bits, operand.group_size, frame_dim)
    scales = None if operand.group_size is None else operand.scales
    shift_shape = {0: None, 1: ()}.get(operand.shifts, (operand.shifts,))
    return ElasticQuantizer(
        operand.levels, values, scales, operand.group_size, shift_shape, operand.is_per_frame
    )


def _attach_operator(model: nn.Module, entry: PlanEntry) -> None:
    module = model.get_submodule(entry.module)
    if entry.weight is not None:
        values = entry.weight.group_size or module.weight_shape.numel()
        module.weight_quantizer = build_quantizer(entry.weight, values)
        module.name_groups()
    if entry.input is None:
        return
    holder = model.get_submodule(entry.input_owner) if entry.input_owner else module
    if holder.input_quantizer is None:
        holder.input_quantizer = build_quantizer(
            entry.input, module.input_features, module.frame_dim
        )


def _check_range(module: Operator, entry: PlanEntry) -> None:
    # The range of a waveform is its utterance's. Padding is zero there, which widens no range but
    # would lower a mean.
    if entry.input.is_per_frame and entry.input.bits == 1 and module.input_features == 1:
        raise LowbitError(
            f"precision {entry.rule}: 1 bit of the waveform, the input of {entry.module}, needs a "
            "learned scale: give method elastic, or more activation_bits"
        )


def _attach_operand(model: nn.Module, entry: PlanEntry, reference_frames: int) -> None:
    if entry.input is None:
        return
    path, operand = entry.module.rsplit(".", 1)
    attention = model.get_submodule(path)
    values = attention.dim
    if operand == "probabilities":
        # Values per frame are heads * keys; the reference length stands for the keys, so that
        # the step does not depend on the length of the audio.
        values = attention.heads * reference_frames
    setattr(attention, f"{operand}_quantizer", build_quantizer(entry.input, values, frame_dim=-1))
    if entry.input.is_length_scaled:
        attention.reference_frames = reference_frames


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


def squashed_weights(model: nn.Module) -> list[tuple[Tensor, float]]:
    """Every unsquashed weight P, with its graph, and the standard deviation that it is held to."""
    return [
        (operator.stored_weight(), quantizer.target_std)
        for quantizer, operator in _by_quantizer(model).items()
    ]


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


@torch.no_grad()
def decoded_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a float model that computes with the values of the quantized weights: in
    place of each the decoded one, and without quantizers. Those of activations are lost.

    Raises:
        UncalibratedError: a weight quantizer without its scale.
    """
    state = {name: value for name, value in model.state_dict().items() if "_quantizer." not in name}
    for name, operator in model.named_modules():
        if isinstance(operator, Operator) and operator.weight_quantizer is not None:
            weight = operator.weight_quantizer(operator.stored_weight(), dtype=torch.float32)
            values = operator.weight_state(weight)
            state |= {f"{name}.{key}": value for key, value in values.items()}
    return state


def _by_quantizer(model: nn.Module) -> dict[SquashedQuantizer, Operator]:
    """One squashed operator for every squashed weight, which several may share."""
    return {operator.weight_quantizer: operator for _, operator in _squashed_operators(model)}


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
        forward: runs ``model`` on one batch; every quantizer must be called.
        criterion: what makes a scale fit.

    Returns:
        by module, the share of its weights that squashing clipped.

    Raises:
        LowbitError: there is no batch, or a quantizer that ``forward`` never called. After this or
            an exception of ``forward`` the quantizers of activations are uncalibrated.
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
        with every_quantizer_called(model):
            count = sum(1 for _ in map(forward, batches))
            if not count:
                raise LowbitError("there is no batch to calibrate on")
    except BaseException:
        for quantizer in activations:
            quantizer.mark_calibrated(False)
        raise
    finally:
        for quantizer in activations:
            quantizer.finish_calibration()
        for module, is_training in modes.items():
            module.training = is_training
    return clipped


@contextmanager
def every_quantizer_called(model: nn.Module) -> Iterator[None]:
    """Around forwards of ``model`` that have to call every quantizer: what reads a module's weight
    instead of calling the module would compute with a float weight, or with a squashed one as if it
    were float.

    Raises:
        LowbitError: with the first quantizers that were not called.
    """
    idle = dict.fromkeys(name for name, _ in quantizers(model))
    handles = [
        quantizer.register_forward_hook(lambda *_, name=name: idle.pop(name, None))
        for name, quantizer in quantizers(model)
    ]
    try:
        with eagerly():
            yield
    finally:
        for handle in handles:
            handle.remove()
    if idle:
        more = f" and {len(idle) - _NAMED} more" if len(idle) > _NAMED else ""
        raise LowbitError(
            f"a forward of {type(model).__name__} never calls {', '.join(list(idle)[:_NAMED])}"
            f"{more}. The model has to call their modules instead of reading the weights; or leave "
            "these modules float with a rule of method none"
        )


def _calibrate_weights(model: nn.Module, criterion: Criterion) -> dict[str, float]:
    clipped = {}
    for name, module in model.named_modules():
        quantizer = module.weight_quantizer if isinstance(module, Operator) else None
        if isinstance(quantizer, ElasticQuantizer):
            weight = module.stored_weight()
            quantizer.set_scale(
                fit_weight_scale(weight, quantizer.levels, quantizer.group_size, criterion)
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
