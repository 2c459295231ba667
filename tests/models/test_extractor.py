import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.models.architecture import FASTCONV, parse_conv_layers
from fairseq_lowbit.models.extractor import (
    FeatureExtractor,
    TimeGroupNorm,
    output_lengths,
    padding_mask,
    receptive_field,
)

FRONT_ENDS = {
    "fastconv": [(4, kernel, stride) for _, kernel, stride in parse_conv_layers(FASTCONV)],
    "hubert": [(4, 10, 5)] + [(4, 3, 2)] * 4 + [(4, 2, 2)] * 2,
    "small": [(6, 10, 5), (8, 3, 2)],
}
LENGTHS = [1200, 823, 400]


def extractor(name: str, mode: str = "default", **kwargs) -> FeatureExtractor:
    torch.manual_seed(0)
    made = FeatureExtractor(FRONT_ENDS[name], mode, **kwargs)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return made.eval()


def batch() -> Tensor:
    """Three waveforms zero-padded to 1200 samples, away from zero mean."""
    waveform = torch.randn(3, 1200, generator=torch.Generator().manual_seed(0)) + 0.5
    return waveform.masked_fill(padding_mask(torch.tensor(LENGTHS), 1200), 0.0)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_output_lengths_equal_the_real_convolutions(name: str) -> None:
    layers = FRONT_ENDS[name]
    made = extractor(name)
    shortest = receptive_field(layers)
    samples = [shortest, shortest + 1, 401, 639, 640, 719, 720, 721, 999, 1600, 3217]
    with torch.no_grad():
        real = [made(torch.zeros(1, n)).shape[1] for n in samples]
    assert output_lengths(torch.tensor(samples), layers).tolist() == real


def test_receptive_field_is_the_first_length_with_a_frame() -> None:
    for layers in FRONT_ENDS.values():
        samples = receptive_field(layers)
        assert output_lengths(torch.tensor([samples - 1, samples]), layers).tolist() == [0, 1]
    assert receptive_field(FRONT_ENDS["hubert"]) == 400
    assert receptive_field(FRONT_ENDS["fastconv"]) == 400


def test_stride_is_fifty_frames_per_second() -> None:
    samples = torch.tensor([16_000, 160_000])
    assert output_lengths(samples, FRONT_ENDS["hubert"]).tolist() == [49, 499]
    assert output_lengths(samples, FRONT_ENDS["fastconv"]).tolist() == [49, 499]


def test_too_short_audio_has_no_frames() -> None:
    assert output_lengths(torch.tensor([0, 1, 9]), FRONT_ENDS["hubert"]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", ["default", "layer_norm"])
@pytest.mark.parametrize("name", ["small", "fastconv"])
def test_alone_and_in_a_padded_batch_agree(name: str, mode: str) -> None:
    made, waveform = extractor(name, mode), batch()
    features = made(waveform, torch.tensor(LENGTHS))
    frames = output_lengths(torch.tensor(LENGTHS), FRONT_ENDS[name]).tolist()
    for row, (samples, length) in enumerate(zip(LENGTHS, frames, strict=True)):
        alone = made(waveform[row : row + 1, :samples])[0]
        assert alone.shape[0] == length
        torch.testing.assert_close(features[row, :length], alone, rtol=1e-5, atol=1e-5)


def test_full_lengths_change_nothing() -> None:
    made, waveform = extractor("small"), batch()[:1]
    with_lengths = made(waveform, torch.tensor([1200]))
    torch.testing.assert_close(with_lengths, made(waveform), rtol=1e-5, atol=1e-5)


def test_seeing_padding_takes_statistics_over_it() -> None:
    waveform, lengths = batch(), torch.tensor(LENGTHS)
    as_fairseq = extractor("small", see_padding=True)
    # The same as no lengths at all: padding counts as samples.
    assert torch.equal(as_fairseq(waveform, lengths), extractor("small")(waveform))
    assert not torch.allclose(
        as_fairseq(waveform, lengths)[2], extractor("small")(waveform, lengths)[2]
    )


def test_group_norm_sees_valid_samples_only() -> None:
    norm = TimeGroupNorm(5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0)) + 3
    lengths = torch.tensor([20, 7])
    noisy = x.clone()
    noisy[1, :, 7:] = 1e3
    outputs = norm(noisy, lengths)
    reference = nn.functional.group_norm(x[1:, :, :7], 5, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(outputs[1, :, :7], reference[0])
    torch.testing.assert_close(outputs[0], norm(x[:1])[0])


@pytest.mark.parametrize("mode", ["default", "layer_norm"])
def test_norms_are_computed_in_fp32(mode: str) -> None:
    made = extractor("small", mode).bfloat16()
    assert made(batch().bfloat16(), torch.tensor(LENGTHS)).dtype == torch.bfloat16
    if mode == "default":
        norm = made.conv_layers[0]["2"]
        x = (torch.randn(1, 6, 500, generator=torch.Generator().manual_seed(0)) + 30).bfloat16()
        exact = nn.functional.group_norm(
            x.float(), 6, norm.weight.float(), norm.bias.float(), norm.eps
        )
        assert torch.equal(norm(x), exact.bfloat16())
        whole = norm(x, torch.tensor([500])).float()
        torch.testing.assert_close(whole, exact.bfloat16().float(), rtol=2**-7, atol=1e-5)


def test_padding_mask_marks_what_lies_behind_the_length() -> None:
    assert padding_mask(torch.tensor([3, 0, 2]), 3).tolist() == [
        [False, False, False],
        [True, True, True],
        [False, False, True],
    ]
