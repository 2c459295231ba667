import pytest
import torch

from fairseq_lowbit.models.masking import span_mask


def runs(row: torch.Tensor) -> list[int]:
    """Lengths of the runs of True."""
    text = "".join("x" if value else " " for value in row.tolist())
    return [len(run) for run in text.split()]


def test_masks_valid_frames_only_and_every_utterance() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([100, 37, 5, 1])
    for _ in range(20):
        mask = span_mask(lengths, 120, share=0.3, span=10)
        assert mask.shape == (4, 120)
        assert mask.dtype == torch.bool
        assert mask.any(1).all()
        assert not (mask & (torch.arange(120) >= lengths[:, None])).any()


def test_utterance_without_frames_has_no_mask() -> None:
    assert not span_mask(torch.tensor([0, 30]), 30, share=0.5, span=10)[0].any()


def test_spans_have_their_full_width() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        mask = span_mask(torch.tensor([200]), 200, share=0.2, span=10)
        assert min(runs(mask[0])) >= 10


def test_single_span_is_exactly_as_wide_as_asked() -> None:
    torch.manual_seed(0)
    mask = span_mask(torch.full((50,), 80), 80, share=0.0, span=10)
    assert [runs(row) for row in mask] == [[10]] * 50
    # Every place is possible, the first and the last included.
    starts = [int(row.int().argmax()) for row in span_mask(torch.full((500,), 14), 14, 0.0, 10)]
    assert set(starts) == set(range(5))


def test_short_utterances_keep_a_frame_unmasked() -> None:
    torch.manual_seed(0)
    mask = span_mask(torch.full((50,), 6), 6, share=0.1, span=10)
    assert (mask.sum(1) == 5).all()


@pytest.mark.parametrize("share", [0.2, 0.65, 0.8])
def test_share_of_starts_is_the_one_asked_for(share: float) -> None:
    torch.manual_seed(0)
    covered = span_mask(torch.full((200,), 500), 500, share, span=10).float().mean().item()
    # n = share * 500 / 10 distinct starts among 491: a frame stays free with chance (1 - 10/491)^n.
    expected = 1 - (1 - 10 / 491) ** (share * 50)
    assert covered == pytest.approx(expected, abs=0.02)


def test_fractional_counts_are_right_on_average() -> None:
    torch.manual_seed(0)
    # 0.15 * 30 / 10 = .45 spans: one, and a second one never; with 1.45 spans sometimes two.
    assert [len(runs(row)) for row in span_mask(torch.full((50,), 30), 30, 0.15, 10)] == [1] * 50
    counts = span_mask(torch.full((400,), 290), 290, 0.05, 10).sum(1).float() / 10
    assert 1.3 < counts.mean().item() < 1.5


def test_same_seed_same_mask() -> None:
    lengths = torch.tensor([90, 60])
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(span_mask(lengths, 90, 0.5, 10))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
