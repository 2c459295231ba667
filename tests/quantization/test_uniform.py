import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq_lowbit.quantization import UniformQuantizer

KINDS = ("absmax", "minmax")
KIND = pytest.mark.parametrize("kind", KINDS)
BITS = pytest.mark.parametrize("bits", range(1, 9))
# All but the sign set, whose two levels lie at the mean.
FULL_RANGE = [("absmax", n) for n in range(2, 9)] + [("minmax", n) for n in range(1, 9)]
# Timing and chance stay out: no deadline, the same examples every time.
STEADY = settings(deadline=None, derandomize=True, database=None)
VALUES = st.floats(-1e6, 1e6, width=32)
MATRICES = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(VALUES, min_size=width, max_size=width), min_size=1, max_size=5)
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def per_frame(kind: str, bits: int) -> UniformQuantizer:
    return UniformQuantizer(kind, bits, frame_dim=-1)


@STEADY
@given(rows=MATRICES, kind=st.sampled_from(KINDS), bits=st.integers(1, 8))
def test_forward_is_codes_decoded_and_changes_nothing(rows: list, kind: str, bits: int) -> None:
    x = torch.tensor(rows)
    before = x.clone()
    quantizer = per_frame(kind, bits)
    codes = quantizer.codes(x)
    assert torch.equal(quantizer(x), codes.decode())
    assert codes.integers.dtype == torch.int16
    assert codes.integers.min() >= quantizer.levels.lo
    assert codes.integers.max() <= quantizer.levels.hi
    assert torch.equal(x, before)


@STEADY
@given(rows=MATRICES, method=st.sampled_from(FULL_RANGE))
def test_decoded_values_are_half_a_step_away(rows: list, method: tuple[str, int]) -> None:
    """Nothing is clipped, because the range is that of the values themselves."""
    x = torch.tensor(rows)
    codes = per_frame(*method).codes(x)
    assert ((codes.decode() - x).abs() <= codes.scale / 2 * (1 + 1e-4)).all()
    assert not codes.is_clipped(x).any()


@STEADY
@given(rows=MATRICES, bits=st.integers(1, 8))
def test_minmax_decodes_zero_exactly(rows: list, bits: int) -> None:
    x = torch.tensor(rows)
    x = torch.cat([x, torch.zeros(len(x), 1)], 1)
    codes = per_frame("minmax", bits).codes(x)
    assert (codes.decode()[:, -1] == 0).all()
    zero_point = codes.zero_point
    assert torch.equal(zero_point, zero_point.round())
    assert 0 <= zero_point.min() <= zero_point.max() < 2**bits


@STEADY
@given(
    rows=MATRICES,
    kind=st.sampled_from(KINDS),
    bits=st.integers(1, 8),
    exponent=st.integers(-30, 30),
)
def test_a_power_of_two_changes_the_scale_alone(rows, kind, bits, exponent) -> None:
    x = torch.tensor(rows)
    x[x.abs() < 1e-3] = 0  # no power in question reaches the end of fp32
    factor = 2.0**exponent
    codes, scaled = per_frame(kind, bits).codes(x), per_frame(kind, bits).codes(x * factor)
    assert torch.equal(scaled.integers, codes.integers)
    # At one bit a frame of zeros has the smallest scale whatever the power.
    torch.testing.assert_close(scaled.decode(), codes.decode() * factor, rtol=0, atol=1e-30)


@STEADY
@given(rows=MATRICES, kind=st.sampled_from(KINDS), bits=st.integers(1, 8))
def test_a_frame_knows_nothing_of_the_others(rows: list, kind: str, bits: int) -> None:
    x, quantizer = torch.tensor(rows), per_frame(kind, bits)
    together = quantizer.codes(x)
    for index, row in enumerate(x):
        alone = quantizer.codes(row[None])
        assert torch.equal(alone.integers[0], together.integers[index])
        assert torch.equal(alone.scale[0], together.scale[index])


@KIND
@BITS
def test_frames_are_the_same_alone_and_beside_padding(kind: str, bits: int) -> None:
    quantizer = per_frame(kind, bits)
    x = normal(3, 9, 16)
    for row, length in enumerate((9, 5, 2)):
        x[row, length:] = 100 * normal(9 - length, 16, seed=row)
    batch = quantizer.codes(x)
    for row, length in enumerate((9, 5, 2)):
        alone = quantizer.codes(x[row : row + 1, :length])
        assert torch.equal(alone.integers[0], batch.integers[row, :length])


@KIND
@BITS
def test_groups_are_quantized_each_for_itself(kind: str, bits: int) -> None:
    weight = normal(4, 3, 8) * torch.logspace(-2, 2, 8)
    grouped = UniformQuantizer(kind, bits, group_size=6)
    assert grouped(weight).shape == weight.shape
    assert grouped.codes(weight).scale.shape == (16, 1)
    alone = [UniformQuantizer(kind, bits)(group) for group in weight.reshape(16, 6)]
    assert torch.equal(grouped(weight).reshape(16, 6), torch.stack(alone))
    per_channel = UniformQuantizer(kind, bits, group_size=24)(weight)
    assert torch.equal(per_channel, torch.stack([UniformQuantizer(kind, bits)(w) for w in weight]))


@KIND
def test_an_utterance_can_be_one_frame(kind: str) -> None:
    x = normal(3, 1, 50) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    quantizer = UniformQuantizer(kind, 8, frame_dim=(1, 2))
    codes = quantizer.codes(x)
    assert codes.scale.shape == (3, 1, 1)
    for row in range(3):
        assert torch.equal(codes.integers[row], UniformQuantizer(kind, 8).codes(x[row]).integers)


def test_one_bit_is_the_sign_at_the_mean_magnitude() -> None:
    x = torch.tensor([[1.0, -2.0, 0.0, 5.0], [-4.0, -4.0, 4.0, 0.0]])
    decoded = per_frame("absmax", 1)(x)
    assert decoded.tolist() == [[2.0, -2.0, 2.0, 2.0], [-3.0, -3.0, 3.0, 3.0]]


def test_one_bit_of_minmax_is_zero_or_the_further_end() -> None:
    x = torch.tensor([[0.0, 1.0, 4.0, 1.9, 2.1], [0.0, -1.0, -4.0, -1.9, -2.1]])
    decoded = per_frame("minmax", 1)(x)
    assert decoded.tolist() == [[0.0, 0.0, 4.0, 0.0, 4.0], [0.0, 0.0, -4.0, 0.0, -4.0]]


@KIND
@BITS
def test_a_frame_of_zeros_is_decoded_as_zeros(kind: str, bits: int) -> None:
    x = torch.stack([torch.zeros(6), normal(6)])
    quantizer = per_frame(kind, bits)
    assert quantizer(x)[0].abs().max() < 1e-37
    assert torch.equal(quantizer(x)[1], quantizer(x[1:])[0])


@KIND
@BITS
def test_what_is_no_number_stays_none(kind: str, bits: int) -> None:
    """A divergence must reach the loss, not end as a frame of zeros."""
    x = normal(3, 6)
    x[1, 2] = float("nan")
    decoded = per_frame(kind, bits)(x)
    assert decoded[1].isnan().all()
    assert torch.isfinite(decoded[[0, 2]]).all()


@KIND
@BITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_quantized_in_fp32(kind: str, bits: int, dtype: torch.dtype) -> None:
    x = normal(20, 16).to(dtype)
    quantizer = per_frame(kind, bits)
    codes = quantizer.codes(x)
    assert codes.scale.dtype == torch.float32
    assert torch.equal(codes.integers, quantizer.codes(x.float()).integers)
    assert torch.equal(quantizer(x), codes.decode().to(dtype))


@KIND
@BITS
def test_the_gradient_passes_unchanged(kind: str, bits: int) -> None:
    x, g = normal(4, 6).bfloat16().requires_grad_(), normal(4, 6, seed=1).bfloat16()
    per_frame(kind, bits)(x).backward(g)
    assert torch.equal(x.grad, g)


@KIND
def test_keeps_nothing_for_the_backward(kind: str) -> None:
    # An activation: the next operator keeps its decoded values. No leaf, as weights are.
    x, saved = normal(3, 4).requires_grad_() * 1, []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        per_frame(kind, 8)(x)
    assert saved == []


@KIND
@BITS
def test_forward_and_backward_never_wait_for_the_device(kind: str, bits: int) -> None:
    # Under FakeTensorMode, reading a value (.item(), bool()) raises.
    with FakeTensorMode():
        x = torch.randn(2, 3, 4, requires_grad=True)
        per_frame(kind, bits)(x).square().sum().backward()
        assert x.grad.shape == x.shape


@KIND
def test_has_no_state_and_needs_no_calibration(kind: str) -> None:
    quantizer = UniformQuantizer(kind, 4)
    assert quantizer.is_calibrated
    assert quantizer.state_dict() == {}
