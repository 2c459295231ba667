"""The resolved plan: for every weighted module and attention operand, its bits and its bytes."""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
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
from fairseq_lowbit.precision.rules import Precision, Rule
from fairseq_lowbit.precision.sites import Role, Site, SiteKind

FLOAT_BYTES = FLOAT_BITS // 8
SCALAR_BYTES = 4
ZERO_POINT_BYTES = 1


@dataclass(frozen=True)
class PlanEntry:
    """One row of the plan.

    Attributes:
        rule: what decided: the precision's name, or ``rule <pattern>``.
        method: of weight and input, one of ``METHODS``.
        weight_bits, activation_bits: 1 to 8, or 16 for float.
        granularity: what shares a weight scale, ``-`` for a float weight.
        group_size: of ``per_group``.
        parameters: trained with the float model.
        bytes: everything stored for the module: weight at its width, bias, shifts, scales. What q,
            k and v projection of an attention share is stored with the first of them.
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
    def bytes(self) -> float:
        """Stored size of the model; unquantized parameters at 16 bits."""
        return FLOAT_BYTES * self.other_parameters + sum(entry.bytes for entry in self.entries)

    def quantizes(self, prefix: str) -> bool:
        """Whether any module under ``prefix`` is quantized."""
        return any(e.is_quantized and e.module.startswith(prefix) for e in self.entries)

    def to_mapping(self) -> dict[str, Any]:
        return {
            "precision": self.precision.to_mapping(),
            "entries": [asdict(entry) for entry in self.entries],
            "other_parameters": self.other_parameters,
            "parameters": self.parameters,
            "bytes": self.bytes,
        }


def resolve_plan(precision: Precision, sites: Iterable[Site], other_parameters: int) -> Plan:
    """Applies the name and the rules to a model's sites.

    Raises:
        LowbitError: an unknown name, a contradictory rule, a rule that matches nothing or has no
            effect, or bits left open for a module that the name leaves float.
    """
    preset = parse_precision(precision.name)
    if precision.reference_frames < 1:
        raise LowbitError(f"precision.reference_frames is {precision.reference_frames}; want >= 1")
    if not 0 < precision.squash_std < math.inf:
        raise LowbitError(f"precision.squash_std is {precision.squash_std}; want more than 0")
    sites = list(sites)
    for rule in precision.rules:
        rule.check()
        _check_reach(rule, [s for s in sites if fnmatchcase(s.name, rule.match)], sites)
    entries = _with_shared_inputs([_entry(site, preset, precision.rules) for site in sites], sites)
    for index in range(len(precision.rules)):
        _check_effect(precision.rules, index, entries)
    return Plan(precision, entries, other_parameters)


def _check_reach(rule: Rule, matched: list[Site], sites: list[Site]) -> None:
    if not matched:
        raise LowbitError(
            f"precision rule {rule.match!r} matches no module; quantizable modules are "
            f"{_examples(sites)}"
        )
    changes_weights = rule.weight_bits is not None or rule.method is not None
    is_for_inputs = rule.activation_bits is not None and not changes_weights
    if is_for_inputs and all(site.kind == "embedding" for site in matched):
        raise LowbitError(
            f"precision rule {rule.match!r} reaches embeddings only, whose input are indices: give "
            "weight_bits"
        )
    changes_activations = rule.activation_bits is not None or rule.method is not None
    if not changes_activations and all(site.kind == "operand" for site in matched):
        raise LowbitError(
            f"precision rule {rule.match!r} reaches attention operands only, which have no "
            "weights: give activation_bits"
        )


def _check_effect(rules: list[Rule], index: int, entries: Iterable[PlanEntry]) -> None:
    """A rule may repeat what the name says anyway, but not come to nothing."""
    rule = rules[index]
    if any(later.match == rule.match for later in rules[index + 1 :]):
        return  # replaced on purpose, as an experiment adds to its base
    where = f"precision rule {rule.match!r}"
    reached = [entry for entry in entries if fnmatchcase(entry.module, rule.match)]
    decided = [e for e in reached if not _is_reached(e, rules[index + 1 :])]
    if not decided:
        raise LowbitError(
            f"{where}: later rules decide about every module it reaches; the last match wins, so "
            "write the broader rule first"
        )
    settings = {key for key, value in asdict(rule).items() if value is not None} - {"match"}
    # Behind another rule, one without settings takes modules back to the precision's name.
    if not settings and not any(_is_reached(e, rules[:index]) for e in decided):
        raise LowbitError(
            f"{where} sets nothing: give method, weight_bits, activation_bits or granularity"
        )
    is_scales_only = settings and settings <= {"granularity", "group_size"}
    if is_scales_only and all(entry.weight_bits == FLOAT_BITS for entry in decided):
        raise LowbitError(
            f"{where}: granularity {rule.granularity} has no effect on {decided[0].module}, whose "
            "weight is float: give weight_bits and activation_bits too"
        )


def _is_reached(entry: PlanEntry, rules: Iterable[Rule]) -> bool:
    return any(fnmatchcase(entry.module, rule.match) for rule in rules)


@dataclass(frozen=True)
class _Choice:
    """What was decided for a site."""

    method: Method
    weight_bits: int
    activation_bits: int
    granularity: str = "per_tensor"
    group_size: int | None = None


def _entry(site: Site, preset: Preset, rules: list[Rule]) -> PlanEntry:
    rule = next((r for r in reversed(rules) if fnmatchcase(site.name, r.match)), None)
    choice = _preset_choice(site, preset)
    if rule is not None:
        choice = _refined(site, rule, choice)
    if choice.method == "squashed":
        choice = replace(choice, granularity="per_channel")
    if site.kind == "embedding":  # its input are indices
        choice = replace(choice, activation_bits=FLOAT_BITS)
    if choice.weight_bits == FLOAT_BITS:
        choice = replace(choice, granularity="-", group_size=None)
    if choice.weight_bits == choice.activation_bits == FLOAT_BITS:
        choice = replace(choice, method="none")
    return PlanEntry(
        module=site.name,
        kind=site.kind,
        rule=f"rule {rule.match}" if rule is not None else preset.name,
        **asdict(choice),
        parameters=site.weights + site.others,
        bytes=_bytes(site, choice),
    )


def _preset_choice(site: Site, preset: Preset) -> _Choice:
    if site.kind == "operand":
        return _Choice(_operand_method(preset.method), FLOAT_BITS, preset.attention_bits)
    weight_bits = activation_bits = FLOAT_BITS
    if site.role == Role.ENCODER_LINEAR:
        weight_bits, activation_bits = preset.weight_bits, preset.activation_bits
    granularity = "per_channel" if preset.method in PLAIN_RANGE else "per_tensor"
    return _Choice(preset.method, weight_bits, activation_bits, granularity)


def _operand_method(method: Method) -> Method:
    """Operands have no weights, so what is special about a method's weights is not theirs."""
    return "elastic" if method in ("stretched", "squashed") else method


def _refined(site: Site, rule: Rule, choice: _Choice) -> _Choice:
    if rule.method == "none":
        return replace(choice, weight_bits=FLOAT_BITS, activation_bits=FLOAT_BITS)
    if site.kind == "operand":
        return _refined_operand(site, rule, choice)
    method = rule.method or choice.method
    weight_bits, activation_bits = rule.weight_bits, rule.activation_bits
    if activation_bits is None and method == "squashed" and (weight_bits or rule.method):
        activation_bits = SQUASHED_ACTIVATION_BITS
    _check_complete(site, rule, choice, (weight_bits, activation_bits))
    weight_bits = weight_bits or choice.weight_bits
    if weight_bits < FLOAT_BITS:
        _check_scales(site, rule, method)
    return _Choice(
        method,
        weight_bits,
        activation_bits or choice.activation_bits,
        rule.granularity or choice.granularity,
        rule.group_size,
    )


def _refined_operand(site: Site, rule: Rule, choice: _Choice) -> _Choice:
    if choice.activation_bits == FLOAT_BITS:
        # A rule for a whole layer does not turn BiT-L into BiT-LA: operands that the name leaves
        # float are quantized by a rule that names them.
        last = rule.match.rsplit(".", 1)[-1]
        if last == "*" or not fnmatchcase(site.name.rsplit(".", 1)[1], last):
            return choice
        if rule.method is not None and rule.activation_bits is None:
            raise LowbitError(
                f"precision rule {rule.match!r} gives no activation_bits for {site.name}, which is "
                "float by default"
            )
    method = _operand_method(rule.method or choice.method)
    return replace(
        choice, method=method, activation_bits=rule.activation_bits or choice.activation_bits
    )


def _check_complete(
    site: Site, rule: Rule, choice: _Choice, given: tuple[int | None, int | None]
) -> None:
    """A rule leaves nothing open for a module that the name leaves float."""
    if site.kind == "embedding" and given[0] is not None:
        given = (given[0], FLOAT_BITS)
    was_float = choice.weight_bits == choice.activation_bits == FLOAT_BITS
    missing = [
        key
        for key, bits in zip(("weight_bits", "activation_bits"), given, strict=True)
        if bits is None
    ]
    if was_float and (len(missing) == 1 or (missing and rule.method is not None)):
        raise LowbitError(
            f"precision rule {rule.match!r} gives no {missing[0]} for {site.name}, which is float "
            "by default: give both (16 for float)"
        )


def _check_scales(site: Site, rule: Rule, method: Method) -> None:
    where = f"precision rule {rule.match!r}"
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


def _bytes(site: Site, choice: _Choice) -> float:
    total = site.weights * choice.weight_bits / 8 + site.others * FLOAT_BYTES
    if choice.weight_bits < FLOAT_BITS and not site.tied_to:
        total += _scale_bytes(site, choice)
    # The other methods compute the scales of activations from the activations.
    if _learns_input_scale(choice):
        shift_bytes = SCALAR_BYTES if site.shifts == 1 else site.shifts * FLOAT_BYTES
        total += SCALAR_BYTES + shift_bytes
    return total


def _learns_input_scale(choice: _Choice | PlanEntry) -> bool:
    return choice.activation_bits < FLOAT_BITS and choice.method in LEARNED_SCALE


def _with_shared_inputs(entries: list[PlanEntry], sites: list[Site]) -> tuple[PlanEntry, ...]:
    """Sites of one input group read the same values: with learned scales of the same bits they have
    one input quantizer, whose scale and shift are stored once."""
    entries = list(entries)
    readers: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        if site.input_group:
            readers.setdefault(site.input_group, []).append(index)
    for members in readers.values():
        bits = {entries[i].activation_bits for i in members}
        if len(bits) == 1 and all(_learns_input_scale(entries[i]) for i in members):
            for i in members[1:]:
                entries[i] = replace(entries[i], bytes=entries[i].bytes - 2 * SCALAR_BYTES)
    return tuple(entries)


def _scale_bytes(site: Site, choice: _Choice) -> int:
    """Scales, and zero points at a byte each."""
    zero_point = ZERO_POINT_BYTES if choice.method == "minmax" else 0
    if choice.granularity == "per_tensor":
        return SCALAR_BYTES + zero_point
    groups = site.weights // choice.group_size if choice.group_size else site.channels
    return groups * (FLOAT_BYTES + zero_point)


def _examples(sites: list[Site]) -> str:
    """Module names with their layer numbers folded into *, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", site.name) for site in sites))
