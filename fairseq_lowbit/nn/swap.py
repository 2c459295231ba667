"""Quantizing a torch model in place: its float modules become operators with quantizer slots.

A module stays the same object, with its parameters, hooks, names and training flag; only its class
changes. So state-dict keys, tied weights and whatever else refers to the module stay as they are.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.nn.attach import attach, planned, sites
from fairseq_lowbit.nn.attention import SelfAttention
from fairseq_lowbit.nn.operators import (
    Conv1d,
    Embedding,
    Linear,
    Operator,
    WeightNormConv1d,
    weight_norm_hook,
)
from fairseq_lowbit.precision import InputKind, Plan, Precision, Role, Rule
from fairseq_lowbit.quantization import Quantizer

Model = TypeVar("Model", bound=nn.Module)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """What a module does in its model.

    Attributes:
        operator: what the module becomes; None where its type decides that.
    """

    role: Role
    input_kind: InputKind = InputKind.ANY
    operator: type[Operator | SelfAttention] | None = None


Adapter = Callable[[nn.Module], Iterable[tuple[nn.Module, Place]]]

_DEFAULT_PLACES: dict[type[nn.Module], Place] = {}
_ADAPTERS: dict[str, Adapter] = {}
_OPAQUE = {"torch.nn.modules.activation.MultiheadAttention"}


def register_operator(float_type: type[nn.Module], operator: type[Operator], role: Role) -> None:
    """Makes modules of exactly this type quantizable.

    Args:
        operator: what they become, see :meth:`Operator.adopt`.
        role: which they have where no adapter gives them one.
    """
    _DEFAULT_PLACES[float_type] = Place(role, operator=operator)


def register_adapter(model_type: str, adapter: Adapter) -> None:
    """Makes a type of model known, so that precision names reach in it what they reach in HuBERT.

    Args:
        model_type: its full name, so that nothing has to be imported for it; subclasses too.
        adapter: the places of the modules inside such a model, its attention modules among them;
            of several places of one module, the last counts.
    """
    _ADAPTERS[model_type] = adapter


def register_opaque(float_type: str) -> None:
    """Keeps quantizers out of modules of the type with this full name, and of its subclasses: they
    compute with the weights of their children without calling them. An adapter may replace them."""
    _OPAQUE.add(float_type)


register_operator(nn.Linear, Linear, Role.ENCODER_LINEAR)
register_operator(nn.Conv1d, Conv1d, Role.CONVOLUTION)
register_operator(nn.Embedding, Embedding, Role.EMBEDDING)


def quantize(
    model: Model,
    precision: str | Precision,
    rules: Iterable[Rule | Mapping[str, Any]] = (),
) -> Model:
    """Puts quantizers into ``model``, in place; see :func:`fairseq_lowbit.quantize`."""
    if not isinstance(model, nn.Module):
        raise LowbitError(f"quantize takes a torch module, not a {type(model).__name__}")
    if not isinstance(getattr(model, "plan", None), Plan | None):
        raise LowbitError(
            f"{type(model).__name__} has an attribute plan of its own, which is where the resolved "
            "precision is kept: rename it"
        )
    precision = _with_rules(precision, rules)
    before: list[_Snapshot] = []
    try:
        _swap(model, before)
        left_float = _left_float(model)
        precision = _without_idle_exceptions(model, precision, left_float)
        plan = planned(model, precision)
        if precision.name != "float" and not any(entry.is_quantized for entry in plan.entries):
            raise LowbitError(
                f"precision {precision.name} quantizes nothing in {type(model).__name__}: rules "
                "leave float whatever has a quantized operator. There is "
                f"{_folded(left_float) or 'nothing'} beside it"
            )
        model.plan = attach(model, precision)
    except BaseException:
        for module in before:
            module.restore()
        raise
    _follow_weights(model)
    if left_float:
        logger.warning("float, for want of a quantized operator: %s", _folded(left_float))
    return model


def _with_rules(precision: str | Precision, rules: Iterable[Rule | Mapping[str, Any]]) -> Precision:
    if isinstance(precision, str):
        precision = Precision(precision)
    try:
        if isinstance(rules, str | Mapping | Rule):
            raise TypeError(f"it is a {type(rules).__name__}")
        rules = [rule if isinstance(rule, Rule) else Rule(**dict(rule)) for rule in rules]
    except (TypeError, ValueError) as error:
        raise LowbitError(
            f"rules is a list of rules, each a Rule or a mapping of its fields: {error}"
        ) from error
    return replace(precision, rules=[*precision.rules, *rules])


class _Snapshot:
    """What a module was, to restore it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.type, self.attributes = module, type(module), vars(module).copy()
        values = self.attributes.values()
        # Handles of hooks refer to these containers, so they stay the same objects.
        self.containers = [
            (value, value.copy()) for value in values if isinstance(value, dict | set)
        ]

    def restore(self) -> None:
        self.module.__class__, self.module.__dict__ = self.type, self.attributes
        for container, content in self.containers:
            container.clear()
            container.update(content)


def _swap(model: nn.Module, before: list[_Snapshot]) -> None:
    """Turns whatever can be quantized into its operator; ``before`` gets what it was."""
    for module, place in _swappable(model):
        before.append(_Snapshot(module))
        operator = place.operator
        if issubclass(operator, SelfAttention):
            operator = _subclass(operator, type(module))
        operator.adopt(module, place.role, place.input_kind)
    if not any(isinstance(module, Operator) for module in model.modules()):
        raise LowbitError(
            f"{type(model).__name__} has nothing to quantize: no module of the types {_known()}"
        )
    # In evaluation these would run fused kernels with the float weights of their linears.
    fused = {
        nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
        nn.TransformerEncoder: ("use_nested_tensor", False),
    }
    for module in model.modules():
        for kind, (switch, off) in fused.items():
            if isinstance(module, kind):
                before.append(_Snapshot(module))
                setattr(module, switch, off)


def _swappable(model: nn.Module) -> list[tuple[nn.Module, Place]]:
    """What becomes which operator.

    Raises:
        LowbitError: an attention that an adapter knows was changed.
    """
    stated = _stated_places(model)
    found = []
    for name, module in _visible_modules(model, stated):
        place = _place(module, stated)
        if place is None or isinstance(module, Operator | SelfAttention):
            continue
        obstacle = _obstacle(module, place)
        if not obstacle:
            found.append((module, place))
        elif issubclass(place.operator, SelfAttention):
            raise LowbitError(f"{name}, a {type(module).__name__}, cannot be quantized: {obstacle}")
    return found


def _stated_places(model: nn.Module) -> dict[nn.Module, Place]:
    """What the adapters know; those of inner models and of subclasses know better."""
    places: dict[nn.Module, Place] = {}
    for module in model.modules():
        for name in reversed(_type_names(module)):
            if name in _ADAPTERS:
                places.update(_ADAPTERS[name](module))
    return places


def _type_names(module: nn.Module) -> list[str]:
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]


def _visible_modules(
    model: nn.Module, replaced: Iterable[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """All but the insides of operators and of opaque modules that are not ``replaced``."""
    hidden: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in hidden:
            continue
        is_opaque = not _OPAQUE.isdisjoint(_type_names(module))
        is_replaced = module in replaced or isinstance(module, SelfAttention)
        if isinstance(module, Operator) or (is_opaque and not is_replaced):
            hidden.update(inner for inner in module.modules() if inner is not module)
        yield name, module


def _place(module: nn.Module, stated: Mapping[nn.Module, Place]) -> Place | None:
    """With its operator; None for a module of a type that has none."""
    place = stated.get(module)
    if place is not None and place.operator is not None:
        return place
    default = _DEFAULT_PLACES.get(type(module))
    if _is_weight_norm_conv(module):
        default = Place(Role.CONVOLUTION, operator=WeightNormConv1d)
    if place is None or default is None:
        return default
    return replace(place, operator=default.operator)


def _is_weight_norm_conv(module: nn.Module) -> bool:
    if parametrize.is_parametrized(module, "weight"):
        steps = module.parametrizations.weight
        is_norm = len(steps) == 1 and isinstance(steps[0], parametrizations._WeightNorm)
        return is_norm and parametrize.type_before_parametrizations(module) is nn.Conv1d
    return type(module) is nn.Conv1d and weight_norm_hook(module) is not None


def _obstacle(module: nn.Module, place: Place) -> str:
    if "forward" in vars(module):
        return "something replaced the forward of this object"
    return place.operator.obstacle(module)


@cache
def _subclass(operator: type, float_type: type) -> type:
    """An attention that is still of its float type, which hooks and its model may ask for."""
    return type(f"Quantized{float_type.__name__}", (operator, float_type), {})


def _left_float(model: nn.Module) -> dict[str, str]:
    """Modules with a weight that has no quantizer slot: what they are, by name."""
    visible = {module for _, module in _visible_modules(model, ())}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Operator) or not _has_weight(module):
            continue
        place, found[name] = _place(module, {}), type(module).__name__
        if module not in visible:
            found[name] += " whose owner uses its weight without calling it"
        elif place is not None:
            found[name] += f": {_obstacle(module, place)}"
    return found


def _folded(kinds: Mapping[str, str]) -> str:
    """Names and what they are, with layer numbers folded into *."""
    names = (re.sub(r"\.\d+\.", ".*.", name) for name in kinds)
    described = (f"{name} ({kind})" for name, kind in zip(names, kinds.values(), strict=True))
    return ", ".join(dict.fromkeys(described))


def _has_weight(module: nn.Module) -> bool:
    """Norms, whose weights are vectors, do not count."""
    return parametrize.is_parametrized(module) or any(
        "weight" in name and parameter is not None and (is_lazy(parameter) or parameter.dim() > 1)
        for name, parameter in module._parameters.items()
    )


def _without_idle_exceptions(
    model: nn.Module, precision: Precision, left_float: Mapping[str, str]
) -> Precision:
    """Drops the rules with which a user excepts modules that are float anyway.

    Raises:
        LowbitError: a rule that would quantize one of ``left_float``.
    """
    for name, kind in left_float.items():
        rules = [rule for rule in precision.rules if fnmatchcase(name, rule.match)]
        if rules and rules[-1].method != "none":
            raise LowbitError(
                f"precision rule {rules[-1].match!r} reaches {name}, which cannot be quantized "
                f"({kind}); what can is {_known()}. Write a narrower pattern, or a rule of method "
                f"none for {name} behind it"
            )
    names = [site.name for site in sites(model)]

    def is_idle(rule: Rule) -> bool:
        matches = (fnmatchcase(name, rule.match) for name in names)
        excepted = (fnmatchcase(name, rule.match) for name in left_float)
        return rule.method == "none" and any(excepted) and not any(matches)

    return replace(precision, rules=[rule for rule in precision.rules if not is_idle(rule)])


def _known() -> str:
    return ", ".join(float_type.__name__ for float_type in _DEFAULT_PLACES)


def _follow_weights(model: nn.Module) -> None:
    """Moves every quantizer to the device of the weights beside it."""
    for module in model.modules():
        if isinstance(module, Operator | SelfAttention):
            operator = module if isinstance(module, Operator) else module.q_proj
            for quantizer in module.children():
                if isinstance(quantizer, Quantizer):
                    quantizer.to(operator.stored_weight().device)
