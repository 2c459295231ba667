"""Analytic cost of a model for one utterance, operator by operator.

The definitions are those of Yeh et al., Table 1: a multiply-accumulate is two operations; with both
operands quantized each counts max(weight bits, activation bits) in QuantOps, else 1 in FLOPs.
Convolutions, linears and the two products of attention count, norms and activations do not.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models.architecture import SAMPLE_RATE
from fairseq_lowbit.models.protocols import HasOperatorSteps
from fairseq_lowbit.nn.work import HasWork, Steps, modules_with_work, recorded_steps
from fairseq_lowbit.precision import PlanEntry
from fairseq_lowbit.precision.grammar import FLOAT_BITS
from fairseq_lowbit.precision.storage import FLOAT_BYTES

ACTIVATION_BYTES = 4
# Bits of quantized work that take as long as one floating-point operation: the paper's own anchor,
# 1898.44 Gbit = 28.55 GFLOPs.
CONVERSION_RATE = 66.5


@dataclass(frozen=True)
class Cost:
    """One operator and one utterance.

    Attributes:
        module: its name; attention has ``<attention>.scores``, ``.softmax`` and ``.context``.
        operations: 2 per multiply-accumulate.
        bits: of an operation, max(weight bits, activation bits); 16 where a side is float.
        values: activations that it reads and writes, or the norm or GELU behind it if these are
            more.
    """

    module: str
    parameters: int
    storage_bytes: float
    operations: int = 0
    bits: int = FLOAT_BITS
    values: int = 0

    @property
    def flops(self) -> int:
        """Operations with at least one float operand."""
        return self.operations if self.bits == FLOAT_BITS else 0

    @property
    def quantops(self) -> int:
        """Bits of the operations between quantized operands."""
        return 0 if self.bits == FLOAT_BITS else self.operations * self.bits

    @property
    def activation_bytes(self) -> int:
        """Of ``values``, in fp32, batch 1."""
        return ACTIVATION_BYTES * self.values


@dataclass(frozen=True)
class Profile:
    """All costs of one model for ``seconds`` of audio at 16 kHz.

    Attributes:
        form: of the plan, see :attr:`fairseq_lowbit.precision.Plan.form`.
    """

    name: str
    seconds: float
    costs: tuple[Cost, ...]
    form: str | None = None

    @cached_property
    def parameters(self) -> int:
        return sum(cost.parameters for cost in self.costs)

    @cached_property
    def storage_bytes(self) -> float:
        """Every stored tensor at its own width, float ones at 16 bits."""
        return sum(cost.storage_bytes for cost in self.costs)

    @cached_property
    def flops(self) -> int:
        return sum(cost.flops for cost in self.costs)

    @cached_property
    def quantops(self) -> int:
        """In bits."""
        return sum(cost.quantops for cost in self.costs)

    @cached_property
    def peak_activation_bytes(self) -> int:
        """Most that one operator reads and writes, in fp32, batch 1."""
        return max(cost.activation_bytes for cost in self.costs)

    def runtime(self, reference: "Profile", conversion_rate: float = CONVERSION_RATE) -> float:
        """Estimated time in units of ``reference``'s: (FLOPs + QuantOps/K) over its FLOPs.

        Raises:
            LowbitError: a conversion rate K that is not positive, not finite or so small that the
                result is not.
        """
        if not 0 < conversion_rate < math.inf:
            raise LowbitError(f"conversion rate K is {conversion_rate}: want a positive number")
        runtime = (self.flops + self.quantops / conversion_rate) / reference.flops
        if not math.isfinite(runtime):
            raise LowbitError(
                f"conversion rate K is {conversion_rate:g}, which makes the runtime infinite: want "
                "more"
            )
        return runtime


def profile(
    model: nn.Module,
    name: str,
    seconds: float = 10.0,
    run: Callable[[], object] | None = None,
) -> Profile:
    """Counts what a model with a ``plan`` costs for one utterance.

    Args:
        model: with :meth:`~HasOperatorSteps.operator_steps` it is not run, and may be on the meta
            device.
        run: for any other model, runs it on one utterance of so many seconds; the calls of its
            operators and attentions are what is counted.

    Raises:
        LowbitError: audio too short for a single frame; a model that has to be run, without
            ``run``.
    """
    if run is not None:
        steps = recorded_steps(model, run)
    elif isinstance(model, HasOperatorSteps):
        steps = model.operator_steps(int(seconds * SAMPLE_RATE))
    else:
        raise LowbitError(
            f"{type(model).__name__} does not state the calls of its operators (operator_steps): "
            "give run, which runs it on one utterance"
        )
    if any(call.written < 1 for calls in steps.values() for call in calls):
        raise LowbitError(f"{seconds:g} s of audio give no frame: want more seconds")
    entries = {entry.module: entry for entry in model.plan.entries}
    costs = [
        cost
        for name, module in modules_with_work(model)
        for cost in _costs(name, module, entries, steps.get(name, ()))
    ]
    other = model.plan.other_parameters
    costs.append(Cost("(norms, embeddings)", other, other * FLOAT_BYTES))
    return Profile(name, seconds, tuple(costs), model.plan.form)


def _costs(
    name: str, module: HasWork, entries: Mapping[str, PlanEntry], calls: Sequence[Steps]
) -> Iterator[Cost]:
    """One for every part of the module; what is never called is stored all the same."""
    for works in zip(*(module.work(steps) for steps in calls or [Steps(0, 0)]), strict=True):
        part, operands = works[0].part, works[0].operands
        names = [f"{name}.{operand}" for operand in operands] if part else [name]
        own = [entries[name] for name in names]
        operations = sum(2 * work.multiply_accumulates for work in works)
        yield Cost(
            f"{name}.{part}" if part else name,
            sum(entry.parameters for entry in own),
            sum(entry.bytes for entry in own),
            operations,
            max(_bits(entry) for entry in own) if operations else FLOAT_BITS,
            max(work.values for work in works),
        )


def _bits(entry: PlanEntry) -> int:
    """Of an operation on what the entry describes, an operand or a weight and its input."""
    if entry.kind == "operand":
        return entry.activation_bits
    return max(entry.weight_bits, entry.activation_bits)
