"""Speech models with 1, 2, 4 and 8-bit weights and activations, trained in fairseq.

Importing the package is light: it loads neither torch, fairseq nor Hydra. ``docs/design.md`` says
what each folder is for and which way imports run.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fairseq_lowbit.precision import Precision, Rule

__version__ = "0.5.0"
Model = TypeVar("Model")

# fairseq imports this package by its --user-dir (`common.user_dir`) and expects tasks, criterions
# and models to be registered by that import alone. Then its own tasks are loaded already; without
# them nobody is waiting for a registration, and loading fairseq here would cost seconds.
if "fairseq.tasks" in sys.modules:
    from fairseq_lowbit.plugin import register

    register()


def quantize(
    model: Model,
    precision: "str | Precision",
    rules: "Iterable[Rule | Mapping[str, Any]]" = (),
) -> Model:
    """Quantizes any torch model in place.

    Parameters, hooks and state-dict keys stay what they are; quantizers add keys below the operator
    that they belong to. In models of an unknown type the name reaches every ``nn.Linear``, and
    rules reach ``nn.Conv1d`` and ``nn.Embedding`` too. Known are the HuBERT, wav2vec 2.0 and WavLM
    of Hugging Face and the HuBERT and wav2vec 2.0 of fairseq: there the name reaches the linears of
    the encoder and the operands of its attention. What was quantized before is float again first.

    Args:
        precision: a name such as ``bitl_w4a4``, see ``docs/precision.md``.
        rules: refine it, each a ``Rule`` or a mapping of its fields.

    Returns:
        ``model``, with the resolved plan as ``model.plan``; calibrate it before it is used.

    Raises:
        LowbitError: nothing to quantize, a precision or rule that reaches nothing, a rule that
            reaches a weight of unknown type, or a shared weight reached by one of its names only.
            The model is left as it was.
    """
    from fairseq_lowbit.interop import huggingface
    from fairseq_lowbit.nn import swap

    huggingface.register()
    if "fairseq" in sys.modules:
        from fairseq_lowbit.plugin import adapters

        adapters.register()
    return swap.quantize(model, precision, rules)


def calibrate(
    model: Model, batches: Iterable[Any], forward: Callable[[Any], object] | None = None
) -> dict[str, float]:
    """Fits every quantizer of a quantized model to its weights and to what it sees in ``batches``.

    Args:
        batches: a list or loader of batches without padding. A mapping is passed by keywords, a
            tuple or list by positions, anything else as one argument.
        forward: runs the model on one batch in another way.

    Returns:
        by module, the share of its weights that squashing clipped.

    Raises:
        LowbitError: ``batches`` is empty or itself a batch, or a quantizer was never called.
    """
    from fairseq_lowbit.errors import LowbitError
    from fairseq_lowbit.nn import calibrate as fit

    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        raise LowbitError("batches is a single batch: give a list of batches")

    def call(batch: Any) -> object:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)

    return fit(model, batches, forward or call)
