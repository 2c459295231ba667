import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq_lowbit.quantization import SquashedQuantizer, UncalibratedError, squash_penalty

BITS = pytest.mark.parametrize("bits", range(1, 9))
# Timing and chance stay out: no deadline, the same examples every time.
STEADY = settings(deadline=None, derandomize=True, database=None)
MATRICES = st.integers(2, 12).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(-100, 100, width=32), min_size=width, max_size=width),
        min_size=1,
        max_size=4,
    )
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(
    weight: Tensor, bits: int = 2, target_std: float = 0.84
) -> tuple[SquashedQuantizer, Tensor]:
    quantizer = SquashedQuantizer(bits, len(weight), weight[0].numel(), target_std)
    return quantizer, quantizer.fit(weight)


WEIGHTS = {
    "normal": 0.02 * normal(6, 400),
    "laplace": normal(6, 400) * normal(6, 400, seed=1).abs(),
    "uniform": torch.rand(6, 400, generator=torch.Generator().manual_seed(0)) - 0.5,
    "channels": normal(6, 400) * torch.logspace(-4, 2, 6)[:, None],
    "convolution": normal(6, 8, 5),
    "one outlier": torch.cat([normal(6, 399), torch.full((6, 1), 200.0)], 1),
    "off centre": normal(6, 400) + 1.0,
}


@pytest.mark.parametrize("target_std", [0.3, 0.84])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_channel_of_the_unsquashed_weight_has_the_target_spread(
    name: str, target_std: float
) -> None:
    weight = WEIGHTS[name]
    _, unsquashed = fitted(weight, target_std=target_std)
    assert unsquashed.shape == weight.shape
    spread = unsquashed.flatten(1).std(1, correction=0)
    torch.testing.assert_close(spread, torch.full((6,), target_std), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", WEIGHTS)
def test_target_is_the_float_weight_where_nothing_was_clipped(name: str) -> None:
    weight = WEIGHTS[name]
    quantizer, unsquashed = fitted(weight)
    target, limit = quantizer.target(unsquashed), 0.999 * quantizer.gain.detach()
    rows = weight.flatten(1)
    expected = rows.clamp(-limit, limit).view_as(weight)
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5 * rows.abs().max().item())
    clipped = (rows.abs() > limit).float().mean().item()
    assert quantizer.clipped_share(weight) == pytest.approx(clipped)
    assert clipped < 0.05


def test_the_share_clipped_of_a_normal_weight() -> None:
    # The gain is 2.2 standard deviations: atanh of what lies beyond weighs most in the spread.
    weight = normal(4, 100_000)
    quantizer, _ = fitted(weight)
    torch.testing.assert_close(quantizer.gain.detach(), torch.full((4, 1), 2.2), rtol=0, atol=0.03)
    beyond = math.erfc(0.999 * 2.2 / math.sqrt(2))
    assert quantizer.clipped_share(weight) == pytest.approx(beyond, abs=0.003)


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize(
    "row",
    [[0.02] * 8, [-3.0] * 8, [0.02, 0.0201, 0.0199, 0.02], [0.7], [0.0, 0.0, 5.0] + [0.0] * 200],
    ids=["constant", "negative", "nearly constant", "one weight", "one of many"],
)
def test_a_channel_that_no_gain_spreads_keeps_its_size(row: list[float], bits: int) -> None:
    """Looking for the gain among ever smaller ones would shrink the channel fiftyfold."""
    weight = torch.tensor([row])
    quantizer, unsquashed = fitted(weight, bits)
    assert quantizer.clipped_share(weight) == 0
    step = 1.01 * weight.abs().max() * 2 ** (1 - bits)
    assert (quantizer(unsquashed) - weight).abs().max() <= 0.5001 * step


@BITS
def test_zeros_stay_zeros(bits: int) -> None:
    weight = torch.stack([normal(300), torch.zeros(300)])
    quantizer, unsquashed = fitted(weight, bits)
    decoded = quantizer(unsquashed)
    assert torch.isfinite(unsquashed).all()
    assert decoded[1].abs().max() < 1e-6
    assert decoded[0].abs().min() > 1e-6


@STEADY
@given(rows=MATRICES, bits=st.integers(1, 8))
def test_decoded_values_are_half_a_step_from_their_target(rows: list, bits: int) -> None:
    weight = torch.tensor(rows)
    quantizer, unsquashed = fitted(weight, bits)
    codes = quantizer.codes(unsquashed)
    assert 0 <= codes.integers.min() <= codes.integers.max() < 2**bits
    error = (codes.decode() - quantizer.target(unsquashed)).abs()
    half_a_step = quantizer.gain.detach() * 2.0**-bits
    assert (error <= half_a_step * (1 + 1e-5)).all()
    assert torch.equal(quantizer(unsquashed), codes.decode())


@STEADY
@given(rows=MATRICES, exponent=st.integers(-10, 10))
def test_a_power_of_two_moves_from_the_weight_into_the_gain(rows: list, exponent: int) -> None:
    weight = torch.tensor(rows)
    weight[weight.abs() < 1e-3] = 1e-3
    quantizer, unsquashed = fitted(weight)
    scaled, same = fitted(weight * 2.0**exponent)
    torch.testing.assert_close(same, unsquashed, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scaled.gain, quantizer.gain * 2.0**exponent, rtol=1e-3, atol=0)


def test_more_bits_are_closer_to_a_float_weight() -> None:
    weight = WEIGHTS["normal"]
    errors = []
    for bits in (8, 4, 2, 1):
        quantizer, unsquashed = fitted(weight, bits)
        error = (quantizer(unsquashed) - weight).square().sum() / weight.square().sum()
        errors.append(error.item())
    assert errors == sorted(errors)
    # The best four even levels have .119, the best two .363.
    assert errors[2] < 0.13
    assert errors[3] < 0.5


def test_one_bit_has_the_values_of_half_the_gain() -> None:
    quantizer, unsquashed = fitted(WEIGHTS["normal"], bits=1)
    assert torch.equal(quantizer(unsquashed).abs(), (quantizer.gain / 2).expand(6, 400))
    assert torch.equal(quantizer(unsquashed) > 0, WEIGHTS["normal"] >= 0)


@BITS
def test_integers_with_one_sum_of_the_input_give_the_product(bits: int) -> None:
    """y = e^g (2^(1-n) (k . x) + (2^-n - 1) sum(x)), in whole numbers for integer x."""
    quantizer, unsquashed = fitted(normal(5, 7), bits)
    x = torch.tensor([3, -127, 0, 64, 1, -5, 99])
    integers = quantizer.codes(unsquashed).integers.long()
    # 2^n times the bracket.
    whole = 2 * integers @ x + (1 - 2**bits) * x.sum()
    expected = quantizer.gain.detach()[:, 0] * whole / 2**bits
    torch.testing.assert_close(quantizer(unsquashed).detach() @ x.float(), expected)


@BITS
def test_gradients_are_those_of_the_straight_through_definition(bits: int) -> None:
    quantizer, start = fitted(normal(5, 3, 4), bits)
    g = normal(5, 3, 4, seed=1)
    own = start.clone().requires_grad_()
    quantizer(own).backward(g)

    unsquashed, log_gain = start.clone().requires_grad_(), quantizer.log_gain.detach().clone()
    log_gain.requires_grad_()
    squashed = torch.tanh(unsquashed)
    level = (torch.floor((squashed + 1) * 2 ** (bits - 1)) * 2 + 1) / 2**bits - 1
    quantized = squashed + (level - squashed).detach()
    (log_gain.exp()[..., None] * quantized).backward(g)
    torch.testing.assert_close(own.grad, unsquashed.grad)
    torch.testing.assert_close(quantizer.log_gain.grad, log_gain.grad)


def test_penalty_by_hand() -> None:
    first, second = torch.tensor([[1.0, -1.0], [3.0, 1.0]]), torch.tensor([0.84, -0.84])
    # Mean 1 and standard deviation sqrt(2); mean 0 and .84.
    expected = ((math.sqrt(2) - 0.84) ** 2 + 1 + 0) / 2
    assert squash_penalty([(first, 0.84), (second, 0.84)]).item() == pytest.approx(
        expected, rel=1e-6
    )


def test_penalty_has_the_gradient_of_its_definition() -> None:
    tensors = [normal(4, 5) + 0.3, 0.2 * normal(7, seed=1)]
    for tensor in tensors:
        tensor.requires_grad_()
    squash_penalty([(tensor, 0.84) for tensor in tensors]).backward()
    for tensor in tensors:
        p = tensor.detach().double()
        count, mean, std = p.numel(), p.mean(), p.std(correction=0)
        expected = 2 * (std - 0.84) * (p - mean) / (count * std) + 2 * mean / count
        torch.testing.assert_close(tensor.grad.double(), expected / len(tensors))


def test_penalty_vanishes_at_the_start_and_drives_back_to_it() -> None:
    _, unsquashed = fitted(WEIGHTS["normal"])
    assert squash_penalty([(unsquashed, 0.84)]).item() < 1e-4
    p = nn.Parameter(0.1 * unsquashed + 0.5)
    optimizer = torch.optim.Adam([p], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        squash_penalty([(p, 0.84)]).backward()
        optimizer.step()
    assert p.mean().item() == pytest.approx(0, abs=0.02)
    assert p.std(correction=0).item() == pytest.approx(0.84, abs=0.02)


def test_penalty_of_a_constant_tensor_has_a_finite_gradient() -> None:
    p = torch.zeros(3, 4, requires_grad=True)
    squash_penalty([(p, 0.84)]).backward()
    assert torch.equal(p.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_quantized_in_fp32(dtype: torch.dtype) -> None:
    quantizer, unsquashed = fitted(WEIGHTS["normal"], bits=4)
    p = unsquashed.to(dtype)
    codes = quantizer.codes(p)
    assert torch.equal(codes.integers, quantizer.codes(p.float()).integers)
    assert torch.equal(quantizer(p), codes.decode().to(dtype))
    p.requires_grad_()
    quantizer(p).float().sum().backward()
    assert p.grad.dtype == dtype
    assert quantizer.log_gain.grad.dtype == torch.float32
    penalty = squash_penalty([(p, 0.84)])
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(squash_penalty([(p.float(), 0.84)]).item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fitting_a_half_weight_works_in_fp32(dtype: torch.dtype) -> None:
    half = WEIGHTS["normal"].to(dtype)
    (quantizer, p), (expected, q) = fitted(half), fitted(half.float())
    assert p.dtype == torch.float32
    assert torch.equal(p, q)
    assert torch.equal(quantizer.log_gain, expected.log_gain)


def test_keeps_nothing_but_its_inputs_for_the_backward() -> None:
    quantizer, start = fitted(normal(3, 4))
    p, saved = nn.Parameter(start), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        quantizer(p)
    # Per-channel values aside: the gain and what exp keeps of it.
    assert [t.data_ptr() for t in saved if t.numel() > 3] == [p.data_ptr()]


def test_forward_backward_and_penalty_never_wait_for_the_device() -> None:
    # Under FakeTensorMode, reading a value (.item(), bool()) raises.
    with FakeTensorMode():
        quantizer = SquashedQuantizer(2, 3, 4, target_std=0.84)
        quantizer.mark_calibrated(True)
        p = torch.randn(3, 4, requires_grad=True)
        (quantizer(p).square().sum() + squash_penalty([(p, 0.84)])).backward()
        assert p.grad.shape == p.shape
        assert quantizer.log_gain.grad.shape == (3, 1)


@pytest.mark.parametrize(
    "use", [lambda q: q(torch.ones(2, 2)), lambda q: q.codes(torch.ones(2, 2))]
)
def test_every_use_before_the_fit_raises(use) -> None:
    with pytest.raises(UncalibratedError):
        use(SquashedQuantizer(2, 2, 2, target_std=0.84))


def test_state_dict_carries_gains_and_flag() -> None:
    source, p = fitted(normal(3, 8), bits=3)
    target = SquashedQuantizer(3, 3, 8, target_std=0.84)
    target.load_state_dict(source.state_dict())
    assert target.is_calibrated
    assert torch.equal(target(p), source(p))


def test_casts_and_copies_keep_gains_and_their_group() -> None:
    source, p = fitted(normal(3, 8))
    before = source.log_gain.detach().clone()
    twin = copy.deepcopy(source.bfloat16())
    for quantizer in (source, twin):
        assert quantizer.log_gain.dtype == torch.float32
        assert torch.equal(quantizer.log_gain, before)
        assert quantizer.log_gain.param_group == "quantizer_scale"
    assert torch.equal(twin(p), source(p))
