"""Operators keep no decoded values for the backward, and nothing else changes by it."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fairseq_lowbit.nn import Conv1d, Linear, PositionalConv1d, SelfAttention
from fairseq_lowbit.quantization import (
    ElasticQuantizer,
    Quantizer,
    SquashedQuantizer,
    UniformQuantizer,
    non_negative,
    product,
    signed,
)

FEATURES, FRAMES = 6, 11
BF16 = partial(torch.autocast, "cpu", torch.bfloat16)
FP16 = partial(torch.autocast, "cpu", torch.float16)
PRECISIONS = pytest.mark.parametrize(
    "precision", [nullcontext, BF16, FP16], ids=["", "bf16", "fp16"]
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def elastic(shift_shape: tuple[int, ...] | None = None, **kwargs: int) -> ElasticQuantizer:
    quantizer = ElasticQuantizer(signed(2), 6, shift_shape=shift_shape, **kwargs)
    quantizer.set_scale(torch.tensor(0.3), torch.tensor(0.1))
    return quantizer


def squashed() -> SquashedQuantizer:
    quantizer = SquashedQuantizer(2, channels=4, group_size=6, target_std=0.84)
    quantizer.mark_calibrated(True)
    return quantizer


def linear(weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None) -> Linear:
    torch.manual_seed(0)
    module = Linear(FEATURES, 4)
    module.weight_quantizer, module.input_quantizer = weight_quantizer, input_quantizer
    return module


def convolution(kind: type[nn.Module], *arguments: int, **more: object) -> nn.Module:
    torch.manual_seed(0)
    module = kind(*arguments, **more)
    module.weight_quantizer, module.input_quantizer = elastic(), elastic(())
    return module


def attention() -> SelfAttention:
    torch.manual_seed(0)
    module = SelfAttention(FEATURES, 2)
    for operand in ("query", "key", "value"):
        setattr(module, f"{operand}_quantizer", elastic((FEATURES,)))
    module.probabilities_quantizer = ElasticQuantizer(non_negative(2), 20, shift_shape=())
    module.probabilities_quantizer.set_scale(torch.tensor(0.1), torch.tensor(-0.02))
    module.reference_frames = 20
    module.input_quantizer = elastic(())
    for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        projection.weight_quantizer = elastic()
    return module


def frames_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


MASK = torch.arange(FRAMES) >= torch.tensor([[FRAMES], [7]])
# What is built, and how it is called with x, [2, frames, features].
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "linear": (lambda: linear(elastic(), elastic(())), lambda m, x: m(x)),
    "linear, squashed": (lambda: linear(squashed(), elastic(())), lambda m, x: m(x)),
    "linear in groups": (
        lambda: linear(elastic(scales=8, group_size=3), elastic(())),
        lambda m, x: m(x),
    ),
    "linear, float input": (lambda: linear(elastic(), None), lambda m, x: m(x)),
    "linear, float weight": (lambda: linear(None, elastic(())), lambda m, x: m(x)),
    "convolution": (
        lambda: convolution(Conv1d, 6, 4, 3, 2, padding=1, dilation=2, groups=2),
        lambda m, x: m(frames_first(x)),
    ),
    "convolution, same": (
        lambda: convolution(Conv1d, 6, 4, 4, padding="same"),
        lambda m, x: m(frames_first(x)),
    ),
    "convolution, circular": (
        lambda: convolution(Conv1d, 6, 4, 3, padding=2, padding_mode="circular"),
        lambda m, x: m(frames_first(x)),
    ),
    "positional": (
        lambda: convolution(PositionalConv1d, 6, 4, 3),
        lambda m, x: m(frames_first(x), MASK),
    ),
    "attention": (attention, lambda m, x: m(x, None, "probabilities").values),
    "attention, padded": (attention, lambda m, x: m(x, MASK, "probabilities").values),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


def gradients(
    name: str,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    wrap: Callable[[Callable, Tensor], Tensor] = lambda call, x: call(x),
    module: nn.Module | None = None,
) -> list[Tensor]:
    """Output, and gradients of x and every parameter."""
    build, call = CASES[name]
    module = module or build()
    x = random(2, FRAMES, FEATURES).requires_grad_()
    with precision():
        output = wrap(lambda values: call(module, values), x)
    output.float().square().sum().backward()
    return [output.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own, other)


@PRECISIONS
@EVERY_CASE
def test_gradients_are_those_of_kept_values(monkeypatch, name: str, precision) -> None:
    own = gradients(name, precision)
    monkeypatch.setattr(product, "_source", lambda values: None)
    assert_same(own, gradients(name, precision))


@pytest.mark.parametrize("is_reentrant", [False, True])
@EVERY_CASE
def test_gradient_checkpointing_changes_nothing(name: str, is_reentrant: bool) -> None:
    def wrap(call: Callable, x: Tensor) -> Tensor:
        return checkpoint(call, x, use_reentrant=is_reentrant)

    for precision in (nullcontext, BF16):
        assert_same(gradients(name, precision, wrap), gradients(name, precision))


@EVERY_CASE
def test_a_deep_copy_computes_the_same(name: str) -> None:
    module = CASES[name][0]()
    CASES[name][1](module, random(2, FRAMES, FEATURES))
    assert_same(gradients(name, module=copy.deepcopy(module)), gradients(name))


def test_a_backward_inside_of_autocast_computes_the_same() -> None:
    def run(is_inside: bool) -> Tensor:
        module, x = linear(elastic(), elastic(())), random(5, FEATURES)
        with BF16():
            loss = module(x).square().sum()
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        return module.weight.grad

    assert torch.equal(run(True), run(False))


def saved_by(call: Callable[[], object]) -> set[int]:
    """Storages of more values than a quantizer has scales that the graph keeps."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = call()
    assert output.requires_grad
    return {t.untyped_storage().data_ptr() for t in kept if t.numel() > 8}


OWN_CASES = [name for name in CASES if "linear" in name or name.startswith("convolution")]


@PRECISIONS
@pytest.mark.parametrize("name", [n for n in OWN_CASES if "float" not in n])
def test_nothing_but_input_and_weight_is_kept(name: str, precision) -> None:
    build, call = CASES[name]
    module, x = build(), random(2, FRAMES, FEATURES).requires_grad_()
    with precision():
        kept = saved_by(lambda: call(module, x))
    assert kept == {t.untyped_storage().data_ptr() for t in (x, module.weight)}


@pytest.mark.parametrize("name", ["positional", "attention", "attention, padded"])
@PRECISIONS
def test_a_quantized_module_keeps_no_more_than_its_raw_operands(name: str, precision) -> None:
    build, call = CASES[name]
    quantized, x = build(), random(2, FRAMES, FEATURES).requires_grad_()
    plain = copy.deepcopy(quantized)
    for module in plain.modules():
        for slot in [n for n, child in module.named_children() if isinstance(child, Quantizer)]:
            delattr(module, slot)
            setattr(module, slot, None)
    counts = []
    for module in (quantized, plain):
        with precision():
            counts.append(len(saved_by(lambda module=module: call(module, x))))
    assert counts[0] <= counts[1]


@pytest.mark.parametrize(
    "make",
    [
        elastic,
        lambda: elastic(scales=4, group_size=6),
        lambda: elastic(scales=8, group_size=3),
        squashed,
        lambda: UniformQuantizer("absmax", 4, group_size=6),
        lambda: UniformQuantizer("minmax", 4),
    ],
    ids=["per tensor", "per channel", "per group", "squashed", "absmax", "minmax"],
)
def test_weights_of_every_method_are_decoded_again(make) -> None:
    module, x = linear(make(), elastic(())), random(5, FEATURES).requires_grad_()
    kept = saved_by(lambda: module(x))
    assert kept == {t.untyped_storage().data_ptr() for t in (x, module.weight)}


def test_an_activation_without_a_learned_scale_is_kept_once() -> None:
    # Nothing else needs the values before its quantizer: decoding again would keep them instead.
    module = linear(elastic(), UniformQuantizer("absmax", 8, frame_dim=-1))
    decoded: list[Tensor] = []
    module.input_quantizer.register_forward_hook(lambda *io: decoded.append(io[2]))
    x = random(5, FEATURES).requires_grad_() * 1
    kept = saved_by(lambda: module(x))
    assert kept == {t.untyped_storage().data_ptr() for t in (decoded[0], module.weight)}


def test_a_frozen_weight_needs_no_input() -> None:
    module, x = linear(elastic(), elastic(())), random(5, FEATURES).requires_grad_()
    expected = torch.autograd.grad(module(x).sum(), x)[0]
    module.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(module(x).sum(), x)[0], expected)


def test_micro_batches_add_up() -> None:
    module = linear(elastic(), elastic(()))
    batches = [random(5, 6, seed=seed) for seed in (0, 1)]
    for batch in batches:
        module(batch).square().sum().backward()
    apart = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    module(torch.cat(batches)).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(apart[name], parameter.grad)


def test_a_weight_changed_before_the_backward_is_an_error() -> None:
    module = linear(elastic(), elastic(()))
    loss = module(random(5, 6)).sum()
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_values_changed_behind_their_quantizer_are_kept() -> None:
    quantizer, x = elastic(()), random(5, FEATURES)
    values = product.through(quantizer(x), lambda v: v + 1).mul_(2)
    weight = random(4, FEATURES, seed=1).requires_grad_()
    product.linear(values, weight, None).sum().backward()
    expected = 2 * (quantizer.codes(x).decode() + 1).sum(0)
    torch.testing.assert_close(weight.grad, expected.expand(4, FEATURES))


def test_without_a_graph_nothing_is_remembered() -> None:
    with torch.no_grad():
        values = elastic(())(random(5, 6))
    assert not hasattr(values, "source")
