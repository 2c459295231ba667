"""Which bits where: the precision grammar, ordered rules, and the resolved plan with its table."""

from fairseq_lowbit.precision.grammar import Preset, parse_precision
from fairseq_lowbit.precision.plan import Plan, PlanEntry, Site, resolve_plan
from fairseq_lowbit.precision.rules import Precision, Rule

__all__ = [
    "Plan",
    "PlanEntry",
    "Precision",
    "Preset",
    "Rule",
    "Site",
    "parse_precision",
    "resolve_plan",
]
