"""The declarative precision: a name for the default and an ordered list of rules that refine it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from fairseq_lowbit import __version__
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.precision.grammar import Method, check_bits

METHODS = get_args(Method)
GRANULARITIES = ("per_tensor", "per_channel", "per_group")
PER_FRAME = "per_frame"
ACTIVATION_GRANULARITIES = ("per_tensor", PER_FRAME)
PAPER, ASYMMETRIC = "paper", "asymmetric"
FORMS = (PAPER, ASYMMETRIC)
# What a precision that was written without a key means: what all had before the key was there.
BEFORE_THE_KEY = {"rules_decide": "modules", "form": PAPER}


@dataclass
class Rule:
    """One refinement of a precision's name.

    All rules whose pattern matches a module count: the last one that sets a field decides that
    field, and what none of them sets comes from the name. Method ``none`` decides the whole module,
    and a rule that sets nothing takes a module back to the name.

    Attention operands (``<attention>.query`` and so on) that the name leaves float are reached only
    by a pattern whose last part matches their name and is not a bare ``*``.

    Attributes:
        match: shell pattern on the module name, for example ``encoder.layers.0.*``.
        method: how weight and input are quantized, see docs/numerics.md: ``elastic``,
            ``stretched``, ``squashed``, ``absmax``, ``minmax``, or ``none`` to leave both float.
        weight_bits, activation_bits: 1 to 8, or 16 for float. Inputs of ``squashed`` modules have
            8 bits unless a rule says otherwise, whatever the name.
        granularity: what shares a weight scale: ``per_tensor``, ``per_channel`` (output channel)
            or ``per_group``.
        group_size: weights of one group, along an output channel's inputs; divides their number.
        activation_granularity: ``per_tensor``, or ``per_frame``: a learned scale and shift of a
            linear's input are in units of each frame's mean magnitude.
        squash_std: standard deviation of the unsquashed weights of ``squashed`` modules.
    """

    match: str = ""
    method: str | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    granularity: str | None = None
    group_size: int | None = None
    squash_std: float | None = None
    activation_granularity: str | None = None

    def settings(self) -> dict[str, Any]:
        """The fields that it sets. What shares a scale is one setting of two fields."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        del given["match"]
        return given | {"group_size": self.group_size} if self.granularity else given

    def check(self) -> None:
        """Raises LowbitError when the rule contradicts itself."""
        where = f"precision rule {self.match!r}"
        if not self.match:
            raise LowbitError(f"{where}: match is empty; write a module name pattern")
        _check_choice(self.method, METHODS, f"{where}: method")
        _check_choice(self.granularity, GRANULARITIES, f"{where}: granularity")
        for key in ("weight_bits", "activation_bits"):
            value = getattr(self, key)
            if value is not None:
                check_bits(value, f"{where}: {key}")
        for key in ("weight_bits", "activation_bits", "activation_granularity"):
            if self.method == "none" and getattr(self, key) is not None:
                raise LowbitError(f"{where}: method none leaves the module float, so drop {key}")
        self._check_granularity(where)
        check_squash_std(self.squash_std, where)

    def _check_granularity(self, where: str) -> None:
        allowed = ACTIVATION_GRANULARITIES
        _check_choice(self.activation_granularity, allowed, f"{where}: activation_granularity")
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise LowbitError(f"{where}: granularity per_group and group_size belong together")
        if self.group_size is not None and self.group_size < 1:
            raise LowbitError(f"{where}: group_size {self.group_size}; want at least 1")


@dataclass
class Precision:
    """``model.precision`` of a configuration.

    Attributes:
        name: default by name, see :func:`fairseq_lowbit.precision.parse_precision`.
        rules: refinements in order, see :class:`Rule`.
        length_scaled: scale the probability quantizers with reference_frames / valid frames.
        reference_frames: length in frames for which their scale is stored.
        squash_std: standard deviation of the unsquashed weights of ``squashed`` modules, which a
            student starts from and the loss term holds it to; None for the default of their width.
        rules_decide: ``fields``, or ``modules`` as before version 0.2, where the last rule that
            matches a module decided all of its fields.
        form: of learned scales behind a GELU or SiLU: ``asymmetric``, from 2 bits on levels from
            the function's lowest value up; or ``paper`` as before version 0.5, levels from 0 up,
            with many bits signed ones.
    """

    name: str = "float"
    rules: list[Rule] = field(default_factory=list)
    length_scaled: bool = True
    reference_frames: int = 500
    squash_std: float | None = None
    rules_decide: str = "fields"
    form: str = ASYMMETRIC

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Precision":
        """Back from plain data, for example a checkpoint's configuration. What was written before
        there was a key has its value in :data:`BEFORE_THE_KEY`, or else its default.

        Raises:
            LowbitError: a key or a form that only a newer version knows.
        """
        given = values.get("rules") or []
        for entry, kind in ((values, cls), *((rule, Rule) for rule in given)):
            _refuse_newer(entry, kind)
        rules = [Rule(**rule) for rule in given]
        precision = cls(**{**BEFORE_THE_KEY, **values, "rules": rules})
        _check_form(precision.form)
        return precision

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)

    def check(self) -> None:
        """Raises LowbitError for a value that makes no sense."""
        if self.reference_frames < 1:
            raise LowbitError(f"precision.reference_frames is {self.reference_frames}; want >= 1")
        check_squash_std(self.squash_std, "precision")
        _check_choice(self.rules_decide, ("fields", "modules"), "precision.rules_decide")
        _check_form(self.form)
        for rule in self.rules:
            rule.check()


def with_form(name: str, form: str | None) -> str:
    """The name of a precision or a model, with its form if it has another than the default."""
    return f"{name}, {form} form" if form not in (None, ASYMMETRIC) else name


def check_squash_std(value: float | None, where: str) -> None:
    """Raises LowbitError for a standard deviation that is not a positive number."""
    if value is not None and not 0 < value < math.inf:
        raise LowbitError(f"{where}: squash_std is {value}; want more than 0")


def _refuse_newer(entry: Mapping[str, Any], kind: type[Rule] | type[Precision]) -> None:
    known = {field.name for field in fields(kind)}
    for key in entry.keys() - known:
        where = "precision" if kind is Precision else f"precision rule {entry.get('match')!r}"
        raise LowbitError(
            f"{where}: {key} {entry[key]!r} is nothing that fairseq_lowbit {__version__} knows "
            f"({', '.join(sorted(known))}): it takes the version that wrote it, or a newer one"
        )


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise LowbitError(
            f"precision.form {form!r}; fairseq_lowbit {__version__} knows {', '.join(FORMS)}: what "
            "has another was written by a newer version"
        )


def _check_choice(value: str | None, allowed: tuple[str, ...], where: str) -> None:
    if value is not None and value not in allowed:
        raise LowbitError(f"{where} {value!r}; allowed are {', '.join(allowed)}")
