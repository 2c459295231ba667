"""Work in blocks gives what work on the whole gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.quantization import (
    ElasticQuantizer,
    Quantizer,
    SquashedQuantizer,
    UniformQuantizer,
    mid_rise,
    non_negative,
    signed,
    squash_penalty,
)
from fairseq_lowbit.quantization import execution as module
from fairseq_lowbit.quantization.execution import blocks, use_executor


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the size of blocks."""

    def set_size(values: int) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        monkeypatch.setattr(module, "BLOCK", values)

    return set_size


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [1, 4, 7, 10, 23, 1000])
@pytest.mark.parametrize("shape", [(), (23,), (1, 23), (5, 7), (2, 1, 9), (3, 4, 5), (2, 3, 4, 5)])
def test_every_value_is_in_one_small_block(small, shape: tuple[int, ...], size: int) -> None:
    small(size)
    x = torch.zeros(shape)
    for (part,) in blocks(x):
        assert part.numel() <= size
        part.add_(1)
    assert (x == 1).all()


@pytest.mark.parametrize("size", [1, 4, 7, 20, 1000])
def test_others_follow_as_they_broadcast(small, size: int) -> None:
    small(size)
    x = random(2, 3, 4, 5)
    others = [random(*shape) for shape in [(), (5,), (4, 1), (2, 1, 1, 1), (1, 3, 1, 5), x.shape]]
    found = torch.empty_like(x)
    for part, out, nothing, *mine in blocks(x, found, None, *others):
        assert nothing is None
        torch.add(part, sum(mine), out=out)
    assert torch.equal(found, x + sum(others))


def test_few_values_stay_together() -> None:
    x, scale = random(300, 400), torch.ones(())
    ((part, same),) = blocks(x, scale)
    assert part is x
    assert same is scale


def test_other_devices_get_one_block(small) -> None:
    small(1)
    x = torch.empty(5, 7, device="meta")
    assert [part for (part,) in blocks(x)] == [x]


def elastic(levels, **kwargs) -> ElasticQuantizer:
    quantizer = ElasticQuantizer(levels, 6, **kwargs)
    quantizer.set_scale(torch.tensor(0.3), None if quantizer.shift is None else torch.tensor(0.1))
    return quantizer


def squashed(bits: int) -> SquashedQuantizer:
    quantizer = SquashedQuantizer(bits, 8, 30, target_std=0.84)
    quantizer.fit(random(8, 30))
    return quantizer


RATIO = torch.tensor([0.7, 1.6])[:, None, None]
CASES = {
    "sign per tensor": (elastic(signed(1)), (8, 30), None),
    "signed per channel": (elastic(signed(2), scales=8, group_size=30), (8, 6, 5), None),
    "signed per group": (elastic(signed(3), scales=16, group_size=15), (8, 30), None),
    "mid-rise": (elastic(mid_rise(2)), (8, 30), None),
    "shift": (elastic(signed(4), shift_shape=()), (2, 9, 5), None),
    "shift per channel": (elastic(signed(1), shift_shape=(5,)), (2, 9, 5), None),
    "probabilities": (elastic(non_negative(2), shift_shape=()), (2, 9, 5), RATIO),
    "squashed, 1 bit": (squashed(1), (8, 30), None),
    "squashed, 3 bits": (squashed(3), (8, 30), None),
    "absmax per frame": (UniformQuantizer("absmax", 8, frame_dim=-1), (2, 9, 5), None),
    "absmax over channels": (UniformQuantizer("absmax", 4, frame_dim=1), (2, 9, 5), None),
    "absmax of all": (UniformQuantizer("absmax", 1), (8, 30), None),
    "minmax per row": (UniformQuantizer("minmax", 3, group_size=30), (8, 6, 5), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("name", CASES)
def test_quantizers_do_not_see_the_blocks(
    small, name: str, is_transposed: bool, dtype: torch.dtype
) -> None:
    quantizer, shape, ratio = CASES[name]
    x, g = random(*shape).to(dtype), random(*shape).flip(0).to(dtype)
    if is_transposed:
        x, g = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, g))
    whole = run(quantizer, x, g, ratio)
    small(13)
    decoded, *gradients = run(quantizer, x, g, ratio)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, whole[0])
    for gradient, expected in zip(gradients, whole[1:], strict=True):
        torch.testing.assert_close(gradient, expected)


def run(quantizer: Quantizer, x: Tensor, g: Tensor, ratio: Tensor | None) -> list[Tensor]:
    """Decoded values and every gradient."""
    x = x.detach().requires_grad_()
    decoded = quantizer(x, ratio)
    return [decoded.detach(), *torch.autograd.grad(decoded, [x, *quantizer.parameters()], g)]


def test_the_penalty_does_not_see_them_either(small) -> None:
    p = (random(8, 30) + 0.4).requires_grad_()
    whole = squash_penalty([(p, 0.84)])
    (expected,) = torch.autograd.grad(whole, p)
    small(13)
    penalty = squash_penalty([(p, 0.84)])
    torch.testing.assert_close(penalty, whole)
    torch.testing.assert_close(torch.autograd.grad(penalty, p)[0], expected)


@pytest.mark.parametrize("executor", ["whole", pytest.param("compiled", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", CASES)
def test_every_executor_gives_the_same_values(name: str, executor: str) -> None:
    quantizer, shape, ratio = CASES[name]
    x, g = random(*shape), random(*shape).flip(0)
    expected, *gradients = run(quantizer, x, g, ratio)
    with use_executor(executor):
        decoded, *found = run(quantizer, x, g, ratio)
    assert torch.equal(decoded, expected)
    for gradient, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient, other)


def test_an_unknown_executor_is_refused() -> None:
    with pytest.raises(LowbitError, match="'gpu'; allowed are whole, blocks, compiled"):
        use_executor("gpu").__enter__()
