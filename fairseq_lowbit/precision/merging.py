"""Which rules decide what about a site, and which of them come to nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.precision.rules import Precision, Rule
from fairseq_lowbit.precision.sites import Site


@dataclass
class Decision:
    """What the rules say of one site.

    Attributes:
        values: by field of :class:`Rule`.
        deciders: index of the rule that decided, by field.
        resets: rules that took the site back to the precision's name from something else.
    """

    values: dict[str, Any] = field(default_factory=dict)
    deciders: dict[str, int] = field(default_factory=dict)
    resets: set[int] = field(default_factory=set)

    def merged(self) -> Rule:
        """The one rule that says the same."""
        return Rule("*", **self.values)


def merge(precision: Precision, site: Site, is_named: bool) -> Decision:
    """Applies every rule that matches, in order.

    Args:
        is_named: whether the precision's name reaches the site. A rule for a whole layer does not
            turn BiT-L into BiT-LA: an operand of attention that the name leaves float is quantized
            by a rule that names it.

    Raises:
        LowbitError: a rule leaves the module float and a later one gives it bits.
    """
    decision = Decision()
    for index, rule in enumerate(precision.rules):
        if not fnmatchcase(site.name, rule.match):
            continue
        is_float = not is_named and "activation_bits" not in decision.values
        if site.kind != "operand" or not is_float or _names(rule, site):
            _apply(decision, index, precision, site)
        elif precision.rules_decide == "modules":
            decision = Decision()
    return decision


def _names(rule: Rule, site: Site) -> bool:
    last = rule.match.rsplit(".", 1)[-1]
    return last != "*" and fnmatchcase(site.name.rsplit(".", 1)[-1], last)


def _apply(decision: Decision, index: int, precision: Precision, site: Site) -> None:
    rule = precision.rules[index]
    settings = rule.settings()
    if not settings or precision.rules_decide == "modules" or rule.method == "none":
        if decision.values:
            decision.resets.add(index)
        decision.values, decision.deciders = {}, {}
    if decision.values.get("method") == "none" and "method" not in settings:
        _refuse_bits_of_float(decision, index, precision.rules, site)
        return
    decision.values |= settings
    decision.deciders |= dict.fromkeys(settings, index)


def _refuse_bits_of_float(
    decision: Decision, index: int, rules: Sequence[Rule], site: Site
) -> None:
    """A granularity for many modules passes by the float ones; bits contradict."""
    rule, other = rules[index], rules[decision.deciders["method"]]
    if rule.weight_bits is not None or rule.activation_bits is not None:
        raise LowbitError(
            f"precision rules {other.match!r} and {rule.match!r} contradict each other about "
            f"{site.name}: the first leaves it float (method none), the second gives it bits. Give "
            "the second a method too, or leave one of them out"
        )


def name_of(decision: Decision, rules: Sequence[Rule]) -> str:
    """The rules that decided, for people: ``rule a`` or ``rules a, b``."""
    indices = sorted(set(decision.deciders.values()))
    matches = list(dict.fromkeys(rules[index].match for index in indices))
    return f"rule{'s' if len(matches) > 1 else ''} {', '.join(matches)}"


def check_reach(rule: Rule, sites: Sequence[Site], examples: str) -> None:
    """Raises LowbitError for a rule that matches nothing that it could change."""
    matched = [site for site in sites if fnmatchcase(site.name, rule.match)]
    if not matched:
        raise LowbitError(
            f"precision rule {rule.match!r} matches no module; quantizable modules are {examples}"
        )
    on_activations = (rule.activation_bits, rule.method, rule.activation_granularity)
    changes_activations = any(value is not None for value in on_activations)
    if rule.settings() and not changes_activations and all(s.kind == "operand" for s in matched):
        raise LowbitError(
            f"precision rule {rule.match!r} reaches attention operands only, which have no "
            "weights: give activation_bits"
        )


def deciding(index: int, decisions: Iterable[Decision]) -> list[int]:
    """The sites, by their number, about which a rule has the last word in some field."""
    return [
        number
        for number, decision in enumerate(decisions)
        if index in decision.deciders.values() or index in decision.resets
    ]
