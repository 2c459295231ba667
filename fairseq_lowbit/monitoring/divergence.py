"""The origin of a number that is not finite: the first such weight, output or gradient."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fairseq_lowbit.nn import eagerly


@dataclass(frozen=True)
class NonFinite:
    """The first thing that is not finite.

    Attributes:
        kind: what it is, in words.
        name: the module or parameter it belongs to; empty for the loss itself.
        peak: largest magnitude among the finite inputs of that module; None where there are none.
    """

    kind: str
    name: str
    peak: float | None = None

    def __str__(self) -> str:
        text = f"{self.kind} {self.name}".strip()
        return text if self.peak is None else f"{text}, whose inputs reach {self.peak:.3g}"


def first_non_finite(
    models: Mapping[str, nn.Module], loss: Callable[[], Tensor]
) -> NonFinite | None:
    """Runs one batch again, forward and backward, and checks every value on the way.

    Parameters and buffers come first, then module outputs in the order of the forward (so a module
    before the one that contains it), the loss, the gradients at module outputs in the order of the
    backward, and the gradients of parameters.

    Args:
        models: by the prefix of their modules' names, "" for the one in training.
        loss: computes the batch's loss from these models. The caller sets the random state
            and clears gradients afterwards.

    Returns:
        None when everything is finite.
    """
    named = [
        (_join(prefix, name), m) for prefix, model in models.items() for name, m in _inner(model)
    ]
    return _first_weight(models) or _first_on_the_way(named, loss) or _first_gradient(models)


def _first_weight(models: Mapping[str, nn.Module]) -> NonFinite | None:
    for prefix, model in models.items():
        for kind, tensors in (
            ("parameter", model.named_parameters()),
            ("buffer", model.named_buffers()),
        ):
            for name, tensor in tensors:
                if not _is_finite(tensor):
                    return NonFinite(kind, _join(prefix, name))
    return None


def _first_on_the_way(
    modules: list[tuple[str, nn.Module]], loss: Callable[[], Tensor]
) -> NonFinite | None:
    found: list[NonFinite] = []
    handles = [
        module.register_forward_hook(partial(_look, found, name)) for name, module in modules
    ]
    try:
        with eagerly():
            value = loss()
        if not found and not _is_finite(value):
            found.append(NonFinite("the loss itself, from finite outputs of all modules", ""))
        if not found and value.requires_grad:
            value.backward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _first_gradient(models: Mapping[str, nn.Module]) -> NonFinite | None:
    for prefix, model in models.items():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not _is_finite(parameter.grad):
                return NonFinite("the gradient of parameter", _join(prefix, name))
    return None


def _look(
    found: list[NonFinite], name: str, module: nn.Module, inputs: tuple, output: object
) -> None:
    if found:
        return
    for tensor in _tensors(output):
        if not _is_finite(tensor):
            found.append(NonFinite("the output of module", name, _peak(inputs)))
            return
        if tensor.requires_grad:
            tensor.register_hook(partial(_look_at_gradient, found, name))


def _look_at_gradient(found: list[NonFinite], name: str, gradient: Tensor) -> None:
    if not found and not _is_finite(gradient):
        found.append(NonFinite("the gradient at the output of module", name))


def _peak(inputs: tuple) -> float | None:
    peaks = [
        float(values.abs().max())
        for values in (t[torch.isfinite(t)].float() for t in _tensors(inputs))
        if values.numel()
    ]
    return max(peaks, default=None)


def _tensors(value: object) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _inner(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``model``, whose own output only repeats theirs."""
    return ((name, module) for name, module in model.named_modules() if name)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
