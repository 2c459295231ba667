"""What every reader gives: a model's shape and weights in this package's own names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Architecture, Hubert
from fairseq_lowbit.models.loaded import LABEL_EMBEDDINGS, StateDict, differences
from fairseq_lowbit.precision import Precision


@dataclass(frozen=True)
class Source:
    """A model that has been read and not been built.

    Attributes:
        weights: by the keys of :class:`Hubert`. ``final_proj`` and the label embeddings may be
            missing.
        precision: None for a float model.
        normalize, updates, is_calibrated_only, left_out, units: as in :class:`LoadedModel`.
    """

    shape: Architecture
    weights: StateDict
    normalize: bool
    precision: Precision | None = None
    updates: int = 0
    is_calibrated_only: bool = False
    left_out: tuple[str, ...] = ()
    units: tuple[str, ...] = ()

    def build(self) -> Hubert:
        """The model with random weights.

        Raises:
            LowbitError: a shape or precision that cannot be built.
        """
        classes = len(self.weights.get(LABEL_EMBEDDINGS, ()))
        return Hubert(self.shape, classes, self.precision, len(self.units))

    @property
    def has_final_projection(self) -> bool:
        return "final_proj.weight" in self.weights

    def fitting_weights(self, model: Hubert, name: object) -> StateDict:
        """The weights for a model that :meth:`build` made, complete.

        Args:
            name: of the source, for messages.

        Raises:
            LowbitError: weights that do not fit the shape, with the first ones.
        """
        weights = self.weights
        if not self.has_final_projection:
            weights = {**weights, **model.final_proj.state_dict(prefix="final_proj.")}
        differing = differences(model.state_dict(), weights)
        if differing:
            raise LowbitError(
                f"checkpoint {name} holds weights of another shape than its own configuration: "
                f"{differing}"
            )
        return weights


class Move(NamedTuple):
    """Keys that fully match ``pattern`` are renamed to ``to``, a template of :mod:`re`."""

    pattern: str
    to: str


class LeaveOut(NamedTuple):
    """Keys that fully match ``pattern`` have no place in the model; ``what`` says what they are."""

    pattern: str
    what: str


KeyMap = Sequence[Move | LeaveOut]


@dataclass
class Translation:
    """Weights under this package's keys, and what was left out."""

    weights: StateDict = field(default_factory=dict)
    left_out: dict[str, None] = field(default_factory=dict)  # ordered, each once


def translate(weights: StateDict, keys: KeyMap, name: object) -> Translation:
    """Renames every key by the first entry of ``keys`` that matches it.

    Args:
        name: of the source, for messages.

    Raises:
        LowbitError: keys that no entry matches, or two that would become one.
    """
    result, unknown = Translation(), []
    for key, tensor in weights.items():
        entry = next((entry for entry in keys if re.fullmatch(entry.pattern, key)), None)
        if entry is None:
            unknown.append(key)
        elif isinstance(entry, LeaveOut):
            result.left_out[entry.what] = None
        else:
            place = re.fullmatch(entry.pattern, key).expand(entry.to)
            if place in result.weights:
                raise LowbitError(f"{name}: two of its tensors belong to {place}, one is {key}")
            result.weights[place] = tensor
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise LowbitError(
            f"{name} holds tensors that have no place in a model of this package: "
            f"{', '.join(unknown[:3])}{more}"
        )
    return result
