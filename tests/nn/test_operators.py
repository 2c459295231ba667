import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lowbit.nn import Conv1d, Linear, PositionalConv1d
from fairseq_lowbit.quantization import ElasticQuantizer, LevelSet, non_negative, signed

LENGTHS = [9, 5, 2]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(levels: LevelSet, scale: float, shift: float | None = None) -> ElasticQuantizer:
    made = ElasticQuantizer(levels, 8, shift_shape=None if shift is None else ())
    made.set_scale(torch.tensor(scale), None if shift is None else torch.tensor(shift))
    return made


def test_operators_without_quantizers_are_torchs_own() -> None:
    linear, x = Linear(6, 4), random(2, 3, 6)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    conv, x = Conv1d(6, 4, 3, 2), random(2, 6, 11)
    assert torch.equal(conv(x), F.conv1d(x, conv.weight, conv.bias, 2))


@pytest.mark.parametrize(
    "operator, x",
    [
        (Linear(6, 4), random(2, 3, 6)),
        (Conv1d(6, 4, 3, 2), random(2, 6, 11)),
        (PositionalConv1d(6, 5, 3), random(2, 6, 11)),
    ],
    ids=["linear", "conv", "positional"],
)
def test_quantized_operators_compute_on_decoded_codes(operator: nn.Module, x: Tensor) -> None:
    operator = copy.deepcopy(operator)
    operator.weight_quantizer = quantizer(signed(2), 0.2)
    operator.input_quantizer = quantizer(non_negative(2), 0.5, -0.3)
    weight = operator.weight_quantizer.codes(operator.stored_weight()).decode()
    values = operator.input_quantizer.codes(x).decode()
    if isinstance(operator, Linear):
        expected = F.linear(values, weight, operator.bias)
    elif isinstance(operator, Conv1d):
        expected = F.conv1d(values, weight, operator.bias, 2)
    else:
        expected = F.conv1d(values, weight, operator.bias, padding=2, groups=3)
    assert torch.equal(operator(x), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kernel", [4, 5, 128])
def test_positional_convolution_equals_weight_norm_and_keeps_the_length(kernel: int) -> None:
    torch.manual_seed(0)
    own = PositionalConv1d(8, kernel, 2)
    nn.init.uniform_(own.weight_g)
    reference = nn.Conv1d(8, 8, kernel, padding=kernel // 2, groups=2)
    reference = torch.nn.utils.weight_norm(reference, name="weight", dim=2)
    assert set(own.state_dict()) == set(reference.state_dict())
    reference.load_state_dict(own.state_dict())
    x = random(2, 8, 20)
    torch.testing.assert_close(own(x), reference(x)[..., :20])


def test_new_positional_convolution_has_norms_as_gains() -> None:
    own = PositionalConv1d(8, 6, 2)
    torch.testing.assert_close(own.stored_weight(), own.weight_v)


def test_positional_convolution_can_be_deep_copied_and_trained() -> None:
    own, x = PositionalConv1d(8, 6, 2), random(2, 8, 10)
    own(x)
    twin = copy.deepcopy(own)
    assert torch.equal(twin(x), own(x))
    own(x).square().sum().backward()
    for parameter in own.parameters():
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("shift", [None, -0.6, 0.4])
def test_positional_convolution_alone_and_padded_agree(shift: float | None) -> None:
    torch.manual_seed(0)
    own = PositionalConv1d(8, 6, 2)
    if shift is not None:
        # With this shift zero has another code than zero: padding must be cleared afterwards.
        own.input_quantizer = quantizer(signed(2), 0.5, shift)
        assert own.input_quantizer(torch.zeros(1)).item() != 0
    x = random(3, 8, 9)
    mask = torch.arange(9) >= torch.tensor(LENGTHS)[:, None]
    batch = own(x, mask)
    for row, length in enumerate(LENGTHS):
        alone = own(x[row : row + 1, :, :length])[0]
        torch.testing.assert_close(batch[row, :, :length], alone, rtol=1e-5, atol=1e-6)


ORIGIN = -87 / 512


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_a_kernel_adds_the_origin_times_the_weights_of_a_channel(bits: int) -> None:
    linear, x = Linear(12, 5), F.gelu(random(4, 12))
    linear.weight_quantizer = quantizer(signed(bits), 0.25)
    linear.input_quantizer = quantizer(non_negative(bits, ORIGIN), 0.5, 0.0625)
    weight, codes = linear.weight_quantizer(linear.weight).detach(), linear.input_quantizer.codes(x)
    products = codes.integers.float() @ weight.T
    expected = codes.scale * products + ORIGIN * weight.sum(1) + linear.bias
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize("padding", [0, 2])
def test_a_padded_convolution_adds_the_origin_for_the_taps_inside(padding: int) -> None:
    conv, x = Conv1d(6, 4, 5, padding=padding), F.gelu(random(2, 6, 11))
    conv.input_quantizer = quantizer(non_negative(2, ORIGIN), 0.5, 0.0)
    codes = conv.input_quantizer.codes(x)
    products = F.conv1d(codes.integers.float(), conv.weight, padding=padding)
    taps = F.conv1d(torch.ones(1, 6, 11), conv.weight, padding=padding)
    expected = codes.scale * products + ORIGIN * taps + conv.bias[:, None]
    torch.testing.assert_close(conv(x), expected)


def test_weight_gradient_is_straight_through() -> None:
    linear, x = Linear(6, 4, bias=False), random(5, 6)
    linear.weight_quantizer = quantizer(signed(8), 0.01)
    linear(x).sum().backward()
    clipped = (linear.weight / 0.01).round().abs() > 127
    assert not clipped.any()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(4, 6))


def test_groups_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="8 channels.*3 groups"):
        PositionalConv1d(8, 4, 3)
