import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F

from fairseq_lowbit.quantization import (
    ElasticQuantizer,
    LevelSet,
    UncalibratedError,
    mid_rise,
    non_negative,
    signed,
)
from fairseq_lowbit.quantization.calibration import Calibrator

ALL_SETS = [make(n) for make in (signed, non_negative, mid_rise) for n in range(1, 9)]
SETS = pytest.mark.parametrize("levels", ALL_SETS, ids=lambda s: f"{s.name}_{s.bits}")
LEVELS = st.sampled_from(ALL_SETS)
# Timing and chance stay out: no deadline, the same examples every time.
STEADY = settings(deadline=None, derandomize=True, database=None)
VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20)


def quantizer_of(
    levels: LevelSet, scale: float = 1.0, shift: float | None = None, values: int = 8
) -> ElasticQuantizer:
    quantizer = ElasticQuantizer(levels, values, shift_shape=None if shift is None else ())
    quantizer.set_scale(torch.tensor(scale), None if shift is None else torch.tensor(shift))
    return quantizer


@STEADY
@given(levels=LEVELS, values=VALUES, scale=st.floats(1e-4, 1e4), shift=st.floats(-10, 10))
def test_forward_is_codes_decoded_and_changes_nothing(levels, values, scale, shift) -> None:
    quantizer = quantizer_of(levels, scale, shift)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    x = torch.tensor(values)
    codes = quantizer.codes(x)
    assert torch.equal(quantizer(x), codes.decode())
    assert codes.integers.dtype == torch.int16
    assert codes.integers.min() >= levels.lo
    assert codes.integers.max() <= levels.hi
    assert torch.equal(x, torch.tensor(values))
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name])


@STEADY
@given(levels=LEVELS, values=VALUES, scale=st.floats(1e-4, 1e4))
def test_decoded_values_have_the_codes_they_came_from(levels, values, scale) -> None:
    quantizer = quantizer_of(levels, scale)
    codes = quantizer.codes(torch.tensor(values))
    assert torch.equal(quantizer.codes(codes.decode()).integers, codes.integers)


@STEADY
@given(
    levels=LEVELS,
    values=st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=20),
    exponent=st.integers(-20, 20),
)
def test_scaling_everything_by_a_power_of_two_keeps_the_codes(levels, values, exponent) -> None:
    quantizer = quantizer_of(levels, 0.3, 0.7)
    x, ratio = torch.tensor(values), torch.tensor(2.0**exponent)
    scaled = quantizer.codes(x * ratio, length_ratio=ratio)
    assert torch.equal(scaled.integers, quantizer.codes(x).integers)
    assert torch.equal(scaled.decode(), quantizer(x).detach() * ratio)


@STEADY
@given(levels=LEVELS, values=VALUES, shift=st.floats(-10, 10))
def test_larger_inputs_never_get_smaller_codes(levels, values, shift) -> None:
    integers = quantizer_of(levels, 0.3, shift).codes(torch.tensor(sorted(values))).integers
    assert (integers.diff() >= 0).all()


def test_divides_and_never_multiplies_by_a_reciprocal() -> None:
    quantizer = quantizer_of(signed(8), 0.0437)
    scale = quantizer.scale.detach().numpy()
    # Ties as fp32 division sees them: the reciprocal rounds some of them to the other side.
    ties = (np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)) * scale
    expected = np.clip(np.rint(ties / scale), -128, 127)
    assert (np.rint(ties * (np.float32(1) / scale)) != expected).any()
    assert quantizer.codes(torch.from_numpy(ties)).integers.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@SETS
def test_half_inputs_are_quantized_in_fp32(levels: LevelSet, dtype: torch.dtype) -> None:
    quantizer = quantizer_of(levels, 0.0317, 0.0071)
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes = quantizer.codes(x)
    assert torch.equal(codes.integers, quantizer.codes(x.float()).integers)
    assert quantizer(x).dtype == dtype
    assert torch.equal(quantizer(x), codes.decode().to(dtype))
    x.requires_grad_()
    quantizer(x).float().sum().backward()
    assert x.grad.dtype == dtype
    assert quantizer.log_scale.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "cast",
    [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to("cpu", torch.bfloat16)],
    ids=["half", "bfloat16", "double", "to"],
)
def test_parameters_stay_fp32_under_casts(cast) -> None:
    model = nn.ModuleDict({"q": quantizer_of(signed(4), 0.12345, 0.6789), "l": nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in model["q"].state_dict().items()}
    cast(model)
    assert model["l"].weight.dtype != torch.float32
    for name, value in model["q"].state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_meta_quantizer_can_be_materialized_and_loaded() -> None:
    with torch.device("meta"):
        quantizer = ElasticQuantizer(signed(4), 8)
    quantizer.to_empty(device="cpu").load_state_dict(quantizer_of(signed(4), 0.5).state_dict())
    assert quantizer(torch.tensor([0.6])).item() == pytest.approx(0.5)


@SETS
def test_log_scale_gets_the_gradient_of_alpha_times_alpha(levels: LevelSet) -> None:
    # A quarter of a step from every threshold: the rounding of exp(log_scale) moves no code.
    steps = torch.arange(levels.lo - 2, levels.hi + 3).repeat_interleave(2)
    u = steps + torch.tensor([0.25, -0.25]).repeat(len(steps) // 2)
    lowest, highest = levels.clip_range
    if levels.name == "mid_rise":
        u = u * levels.step - 1
    quantizer = quantizer_of(levels, 0.3, values=12)
    alpha = quantizer.scale.detach()
    quantizer(u * alpha).sum().backward()
    level, inside = levels.value(levels.encode(u)), (u >= lowest) & (u <= highest)
    slope = level if levels.name == "sign" else torch.where(inside, level - u, level)
    expected = slope.sum() * alpha / math.sqrt(12 * levels.gradient_divisor)
    torch.testing.assert_close(quantizer.log_scale.grad, expected, rtol=1e-4, atol=1e-5)


def test_sign_set_is_linear_in_alpha() -> None:
    x = torch.linspace(-4, 4, 40)
    g = torch.randn(40, generator=torch.Generator().manual_seed(0))
    quantizer = quantizer_of(signed(1), 1.0, values=1)
    quantizer(x).backward(g)
    torch.testing.assert_close(quantizer.log_scale.grad, (g * x.sign()).sum())


ORIGIN = -87 / 512
WITH_ORIGIN = pytest.mark.parametrize("bits", range(1, 9))


@WITH_ORIGIN
def test_levels_with_an_origin_are_those_of_the_values_less_it(bits: int) -> None:
    """Codes, decoded values and gradients: of multiples of 1/512, so that nothing is rounded."""
    moved = quantizer_of(non_negative(bits, ORIGIN), 0.25, 0.125)
    plain = quantizer_of(non_negative(bits), 0.25, 0.125)
    x = (torch.randint(-2000, 4000, (300,), generator=torch.Generator().manual_seed(0))) / 512
    g = torch.randn(300, generator=torch.Generator().manual_seed(1))
    found, expected = x.clone().requires_grad_(), (x - ORIGIN).requires_grad_()
    assert torch.equal(moved.codes(found).integers, plain.codes(expected).integers)
    assert torch.equal(moved.codes(found).decode(), plain.codes(expected).decode() + ORIGIN)
    assert torch.equal(moved(found), moved.codes(found).decode())
    moved(found).backward(g)
    plain(expected).backward(g)
    assert torch.equal(found.grad, expected.grad)
    assert torch.equal(moved.log_scale.grad, plain.log_scale.grad)
    assert torch.equal(moved.relative_shift.grad, plain.relative_shift.grad)


@WITH_ORIGIN
def test_the_lowest_level_is_the_origin_whatever_was_learned(bits: int) -> None:
    levels = non_negative(bits, ORIGIN)
    for scale, shift in ((0.013, 0.0), (0.7, -0.3), (0.2, 0.1)):
        lowest, highest = quantizer_of(levels, scale, shift).codes(torch.zeros(3)).decoded_range
        assert lowest == ORIGIN
        assert highest.item() == pytest.approx(scale * levels.hi + ORIGIN, rel=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_calibration_leaves_no_error_of_one_sign_behind_a_gelu(bits: int) -> None:
    x = F.gelu(torch.randn(20_000, generator=torch.Generator().manual_seed(0)) - 0.5)
    means = []
    for levels in (non_negative(bits), non_negative(bits, ORIGIN)):
        quantizer = ElasticQuantizer(levels, 8, shift_shape=())
        quantizer.start_calibration(Calibrator())
        means.append((quantizer(x) - x).mean().abs().item())
    assert means[1] < 0.2 * means[0]


def test_levels_with_an_origin_need_a_shift() -> None:
    with pytest.raises(ValueError, match="need a shift"):
        ElasticQuantizer(non_negative(2, ORIGIN), 8)


def test_a_state_dict_of_the_other_form_is_refused() -> None:
    plain, moved = (
        quantizer_of(non_negative(2), 0.5, 0.1),
        quantizer_of(non_negative(2, ORIGIN), 0.5, 0.1),
    )
    for source, target in ((plain, moved), (moved, plain)):
        with pytest.raises(RuntimeError, match="origin"):
            target.load_state_dict(source.state_dict())


def per_frame(levels: LevelSet, scale: float = 0.3, shift: float = 0.1) -> ElasticQuantizer:
    quantizer = ElasticQuantizer(levels, 8, shift_shape=(), is_per_frame=True)
    quantizer.set_scale(torch.tensor(scale), torch.tensor(shift))
    return quantizer


SIGNED = pytest.mark.parametrize("levels", [signed(n) for n in (1, 2, 4, 8)], ids=str)


@SIGNED
def test_a_louder_frame_has_the_same_codes(levels: LevelSet) -> None:
    quantizer, x = per_frame(levels), torch.randn(2, 5, 8, generator=torch.manual_seed(0))
    factors = torch.tensor([1.0, 4.0, 0.125, 64.0, 0.5])[:, None]
    louder = quantizer.codes(factors * x)
    assert torch.equal(louder.integers, quantizer.codes(x).integers)
    assert torch.equal(louder.decode(), factors * quantizer(x).detach())
    assert torch.equal(quantizer(factors * x), louder.decode())


@SIGNED
def test_a_frame_alone_is_that_of_a_batch(levels: LevelSet) -> None:
    quantizer, x = per_frame(levels), torch.randn(3, 7, 33, generator=torch.manual_seed(0))
    together = quantizer.codes(x)
    for row in range(3):
        alone = quantizer.codes(x[row : row + 1, : 4 + row])
        assert torch.equal(alone.integers[0], together.integers[row, : 4 + row])
        assert torch.equal(alone.scale[0], together.scale[row, : 4 + row])


@SIGNED
def test_the_magnitude_of_a_frame_is_a_constant_to_the_gradient(levels: LevelSet) -> None:
    x = torch.randn(2, 3, 8, generator=torch.manual_seed(0), requires_grad=True)
    g = torch.randn(2, 3, 8, generator=torch.manual_seed(1))
    measured, given = per_frame(levels), quantizer_of(levels, 0.3, 0.1)
    found = torch.autograd.grad(measured(x), [x, *measured.parameters()], g)
    ratio = x.detach().abs().mean(-1, keepdim=True)
    expected = torch.autograd.grad(given(x, ratio), [x, *given.parameters()], g)
    assert all(map(torch.equal, found, expected))


@SIGNED
def test_a_frame_of_zeros_is_decoded_near_zero_and_has_finite_gradients(levels: LevelSet) -> None:
    quantizer, x = per_frame(levels), torch.randn(1, 3, 8, generator=torch.manual_seed(0))
    x[:, 1] = 0
    x.requires_grad_()
    decoded = quantizer(x)
    assert decoded[:, 1].abs().max() < 1e-5
    decoded.sum().backward()
    for tensor in (x, *quantizer.parameters()):
        assert tensor.grad.isfinite().all()


def test_calibration_per_frame_fits_frames_in_units_of_their_magnitude() -> None:
    x = torch.randn(40, 64, generator=torch.manual_seed(0))
    factors = 2.0 ** torch.randint(-4, 5, (40, 1), generator=torch.manual_seed(1))
    scales = []
    for values in (x, factors * x):
        quantizer = ElasticQuantizer(signed(2), 8, shift_shape=(), is_per_frame=True)
        quantizer.start_calibration(Calibrator())
        quantizer(values)
        scales.append(quantizer.scale.item())
    assert scales[0] == scales[1]
    assert not quantizer.is_per_tensor


def test_scale_has_a_floor_through_which_the_gradient_passes() -> None:
    quantizer = quantizer_of(signed(2), 1.0)
    with torch.no_grad():
        quantizer.log_scale.fill_(math.log(1e-7))
    assert quantizer.scale.item() == pytest.approx(1e-5)
    # All inputs are clipped at the top, so a larger scale lowers this loss.
    loss = (quantizer(torch.ones(4)) - 1).square().sum()
    loss.backward()
    assert quantizer.log_scale.grad < 0


def test_length_ratio_multiplies_scale_and_shift() -> None:
    quantizer = quantizer_of(non_negative(2), 0.25, -0.1)
    ratio = torch.tensor([2.0, 0.5, 1.0])[:, None]
    x = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    for row, value in enumerate(ratio.flatten().tolist()):
        alone = quantizer_of(non_negative(2), 0.25 * value, -0.1 * value)
        assert torch.equal(quantizer.codes(x, ratio).integers[row], alone.codes(x[row]).integers)
        torch.testing.assert_close(quantizer(x, ratio)[row], alone(x[row]))


def test_gradient_follows_the_length_ratio() -> None:
    x = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    both = quantizer_of(non_negative(2), 0.25, -0.1)
    both(x, torch.tensor([[2.0], [0.5]])).sum().backward()
    expected = [0.0, 0.0]
    for row, value in enumerate([2.0, 0.5]):
        one = quantizer_of(non_negative(2), 0.25 * value, -0.1 * value)
        one(x[row]).sum().backward()
        # d(ratio * alpha)/d(log alpha) is the product itself, and beta/alpha has no ratio.
        expected[0] += one.log_scale.grad.item()
        expected[1] += one.relative_shift.grad.item()
    assert both.log_scale.grad.item() == pytest.approx(expected[0], rel=1e-4)
    assert both.relative_shift.grad.item() == pytest.approx(expected[1], rel=1e-4)


def test_shift_per_channel_gets_its_channels_gradient() -> None:
    quantizer = ElasticQuantizer(signed(2), 4, shift_shape=(4,))
    quantizer.set_scale(torch.tensor(0.3), torch.tensor([0.0, 0.1, -0.2, 0.3]))
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    g = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    quantizer(x).backward(g)
    expected = -0.3 * x.grad.sum((0, 1)) / math.sqrt(4 * 1)
    torch.testing.assert_close(quantizer.relative_shift.grad, expected)


@pytest.mark.parametrize("levels", [signed(2), non_negative(1), non_negative(3)], ids=str)
def test_gradients_do_not_depend_on_the_unit_of_the_values(levels: LevelSet) -> None:
    """As a learning rate then means the same for probabilities of 1/500 as for values of 1."""
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))

    def gradients(unit: float) -> Tensor:
        quantizer = quantizer_of(levels, 0.5 * unit, 0.1 * unit)
        ((quantizer(unit * x) - unit * x) / unit).square().mean().backward()
        return torch.stack([quantizer.log_scale.grad, quantizer.relative_shift.grad])

    torch.testing.assert_close(gradients(1 / 1024), gradients(1.0))


@pytest.mark.parametrize(
    "use",
    [lambda q: q(torch.ones(2)), lambda q: q.codes(torch.ones(2))],
    ids=["forward", "codes"],
)
def test_every_use_before_calibration_raises(use) -> None:
    quantizer = ElasticQuantizer(signed(2), 4)
    with pytest.raises(UncalibratedError):
        use(quantizer)
    quantizer.load_state_dict(ElasticQuantizer(signed(2), 4).state_dict())
    with pytest.raises(UncalibratedError):
        use(quantizer)


def test_state_dict_carries_the_calibration() -> None:
    source = quantizer_of(non_negative(2), 0.25, -0.1)
    target = ElasticQuantizer(non_negative(2), 8, shift_shape=())
    assert not target.is_calibrated
    target.load_state_dict(source.state_dict())
    assert target.is_calibrated
    assert bool(target.calibrated)
    x = torch.linspace(-1, 2, 31)
    assert torch.equal(target(x), source(x))


def test_deep_copy_keeps_calibration_and_optimizer_groups() -> None:
    source = quantizer_of(signed(2), 0.25, 0.1)
    twin = copy.deepcopy(source)
    x = torch.linspace(-1, 1, 21)
    assert torch.equal(twin(x), source(x))
    assert twin.log_scale is not source.log_scale
    assert twin.log_scale.param_group == source.log_scale.param_group == "quantizer_scale"
    assert twin.relative_shift.param_group == source.relative_shift.param_group == "quantizer_shift"


def test_calibration_forgets_what_was_before_it() -> None:
    quantizer = quantizer_of(signed(2), 5.0, 3.0)
    quantizer.start_calibration(Calibrator())
    assert not quantizer.is_calibrated
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    quantizer(x)
    quantizer.finish_calibration()
    assert quantizer.shift == 0
    assert ((quantizer(x) - x).square().mean() / x.square().mean()).item() < 0.2
    scale = quantizer.scale.item()
    quantizer(100 * x)
    assert quantizer.scale.item() == scale


def test_gradient_is_straight_through_inside_and_zero_outside() -> None:
    quantizer = quantizer_of(signed(2), 1.0)
    x = torch.tensor([-2.1, -2.0, -0.4, 1.0, 1.1], requires_grad=True)
    g = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    quantizer(x).backward(g)
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


@pytest.mark.parametrize(
    "levels", [signed(1), signed(2), non_negative(1), non_negative(4)], ids=str
)
def test_forward_and_backward_never_wait_for_the_device(levels: LevelSet) -> None:
    # Under FakeTensorMode, reading a value (.item(), bool()) raises.
    with FakeTensorMode():
        quantizer = ElasticQuantizer(levels, 4, shift_shape=(4,))
        quantizer.set_scale(torch.tensor(0.5))
        x = torch.randn(2, 3, 4, requires_grad=True)
        ratio = torch.ones(2, 1, 1)
        quantizer(x, ratio).square().sum().backward()
        assert x.grad.shape == x.shape
        assert quantizer.relative_shift.grad.shape == (4,)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()


def test_keeps_nothing_but_its_inputs_for_the_backward() -> None:
    quantizer = quantizer_of(signed(2), 0.5, 0.1)
    x = torch.randn(3, 4, requires_grad=True)
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        quantizer(x)
    assert [t.data_ptr() for t in saved if t.numel() > 1] == [x.data_ptr()]


def test_learns_the_scale_from_the_reconstruction_error() -> None:
    x = F.gelu(torch.randn(2000, generator=torch.Generator().manual_seed(0)))
    quantizer = quantizer_of(non_negative(2), 3.0, 0.0, values=2000)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)

    def error() -> Tensor:
        return (quantizer(x) - x).square().mean() / x.square().mean()

    first = error().item()
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.1 < first
