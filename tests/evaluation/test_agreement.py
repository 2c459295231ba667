"""Agreement with a teacher: what counts as agreement and what must not."""

import pytest
import torch
from torch import Tensor

from fairseq_lowbit.evaluation.agreement import agreement, valid_frames
from fairseq_lowbit.evaluation.utterances import Utterances
from fairseq_lowbit.models import Hubert


@pytest.fixture
def frames() -> Tensor:
    return torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) + 5


def test_identical_models_agree_perfectly(model: Hubert, batches: list[Utterances]) -> None:
    frames = valid_frames(model, batches)
    result = agreement(frames, valid_frames(model, batches))
    assert result.cosine == pytest.approx((1.0, 1.0), abs=1e-5)
    assert min(result.snr_db) > 100


def test_a_common_offset_is_no_agreement(frames: Tensor) -> None:
    """Both have the same large mean, and nothing else in common."""
    other = torch.randn(500, 8, generator=torch.Generator().manual_seed(1)) + 5
    plain = torch.nn.functional.cosine_similarity(frames, other, dim=-1).mean()
    assert plain > 0.9
    assert agreement([other], [frames]).cosine[0] == pytest.approx(0, abs=0.1)


def test_an_offset_of_one_side_does_not_hide_agreement(frames: Tensor) -> None:
    result = agreement([frames - 100], [frames])
    assert result.cosine[0] == pytest.approx(1, abs=1e-4)
    assert result.snr_db[0] < 0


def test_turned_features() -> None:
    teacher = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    turned = teacher @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    result = agreement([turned, -teacher, 0.9 * teacher], [teacher] * 3)
    assert result.cosine == pytest.approx((0.0, -1.0, 1.0), abs=1e-6)
    # |error|^2 over |signal|^2: 2, 4 and 0.01.
    assert result.snr_db == pytest.approx((-3.0103, -6.0206, 20.0), abs=1e-3)


def test_padding_is_left_out(model: Hubert, batches: list[Utterances]) -> None:
    (batch,) = batches
    assert batch.lengths.unique().numel() > 1
    together = valid_frames(model, batches)
    alone = [
        Utterances([line], batch.waveform[row : row + 1, :length], batch.lengths[row : row + 1])
        for row, (line, length) in enumerate(zip(batch.lines, batch.lengths, strict=True))
    ]
    for one, other in zip(together, valid_frames(model, alone), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
