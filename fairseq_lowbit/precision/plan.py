"""The resolved plan: for every weighted module and attention operand, its bits and its bytes."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.precision.grammar import (
    FLOAT_BITS,
    LEARNED_SCALE,
    PLAIN_RANGE,
    SQUASHED_ACTIVATION_BITS,
    Method,
    Preset,
    parse_precision,
)
from fairseq_lowbit.precision.merging import Decision, check_reach, deciding, merge, name_of
from fairseq_lowbit.precision.rules import ASYMMETRIC, PER_FRAME, Precision, Rule
from fairseq_lowbit.precision.sites import InputKind, Site, SiteKind
from fairseq_lowbit.precision.storage import FLOAT_BYTES, quantizer_bytes, weight_bytes
from fairseq_lowbit.quantization import LevelSet, Operand, mid_rise, non_negative, signed
from fairseq_lowbit.quantization.squashed import default_squash_std

# Inputs with a small negative lobe or none: where no level is moved by an origin, those of up to so
# many bits are best spent on the positive side alone (docs/numerics.md has the errors).
_NON_NEGATIVE_BITS = {
    InputKind.ANY: 0,
    InputKind.SILU: 3,
    InputKind.GELU: 4,
    InputKind.RELU: 8,
    InputKind.PROBABILITIES: 8,
}


@dataclass(frozen=True)
class PlanEntry:
    """One row of the plan.

    Attributes:
        rule: what decided: the precision's name, or ``rule <pattern>``.
        method: of weight and input, one of ``METHODS``.
        weight_bits, activation_bits: 1 to 8, or 16 for float.
        granularity: what shares a weight scale, ``-`` for a float weight.
        group_size: of ``per_group``.
        parameters: trained with the float model; those of a tied weight count where it is first.
        bytes: everything stored for the module: weight at its width, bias, shifts, scales. What
            sites of one input group share is stored with the first of them.
        weight, input: descriptions of the quantized operands; None for a float one. An operand of
            attention has an input only.
        input_owner: the module that holds the input quantizer which sites of one input group
            share; empty for an input quantizer of the module's own.
    """

    module: str
    kind: SiteKind
    rule: str
    method: Method
    weight_bits: int
    activation_bits: int
    granularity: str
    group_size: int | None
    parameters: int
    bytes: float
    weight: Operand | None = None
    input: Operand | None = None
    input_owner: str = ""

    @property
    def is_quantized(self) -> bool:
        return self.method != "none"


@dataclass(frozen=True)
class Plan:
    """Every site's entry in model order, and the number of parameters outside of any site."""

    precision: Precision
    entries: tuple[PlanEntry, ...]
    other_parameters: int

    @property
    def parameters(self) -> int:
        return self.other_parameters + sum(entry.parameters for entry in self.entries)

    @property
    def form(self) -> str | None:
        """Of its learned scales; None where no input has one."""
        inputs = (entry.input for entry in self.entries if entry.input is not None)
        has_learned = any(operand.scale == "learned" for operand in inputs)
        return self.precision.form if has_learned else None

    @property
    def bytes(self) -> float:
        """Stored size of the model; unquantized parameters at 16 bits."""
        return FLOAT_BYTES * self.other_parameters + sum(entry.bytes for entry in self.entries)

    def to_mapping(self) -> dict[str, Any]:
        return {
            "precision": self.precision.to_mapping(),
            "entries": [asdict(entry) for entry in self.entries],
            "other_parameters": self.other_parameters,
            "parameters": self.parameters,
            "bytes": self.bytes,
        }


def input_levels(kind: InputKind, bits: int, form: str) -> LevelSet:
    """The level set of an input of so many bits, by one of the forms of :class:`Precision`."""
    # Behind a GELU two levels serve best at 0 and at the size of the values (docs/numerics.md).
    if form == ASYMMETRIC and kind.origin and bits > 1:
        return non_negative(bits, kind.origin)
    return non_negative(bits) if bits <= _NON_NEGATIVE_BITS[kind] else signed(bits)


def resolve_plan(precision: Precision, sites: Iterable[Site], other_parameters: int) -> Plan:
    """Applies the name and the rules to a model's sites.

    Raises:
        LowbitError: an unknown name, or one that reaches nothing; a contradictory rule, a rule that
            matches nothing or has no effect, bits left open for a module that the name leaves
            float, or a tied weight that is reached by one of its names only.
    """
    preset = parse_precision(precision.name)
    precision.check()
    sites = list(sites)
    _check_roles(precision.name, preset, sites)
    for rule in precision.rules:
        check_reach(rule, sites, _examples(sites))
    decisions = [merge(precision, site, site.role in preset.roles) for site in sites]
    choices = [
        _choice(site, preset, decision, precision)
        for site, decision in zip(sites, decisions, strict=True)
    ]
    _check_ties(sites, choices)
    entries = _with_shared_inputs(
        [
            _entry(site, choice, _decided_by(decision, precision), precision)
            for site, choice, decision in zip(sites, choices, decisions, strict=True)
        ],
        sites,
    )
    for index in range(len(precision.rules)):
        _check_effect(precision.rules, index, decisions, entries)
    return Plan(precision, entries, other_parameters)


def _check_roles(name: str, preset: Preset, sites: Sequence[Site]) -> None:
    """A name quantizes all that it stands for, or says that it cannot."""
    missing = preset.roles - {site.role for site in sites}
    if not missing:
        return
    advice = "" if missing == preset.roles else "; take a name that does not ask for it"
    raise LowbitError(
        f"precision {name!r} reaches no {' and no '.join(sorted(missing))}: this model has none "
        f"that could be quantized{advice}. It has {_examples(sites) or 'no such module at all'}"
    )


def _decided_by(decision: Decision, precision: Precision) -> str:
    return name_of(decision, precision.rules) if decision.values else precision.name


def _check_effect(
    rules: Sequence[Rule],
    index: int,
    decisions: Sequence[Decision],
    entries: Sequence[PlanEntry],
) -> None:
    """A rule may repeat what the name says anyway, but not come to nothing."""
    rule = rules[index]
    if any(later.match == rule.match for later in rules[index + 1 :]):
        return  # replaced on purpose, as an experiment adds to its base
    where, settings = f"precision rule {rule.match!r}", rule.settings()
    decided = [entries[number] for number in deciding(index, decisions)]
    if not settings and not decided:
        raise LowbitError(
            f"{where} sets nothing: give method, weight_bits, activation_bits or granularity. "
            "Without any it takes back what earlier rules say, and there is no such rule"
        )
    if not decided:
        raise LowbitError(
            f"{where}: later rules decide about every module it reaches; the last rule that sets "
            "a field decides it, so write the broader rule first"
        )
    if settings and settings.keys() <= {"granularity", "group_size"}:
        _require(
            any(entry.weight is not None for entry in decided),
            f"{where}: granularity {rule.granularity} has no effect on {decided[0].module}, whose "
            "weight is float: give weight_bits and activation_bits too",
        )
    if rule.activation_granularity == PER_FRAME:
        _require(
            any(entry.input is not None for entry in decided),
            f"{where}: activation_granularity has no effect on {decided[0].module}, whose input is "
            "float: give activation_bits too",
        )
    if "squash_std" in settings:
        _require(
            any(entry.method == "squashed" for entry in decided),
            f"{where}: squash_std has no effect on {decided[0].module}, whose method is "
            f"{decided[0].method}: it belongs to method squashed",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise LowbitError(message)


@dataclass(frozen=True)
class _Choice:
    """What was decided for a site."""

    method: Method
    weight_bits: int
    activation_bits: int
    granularity: str = "per_tensor"
    group_size: int | None = None
    squash_std: float | None = None
    is_per_frame: bool = False


def _choice(site: Site, preset: Preset, decision: Decision, precision: Precision) -> _Choice:
    choice = _preset_choice(site, preset)
    if decision.values:
        where = f"precision {name_of(decision, precision.rules)}"
        choice = _refined(site, decision.merged(), where, choice)
    if choice.weight_bits == FLOAT_BITS:
        choice = replace(choice, granularity="-", group_size=None, squash_std=None)
    elif choice.method == "squashed":
        std = choice.squash_std or precision.squash_std or default_squash_std(choice.weight_bits)
        choice = replace(choice, granularity="per_channel", squash_std=std)
    if choice.weight_bits == choice.activation_bits == FLOAT_BITS:
        choice = replace(choice, method="none")
    if choice.activation_bits == FLOAT_BITS:
        choice = replace(choice, is_per_frame=False)
    return choice


def _preset_choice(site: Site, preset: Preset) -> _Choice:
    is_reached = site.role in preset.roles
    if site.kind == "operand":
        bits = preset.attention_bits if is_reached else FLOAT_BITS
        return _Choice(_operand_method(preset.method), FLOAT_BITS, bits)
    bits = (preset.weight_bits, preset.activation_bits) if is_reached else (FLOAT_BITS, FLOAT_BITS)
    granularity = "per_channel" if preset.method in PLAIN_RANGE else "per_tensor"
    return _Choice(preset.method, *bits, granularity)


def _operand_method(method: Method) -> Method:
    """Operands have no weights, so what is special about a method's weights is not theirs."""
    return "elastic" if method in ("stretched", "squashed") else method


def _refined(site: Site, rule: Rule, where: str, choice: _Choice) -> _Choice:
    """The choice of the name with what the rules say together.

    Args:
        where: names the rules, for messages.
    """
    if rule.method == "none":
        return replace(choice, weight_bits=FLOAT_BITS, activation_bits=FLOAT_BITS)
    if site.kind == "operand":
        return _refined_operand(site, rule, where, choice)
    method = rule.method or choice.method
    weight_bits, activation_bits = rule.weight_bits, rule.activation_bits
    if activation_bits is None and method == "squashed" and (weight_bits or rule.method):
        activation_bits = SQUASHED_ACTIVATION_BITS
    if site.kind == "embedding":
        activation_bits = FLOAT_BITS  # its inputs are indices
    _check_complete(site, rule, where, choice, (weight_bits, activation_bits))
    weight_bits = weight_bits or choice.weight_bits
    if weight_bits < FLOAT_BITS:
        _check_scales(site, rule, where, method)
    if rule.activation_granularity == PER_FRAME:
        _check_per_frame(site, where, method)
    return _Choice(
        method,
        weight_bits,
        activation_bits or choice.activation_bits,
        rule.granularity or choice.granularity,
        rule.group_size,
        rule.squash_std,
        rule.activation_granularity == PER_FRAME,
    )


def _refined_operand(site: Site, rule: Rule, where: str, choice: _Choice) -> _Choice:
    if rule.activation_granularity == PER_FRAME:
        _check_per_frame(site, where, choice.method)
    if choice.activation_bits == FLOAT_BITS and rule.activation_bits is None:
        if rule.method is not None:
            raise LowbitError(
                f"{where} gives no activation_bits for {site.name}, which is float by default"
            )
        return choice
    method = _operand_method(rule.method or choice.method)
    return replace(
        choice, method=method, activation_bits=rule.activation_bits or choice.activation_bits
    )


def _check_complete(
    site: Site, rule: Rule, where: str, choice: _Choice, given: tuple[int | None, int | None]
) -> None:
    """Rules leave nothing open for a module that the name leaves float."""
    was_float = choice.weight_bits == choice.activation_bits == FLOAT_BITS
    missing = [
        key
        for key, bits in zip(("weight_bits", "activation_bits"), given, strict=True)
        if bits is None
    ]
    if was_float and (len(missing) == 1 or (missing and rule.method is not None)):
        both = "" if site.kind == "embedding" else ": give both (16 for float)"
        raise LowbitError(
            f"{where} gives no {missing[0]} for {site.name}, which is float by default{both}"
        )


def _check_scales(site: Site, rule: Rule, where: str, method: Method) -> None:
    if method == "squashed" and rule.granularity not in (None, "per_channel"):
        raise LowbitError(
            f"{where}: the squashed weight of {site.name} has one gain per channel, so drop "
            f"granularity {rule.granularity}"
        )
    inputs = site.weights // site.channels
    if rule.group_size is not None and inputs % rule.group_size:
        raise LowbitError(
            f"{where}: group_size {rule.group_size} does not divide the {inputs} weights of an "
            f"output channel of {site.name}"
        )


def _check_per_frame(site: Site, where: str, method: Method) -> None:
    """Only a factor per row of the product is free."""
    obstacle = ""
    if site.kind == "operand":
        obstacle = "an operand of attention"
    elif site.kind != "linear":
        obstacle = f"no linear but a {site.kind}"
    elif site.input_kind != InputKind.ANY:
        obstacle = f"a linear behind a {site.input_kind}, whose lowest value is the same everywhere"
    elif method not in LEARNED_SCALE:
        obstacle = f"{method}, whose inputs have a range of every frame anyway"
    if obstacle:
        raise LowbitError(
            f"{where}: activation_granularity {PER_FRAME} is for learned scales of the inputs of "
            f"linears, and {site.name} is {obstacle}: write a narrower pattern, as "
            "config/rules/per_frame.yaml does"
        )


def _check_ties(sites: Sequence[Site], choices: Sequence[_Choice]) -> None:
    """A weight that two modules share has one quantizer."""
    by_name = {site.name: choice for site, choice in zip(sites, choices, strict=True)}
    for site in sites:
        if not site.tied_to:
            continue
        first, second = (_weight_choice(by_name[name]) for name in (site.tied_to, site.name))
        if first != second:
            raise LowbitError(
                f"{site.tied_to} and {site.name} share one weight, but the precision gives it "
                f"{first.weight_bits} bits ({first.method}) by the first name and "
                f"{second.weight_bits} bits ({second.method}) by the second: write a rule that "
                "matches both, with method none to leave it float"
            )


def _weight_choice(choice: _Choice) -> _Choice:
    method = choice.method if choice.weight_bits < FLOAT_BITS else "none"
    return replace(choice, method=method, activation_bits=FLOAT_BITS, is_per_frame=False)


def _entry(site: Site, choice: _Choice, rule: str, precision: Precision) -> PlanEntry:
    weight, read = _weight_operand(site, choice), _input_operand(site, choice, precision)
    own_weights = 0 if site.tied_to else site.weights
    stored = quantizer_bytes(read) + site.others * FLOAT_BYTES
    if own_weights:
        stored += weight_bytes(own_weights, weight)
    return PlanEntry(
        module=site.name,
        kind=site.kind,
        rule=rule,
        method=choice.method,
        weight_bits=choice.weight_bits,
        activation_bits=choice.activation_bits,
        granularity=choice.granularity,
        group_size=choice.group_size,
        parameters=own_weights + site.others,
        bytes=stored,
        weight=weight,
        input=read,
    )


def _weight_operand(site: Site, choice: _Choice) -> Operand | None:
    if choice.weight_bits == FLOAT_BITS:
        return None
    bits, method = choice.weight_bits, choice.method
    group_size = {
        "per_tensor": None,
        "per_channel": site.weights // site.channels,
        "per_group": choice.group_size,
    }[choice.granularity]
    scales = 1 if group_size is None else site.weights // group_size
    if method in PLAIN_RANGE:
        levels = signed(bits) if method == "absmax" else non_negative(bits)
        return Operand(levels, method, scales, group_size)
    levels = signed(bits) if method == "elastic" else mid_rise(bits)
    return Operand(levels, "learned", scales, group_size, squash_std=choice.squash_std)


def _input_operand(site: Site, choice: _Choice, precision: Precision) -> Operand | None:
    if choice.activation_bits == FLOAT_BITS:
        return None
    bits, is_probabilities = choice.activation_bits, site.input_kind == InputKind.PROBABILITIES
    if choice.method in LEARNED_SCALE:
        return Operand(
            input_levels(site.input_kind, bits, precision.form),
            shifts=site.shifts,
            is_per_frame=choice.is_per_frame,
            is_length_scaled=is_probabilities and precision.length_scaled,
        )
    # Of values that are never negative, min-max with its zero point at 0 is the absmax.
    if choice.method == "minmax" or is_probabilities:
        return Operand(non_negative(bits), "minmax", scales=0, is_per_frame=True)
    return Operand(signed(bits), "absmax", scales=0, is_per_frame=True)


def _with_shared_inputs(
    entries: Sequence[PlanEntry], sites: Sequence[Site]
) -> tuple[PlanEntry, ...]:
    """Sites of one input group read the same values: quantized alike, they have one input
    quantizer, whose scale and shift are stored once."""
    found = list(entries)
    readers: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        if site.input_group:
            readers.setdefault(site.input_group, []).append(index)
    for members in readers.values():
        operands = {found[index].input for index in members}
        if len(operands) > 1 or None in operands:
            continue
        group = sites[members[0]].input_group
        shared = quantizer_bytes(found[members[0]].input)
        for index in members:
            own = found[index].bytes - (shared if index != members[0] else 0)
            found[index] = replace(found[index], bytes=own, input_owner=group)
    return tuple(found)


def _examples(sites: Iterable[Site]) -> str:
    """Module names with their layer numbers folded into *, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", site.name) for site in sites))
