"""Operators keep no decoded values for the backward, and nothing else changes by it."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.nn import Conv1d, Linear, PositionalConv1d, SelfAttention, attention, operators
from fairseq_lowbit.quantization import (
    ElasticQuantizer,
    Quantizer,
    SquashedQuantizer,
    UniformQuantizer,
    non_negative,
    recomputed,
    signed,
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
    module = Linear(6, 4)
    module.weight_quantizer, module.input_quantizer = weight_quantizer, input_quantizer
    return module


def kept(module: Linear, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(decoded, what the backward of the product gets for it) of weight and input."""
    decoded: list[Tensor] = []
    for quantizer in (module.weight_quantizer, module.input_quantizer):
        quantizer.register_forward_hook(lambda *io: decoded.append(io[2].detach()))
    node = module(x).grad_fn
    decoded.sort(key=lambda tensor: tensor.shape == x.shape)
    return [(decoded[0], node._saved_mat2.T), (decoded[1], node._saved_mat1)]


WEIGHT_QUANTIZERS = pytest.mark.parametrize(
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


@WEIGHT_QUANTIZERS
def test_decoded_values_are_not_kept_but_decoded_again(make) -> None:
    module = linear(make(), elastic(()))
    for decoded, saved in kept(module, random(5, 6)):
        assert torch.equal(saved, decoded)
        assert saved.data_ptr() != decoded.data_ptr()


def test_an_activation_without_a_learned_scale_is_kept_once() -> None:
    # Nothing else needs the values before its quantizer: decoding again would keep them instead.
    module = linear(elastic(), UniformQuantizer("absmax", 8, frame_dim=-1))
    x = random(5, 6).requires_grad_() * 1
    (_, weight), (decoded, saved) = kept(module, x)
    assert saved.data_ptr() == decoded.data_ptr()
    assert weight.shape == (4, 6)


def attention_of_every_quantizer() -> SelfAttention:
    module = SelfAttention(6, 2)
    for operand in ("query", "key", "value"):
        setattr(module, f"{operand}_quantizer", elastic((6,)))
    module.probabilities_quantizer = ElasticQuantizer(non_negative(2), 20, shift_shape=())
    module.probabilities_quantizer.set_scale(torch.tensor(0.1), torch.tensor(-0.02))
    module.input_quantizer = elastic(())
    for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        projection.weight_quantizer = elastic()
    return module


def convolution(kind: type[nn.Module], *arguments: int) -> nn.Module:
    module = kind(*arguments)
    module.weight_quantizer, module.input_quantizer = elastic(), elastic(())
    return module


@pytest.mark.parametrize(
    "build, shape",
    [
        (lambda: linear(squashed(), elastic(())), (2, 5, 6)),
        (lambda: linear(elastic(scales=8, group_size=3), elastic(())), (2, 5, 6)),
        (lambda: convolution(Conv1d, 6, 4, 3, 2), (2, 6, 11)),
        (lambda: convolution(PositionalConv1d, 6, 4, 3), (2, 6, 11)),
        (attention_of_every_quantizer, (2, 5, 6)),
    ],
    ids=["linear", "linear in groups", "convolution", "positional", "attention"],
)
def test_gradients_are_those_of_kept_values(monkeypatch, build, shape) -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        module, x = build(), random(*shape).requires_grad_()
        output = module(x)
        output = output.values if isinstance(output, tuple) else output
        output.square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in module.parameters())]

    own = gradients()
    for room in (operators, attention):
        monkeypatch.setattr(room, "recomputed", lambda *_: nullcontext())
    for gradient, expected in zip(own, gradients(), strict=True):
        assert torch.equal(gradient, expected)


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


def test_float_values_are_left_alone() -> None:
    x, weight = random(5, 6).requires_grad_(), random(4, 6).requires_grad_()
    assert isinstance(recomputed(x, weight), nullcontext)
    with torch.no_grad():
        assert isinstance(recomputed(elastic()(weight), elastic(())(x)), nullcontext)
