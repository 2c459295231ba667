"""The resolved plan: for every weighted module and attention operand, its bits and its bytes."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.precision.grammar import FLOAT_BITS, Preset, parse_precision
from fairseq_lowbit.precision.rules import Precision, Rule

SiteKind = Literal["linear", "conv", "operand"]
FLOAT_BYTES = FLOAT_BITS // 8
SCALAR_BYTES = 4
ENCODER_LINEAR = re.compile(r"encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|fc[12])")


@dataclass(frozen=True)
class Site:
    """A place that can be quantized.

    Attributes:
        name: module name, or for an attention operand ``<attention>.query`` and so on.
        kind: linear and conv have a weight and an input; an operand is an activation only.
        weights: numel of the weight.
        others: numel of what stays float beside it (bias, weight-norm gain).
        channels: output channels of a weight.
        shifts: numel of the input quantizer's shift, 0 without one.
    """

    name: str
    kind: SiteKind
    weights: int = 0
    others: int = 0
    channels: int = 0
    shifts: int = 0


@dataclass(frozen=True)
class PlanEntry:
    """One row of the plan; bits are 1 to 8, or 16 for float. ``bytes`` counts everything stored
    for the module: weight at its width, bias, shifts, scales."""

    module: str
    kind: SiteKind
    rule: str
    method: str
    weight_bits: int
    activation_bits: int
    granularity: str
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
        LowbitError: an unknown name, a contradictory rule, a rule that matches nothing, or bits
            left open for a module that the name leaves float.
    """
    preset = parse_precision(precision.name)
    if precision.reference_frames < 1:
        raise LowbitError(f"precision.reference_frames is {precision.reference_frames}; want >= 1")
    sites = list(sites)
    for rule in precision.rules:
        rule.check()
        _check_reach(rule, [s for s in sites if fnmatchcase(s.name, rule.match)], sites)
    entries = tuple(_entry(site, preset, precision.rules) for site in sites)
    return Plan(precision, entries, other_parameters)


def _check_reach(rule: Rule, matched: list[Site], sites: list[Site]) -> None:
    if not matched:
        raise LowbitError(
            f"precision rule {rule.match!r} matches no module; quantizable modules are "
            f"{_examples(sites)}"
        )
    changes_activations = rule.activation_bits is not None or rule.method is not None
    if not changes_activations and all(site.kind == "operand" for site in matched):
        raise LowbitError(
            f"precision rule {rule.match!r} reaches attention operands only, which have no "
            "weights: give activation_bits"
        )


def _entry(site: Site, preset: Preset, rules: list[Rule]) -> PlanEntry:
    rule = next((r for r in reversed(rules) if fnmatchcase(site.name, r.match)), None)
    weight_bits, activation_bits = _preset_bits(site, preset)
    granularity = "per_tensor"
    if rule is not None:
        weight_bits, activation_bits = _refined(site, rule, weight_bits, activation_bits)
        granularity = rule.granularity or granularity
    quantized = min(weight_bits, activation_bits) < FLOAT_BITS
    return PlanEntry(
        module=site.name,
        kind=site.kind,
        rule=f"rule {rule.match}" if rule is not None else preset.name,
        method="elastic" if quantized else "none",
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        granularity=granularity if weight_bits < FLOAT_BITS else "-",
        parameters=site.weights + site.others,
        bytes=_bytes(site, weight_bits, activation_bits, granularity),
    )


def _preset_bits(site: Site, preset: Preset) -> tuple[int, int]:
    if site.kind == "operand":
        return FLOAT_BITS, preset.attention_bits
    if ENCODER_LINEAR.fullmatch(site.name):
        return preset.weight_bits, preset.activation_bits
    return FLOAT_BITS, FLOAT_BITS


def _refined(site: Site, rule: Rule, weight_bits: int, activation_bits: int) -> tuple[int, int]:
    if rule.method == "none":
        return FLOAT_BITS, FLOAT_BITS
    if site.kind == "operand":
        # A rule for a whole layer does not turn BiT-L into BiT-LA: operands that the name leaves
        # float are quantized by a rule that names them.
        last = rule.match.rsplit(".", 1)[-1]
        named = last != "*" and fnmatchcase(site.name.rsplit(".", 1)[1], last)
        bits = rule.activation_bits if named or activation_bits < FLOAT_BITS else None
        return FLOAT_BITS, bits or activation_bits
    was_float = weight_bits == activation_bits == FLOAT_BITS
    gives = (rule.weight_bits is not None) + (rule.activation_bits is not None)
    if was_float and (gives == 1 or (gives == 0 and rule.method is not None)):
        missing = "weight_bits" if rule.weight_bits is None else "activation_bits"
        raise LowbitError(
            f"precision rule {rule.match!r} gives no {missing} for {site.name}, which is float by "
            f"default: give both (16 for float)"
        )
    return rule.weight_bits or weight_bits, rule.activation_bits or activation_bits


def _bytes(site: Site, weight_bits: int, activation_bits: int, granularity: str) -> float:
    total = site.weights * weight_bits / 8 + site.others * FLOAT_BYTES
    if weight_bits < FLOAT_BITS:
        per_channel = granularity == "per_channel"
        total += site.channels * FLOAT_BYTES if per_channel else SCALAR_BYTES
    if activation_bits < FLOAT_BITS:
        shift_bytes = SCALAR_BYTES if site.shifts == 1 else site.shifts * FLOAT_BYTES
        total += SCALAR_BYTES + shift_bytes
    return total


def _examples(sites: list[Site]) -> str:
    """Module names with their layer numbers folded into *, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", site.name) for site in sites))
