"""Which bits where: the precision grammar, ordered rules, and the resolved plan with its table."""

from fairseq_lowbit.precision.grammar import Preset, parse_precision
from fairseq_lowbit.precision.plan import Plan, PlanEntry, resolve_plan
from fairseq_lowbit.precision.rules import Precision, Rule
from fairseq_lowbit.precision.sites import InputKind, Role, Site

__all__ = [
    "InputKind",
    "Plan",
    "PlanEntry",
    "Precision",
    "Preset",
    "Role",
    "Rule",
    "Site",
    "parse_precision",
    "resolve_plan",
]
