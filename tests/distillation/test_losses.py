import pytest
import torch
from torch import Tensor

from fairseq_lowbit.distillation import attention_error, feature_error

LENGTHS = [5, 2, 4]
VALID = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_feature_error_agrees_with_a_loop() -> None:
    student, teacher = random(3, 5, 4), random(3, 5, 4, seed=1)
    terms = [
        (student[b, t, c] - teacher[b, t, c]).item() ** 2
        for b, length in enumerate(LENGTHS)
        for t in range(length)
        for c in range(4)
    ]
    expected = sum(terms) / (sum(LENGTHS) * 4)
    assert feature_error(student, teacher, VALID).item() == pytest.approx(expected, rel=1e-5)


def test_attention_error_sums_over_keys_and_averages_over_the_rest() -> None:
    student, teacher = random(3, 2, 5, 5), random(3, 2, 5, 5, seed=1)
    padded_keys = ~VALID[:, None, None].expand(3, 2, 5, 5)
    student, teacher = (m.masked_fill(padded_keys, 0.0) for m in (student, teacher))
    total = 0.0
    for b, length in enumerate(LENGTHS):
        for head in range(2):
            for query in range(length):
                for key in range(length):
                    total += (
                        student[b, head, query, key] - teacher[b, head, query, key]
                    ).item() ** 2
    expected = total / (sum(LENGTHS) * 2)
    assert attention_error(student, teacher, VALID).item() == pytest.approx(expected, rel=1e-5)


def test_centred_scores_agree_with_a_loop_over_valid_keys() -> None:
    student, teacher = random(3, 2, 5, 5), random(3, 2, 5, 5, seed=1)
    total = 0.0
    for b, length in enumerate(LENGTHS):
        for head in range(2):
            for query in range(length):
                rows = [m[b, head, query, :length].double() for m in (student, teacher)]
                own, other = (row - row.mean() for row in rows)
                total += ((own - other) ** 2).sum().item()
    expected = total / (sum(LENGTHS) * 2)
    actual = attention_error(student, teacher, VALID, center=True)
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_scores_that_differ_by_a_constant_per_row_are_equal() -> None:
    scores = random(3, 2, 5, 5)
    shifted = scores + random(3, 2, 5, 1, seed=1)
    for valid in (None, VALID):
        assert attention_error(scores, shifted, valid, center=True).item() < 1e-10
        assert attention_error(scores, shifted, valid).item() > 0.1


def test_padding_counts_for_nothing() -> None:
    student, teacher = random(3, 5, 4), random(3, 5, 4, seed=1)
    noisy = student.masked_fill(~VALID[..., None], 1e3)
    assert torch.equal(feature_error(noisy, teacher, VALID), feature_error(student, teacher, VALID))
    student, teacher = random(3, 2, 5, 5), random(3, 2, 5, 5, seed=1)
    noisy = student.masked_fill(~VALID[:, None, :, None], 1e3)
    for center in (False, True):
        assert torch.equal(
            attention_error(noisy, teacher, VALID, center),
            attention_error(student, teacher, VALID, center),
        )
    noisy = student.masked_fill(~VALID[:, None, None], 1e3)
    assert torch.equal(
        attention_error(noisy, teacher, VALID, center=True),
        attention_error(student, teacher, VALID, center=True),
    )


def test_no_mask_means_all_valid() -> None:
    everything = torch.ones(3, 5, dtype=torch.bool)
    student, teacher = random(3, 5, 4), random(3, 5, 4, seed=1)
    torch.testing.assert_close(
        feature_error(student, teacher, None), feature_error(student, teacher, everything)
    )
    student, teacher = random(3, 2, 5, 5), random(3, 2, 5, 5, seed=1)
    for center in (False, True):
        torch.testing.assert_close(
            attention_error(student, teacher, None, center),
            attention_error(student, teacher, everything, center),
        )


def test_unrelated_maps_differ_enough_to_matter_at_any_length() -> None:
    for frames in (50, 500):
        one, other = (torch.softmax(3 * random(1, 2, frames, frames, seed=s), -1) for s in (0, 1))
        assert attention_error(one, other, None).item() > 0.01


def test_half_inputs_are_compared_in_fp32() -> None:
    student, teacher = random(3, 5, 4).bfloat16(), random(3, 5, 4, seed=1).bfloat16()
    error = feature_error(student, teacher, VALID)
    assert error.dtype == torch.float32
    assert torch.equal(error, feature_error(student.float(), teacher.float(), VALID))
    maps = [random(3, 2, 5, 5, seed=s).bfloat16() for s in (0, 1)]
    assert attention_error(*maps, VALID, center=True).dtype == torch.float32
