import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.quantization import (
    Criterion,
    ElasticQuantizer,
    LevelSet,
    mid_rise,
    non_negative,
    signed,
)
from fairseq_lowbit.quantization.calibration import (
    MSE,
    Calibrator,
    fit_scale,
    fit_weight_scale,
    thin,
)

ABSMAX = Criterion("absmax")
CRITERIA = [MSE, ABSMAX, Criterion("percentile", 99)]
# Sets whose outermost level is one of many; the sign set has its mean in any case.
WIDE_SETS = [signed(2), signed(8), mid_rise(1), mid_rise(2), mid_rise(8), non_negative(3)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(
    x: Tensor, levels: LevelSet, scale: Tensor | float, shift: Tensor | float = 0.0
) -> float:
    decoded = levels.value(levels.encode((x - shift) / scale)) * scale
    return ((decoded - x).square().sum() / x.square().sum()).item()


def outermost(levels: LevelSet) -> float:
    return levels.value(torch.tensor(float(levels.hi))).item()


def best_error(x: Tensor, levels: LevelSet, shifts: Tensor | None = None) -> float:
    """Brute force over a grid far finer than the calibration's."""
    peak = (x.abs().max() / outermost(levels)).item()
    scales = peak * torch.logspace(-2.5, 0.1, 400)
    offsets = torch.zeros(1) if shifts is None else shifts
    return min(relative_error(x, levels, s, s * o) for s in scales for o in offsets)


DISTRIBUTIONS = {
    "normal": normal(1500),
    "laplace": normal(1500).sign() * normal(1500, seed=1).abs() ** 2,
    "uniform": torch.rand(1500, generator=torch.Generator().manual_seed(0)) * 6 - 3,
    "gelu": F.gelu(normal(1500)),
    "probabilities": torch.softmax(3 * normal(15, 100), -1).flatten(),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("bits, slack", [(2, 1.02), (3, 1.02), (4, 1.02), (8, 1.05)])
def test_signed_scale_has_nearly_the_best_error(name: str, bits: int, slack: float) -> None:
    x, levels = DISTRIBUTIONS[name], signed(bits)
    scale, shift = fit_scale(x[None], levels)
    assert shift is None
    assert relative_error(x, levels, scale) <= slack * best_error(x, levels)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_mid_rise_scale_has_nearly_the_best_error(name: str, bits: int) -> None:
    x, levels = DISTRIBUTIONS[name], mid_rise(bits)
    scale, _ = fit_scale(x[None], levels)
    assert relative_error(x, levels, scale) <= 1.02 * best_error(x, levels)


def test_two_balanced_bits_fit_a_weight_better_than_twos_complement() -> None:
    x = normal(1500)
    errors = [relative_error(x, s, fit_scale(x[None], s)[0]) for s in (mid_rise(2), signed(2))]
    assert errors[0] < 0.85 * errors[1]


@pytest.mark.parametrize("name", ["gelu", "probabilities", "uniform"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_scale_and_shift_have_nearly_the_best_error(name: str, bits: int) -> None:
    x, levels = DISTRIBUTIONS[name], non_negative(bits)
    scale, shift = fit_scale(x[None], levels, with_shift=True)
    best = best_error(x, levels, shifts=torch.linspace(-1, 1, 41))
    assert relative_error(x, levels, scale, shift) <= 1.02 * best


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_sign_set_gets_the_mean_magnitude(name: str) -> None:
    x = DISTRIBUTIONS[name]
    scale, shift = fit_scale(x[None], signed(1))
    assert shift is None
    assert scale.item() == x.abs().mean().item()


@pytest.mark.parametrize("levels", [signed(2), non_negative(1), non_negative(3)], ids=str)
def test_zeros_get_scale_one_and_no_shift(levels: LevelSet) -> None:
    x = torch.zeros(2, 10)
    with_shift = levels.name == "non_negative"
    scale, shift = fit_scale(x, levels, with_shift)
    assert scale.tolist() == [1.0, 1.0]
    if with_shift:
        assert shift.tolist() == [0.0, 0.0]
        assert (levels.encode((x - shift[:, None]) / scale[:, None]) == 0).all()


@pytest.mark.parametrize("levels", [signed(1), mid_rise(1), mid_rise(2)], ids=str)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: c.name)
def test_zeros_stay_zeros_where_zero_is_no_level(levels: LevelSet, criterion: Criterion) -> None:
    """A pruned channel or group would otherwise come back at full size."""
    weight = torch.stack([normal(300), torch.zeros(300)])
    quantizer = ElasticQuantizer(levels, 300, scales=2, group_size=300)
    quantizer.set_scale(fit_weight_scale(weight, levels, 300, criterion))
    decoded = quantizer(weight)
    assert decoded[1].abs().max() < 1.1e-5
    assert decoded[0].abs().min() > 1e-2


def test_rows_are_fitted_each_for_itself() -> None:
    rows = torch.stack([normal(300), 20 * normal(300, seed=1), torch.zeros(300)])
    together, _ = fit_scale(rows, signed(2))
    alone = torch.cat([fit_scale(row[None], signed(2))[0] for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("bits", [1, 2])
def test_weights_per_channel_equal_row_by_row(bits: int) -> None:
    weight = normal(5, 4, 3) * torch.arange(1, 6)[:, None, None]
    scale = fit_weight_scale(weight, signed(bits), group_size=12)
    assert scale.shape == (5, 1)
    for row, value in zip(weight, scale.flatten(), strict=True):
        assert fit_weight_scale(row, signed(bits), None).item() == value.item()


def test_half_weights_are_fitted_in_fp32() -> None:
    weight = normal(6, 7).bfloat16()
    scale = fit_weight_scale(weight, signed(1), None)
    assert scale.dtype == torch.float32
    assert scale.item() == weight.float().abs().mean().item()


def test_gelu_output_fits_the_non_negative_set_far_better_than_the_sign_set() -> None:
    x = F.gelu(normal(16_384))
    scale, shift = fit_scale(x[None], non_negative(1), with_shift=True)
    assert relative_error(x, non_negative(1), scale, shift) == pytest.approx(0.22, abs=0.015)
    scale, _ = fit_scale(x[None], signed(1))
    assert relative_error(x, signed(1), scale) == pytest.approx(0.63, abs=0.015)


def test_small_tensors_are_kept_whole() -> None:
    x = normal(3, 5)
    assert torch.equal(thin(x, 15), x.flatten())


@pytest.mark.parametrize(
    "shape, axis",
    [
        ((4, 100, 64), 2),
        ((4, 64, 100), 1),
        ((64, 64, 4), 0),
        ((64, 64, 1), 1),
        ((2, 12, 50, 50), 1),
    ],
)
def test_sample_is_small_and_sees_every_channel_alike(shape: tuple[int, ...], axis: int) -> None:
    channels = torch.arange(shape[axis], dtype=torch.float32)
    view = [1] * len(shape)
    view[axis] = -1
    sample = thin(channels.view(view).expand(shape), 1500)
    assert 500 < len(sample) <= 1500
    counts = torch.stack([(sample == c).sum() for c in channels])
    assert counts.min() > 0
    assert counts.max() <= 1.5 * counts.min() + 1


def test_every_batch_weighs_alike_in_the_fit() -> None:
    # For the sign set the scale is the mean magnitude of the sample, which shows the weights.
    calibrator = Calibrator(max_values=300)
    for magnitude in (1.0, 2.0, 3.0, 10.0):
        scale, _ = calibrator.fit(torch.full((20, 51), magnitude), signed(1), with_shift=False)
    assert scale.item() == pytest.approx(4.0, rel=0.02)


def test_calibrating_quantizer_refits_at_once_on_all_batches_so_far() -> None:
    quantizer = ElasticQuantizer(signed(1), 8, shift_shape=())
    quantizer.start_calibration(Calibrator())
    with torch.no_grad():
        assert quantizer(torch.full((4, 8), 2.0)).unique().item() == pytest.approx(2.0)
        assert quantizer(torch.full((4, 8), 4.0)).unique().item() == pytest.approx(3.0)
    quantizer.finish_calibration()
    assert quantizer(torch.full((4, 8), 9.0)).unique().item() == pytest.approx(3.0)


def test_calibrating_with_a_length_ratio_fits_the_reference_length() -> None:
    x = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    plain = ElasticQuantizer(non_negative(2), 8, shift_shape=())
    scaled = ElasticQuantizer(non_negative(2), 8, shift_shape=())
    for quantizer in (plain, scaled):
        quantizer.start_calibration(Calibrator())
    plain(x)
    scaled(x / 4, torch.tensor(0.25))
    assert scaled.scale.item() == pytest.approx(plain.scale.item(), rel=1e-6)
    assert scaled.shift.item() == pytest.approx(plain.shift.item(), rel=1e-6)


def test_nearly_constant_values_keep_their_gradients() -> None:
    """Uniform attention: every fit is equally good, and a far shift would clip everything."""
    values = torch.full((1, 4000), 0.02)
    scale, shift = fit_scale(values, non_negative(1), with_shift=True)
    u = (values[0] - shift) / scale
    assert ((u >= 0) & (u <= 1 + 1e-3)).all()
    assert abs(float(shift)) <= float(scale) / 12


@pytest.mark.parametrize("levels", WIDE_SETS, ids=str)
@pytest.mark.parametrize("name", ["normal", "laplace", "uniform"])
def test_absmax_puts_the_outermost_level_at_the_largest_magnitude(
    name: str, levels: LevelSet
) -> None:
    x = DISTRIBUTIONS[name]
    scale, shift = fit_scale(x[None], levels, levels.name == "non_negative", ABSMAX)
    assert (scale * outermost(levels)).item() == pytest.approx(x.abs().max().item())
    assert shift is None or shift.item() == 0


@pytest.mark.parametrize("levels", WIDE_SETS, ids=str)
@pytest.mark.parametrize("percentile", [90.0, 99.0, 100.0])
def test_percentile_leaves_that_share_of_magnitudes_unclipped(
    levels: LevelSet, percentile: float
) -> None:
    x = DISTRIBUTIONS["laplace"]
    scale, _ = fit_scale(x[None], levels, criterion=Criterion("percentile", percentile))
    within = (x.abs() <= scale * outermost(levels) * (1 + 1e-6)).float().mean().item()
    assert within == pytest.approx(percentile / 100, abs=1 / len(x))


def test_percentile_of_mostly_zeros_is_their_maximum() -> None:
    x = torch.zeros(1, 100)
    x[0, :5] = torch.tensor([1.0, -6.0, 2.0, 3.0, 1.0])
    scale, _ = fit_scale(x, signed(3), criterion=Criterion("percentile", 90))
    assert scale.item() == 2.0


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: c.name)
def test_the_sign_set_has_its_mean_whatever_the_criterion(criterion: Criterion) -> None:
    x = DISTRIBUTIONS["normal"]
    scale, _ = fit_scale(x[None], signed(1), criterion=criterion)
    assert scale.item() == x.abs().mean().item()


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: c.name)
@pytest.mark.parametrize("levels", [signed(1), signed(3), mid_rise(2)], ids=str)
def test_weights_per_group_equal_group_by_group(levels: LevelSet, criterion: Criterion) -> None:
    weight = normal(4, 6, 5) * torch.arange(1, 5)[:, None, None]
    scale = fit_weight_scale(weight, levels, group_size=10, criterion=criterion)
    assert scale.shape == (12, 1)
    for group, value in zip(weight.reshape(12, 10), scale.flatten(), strict=True):
        assert fit_weight_scale(group, levels, None, criterion).item() == value.item()


def test_absmax_of_a_large_weight_sees_every_value() -> None:
    weight = torch.full((600, 700), 0.01)
    weight[123, 457] = 7.0
    scale = fit_weight_scale(weight, signed(4), None, ABSMAX)
    assert scale.item() == pytest.approx(1.0)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: c.name)
def test_activations_follow_the_criterion(criterion: Criterion) -> None:
    batches = [normal(8, 100, seed=seed) for seed in range(3)]
    quantizer = ElasticQuantizer(signed(4), 100, shift_shape=())
    quantizer.start_calibration(Calibrator(criterion))
    for batch in batches:
        quantizer(batch)
    quantizer.finish_calibration()
    expected, _ = fit_scale(torch.cat(batches).reshape(1, -1), signed(4), criterion=criterion)
    assert quantizer.scale.item() == pytest.approx(expected.item())
    assert quantizer.shift.item() == 0


@pytest.mark.parametrize("name", ["max", "MSE", ""])
def test_unknown_criteria_are_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(LowbitError, match=f"criterion '{name}'; allowed are mse, absmax, percen"):
        Criterion(name)


@pytest.mark.parametrize("percentile", [0.0, -5.0, 100.5, float("nan")])
def test_impossible_percentiles_are_refused(percentile: float) -> None:
    with pytest.raises(LowbitError, match="percentile .*; want above 0, up to 100"):
        Criterion("percentile", percentile)
