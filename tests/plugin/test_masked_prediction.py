"""HuBERT's loss counts exactly the frames that have a label, without asking which these are."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fairseq_lowbit.plugin import register
from tests.shapes import TINY

register()
from fairseq_lowbit.plugin.criterions import (  # noqa: E402
    LowbitHubertCriterion,
    LowbitHubertCriterionConfig,
    draw_mask,
)
from fairseq_lowbit.plugin.dataset import NO_LABEL  # noqa: E402
from fairseq_lowbit.plugin.models import HubertFastConvModel  # noqa: E402

CLASSES, SIZES = 5, [900, 700]


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
def test_the_loss_is_that_of_the_labelled_frames(unmasked_weight: float) -> None:
    torch.manual_seed(0)
    model = HubertFastConvModel(TINY, CLASSES).eval()
    frames = model.frame_lengths(torch.tensor(SIZES)).tolist()
    targets = torch.randint(CLASSES, (2, frames[0]))
    targets[0, frames[0] - 9 :] = NO_LABEL  # the labels of the first utterance end early
    targets[1, frames[1] :] = NO_LABEL
    sample = {
        "waveform": torch.randn(2, SIZES[0]),
        "lengths": torch.tensor(SIZES),
        "sizes": SIZES,
        "targets": [targets],
    }
    task = SimpleNamespace(model=model, label_classes=CLASSES, label_ratio=1.0)
    config = LowbitHubertCriterionConfig(unmasked_weight=unmasked_weight, feature_penalty=0.0)
    torch.manual_seed(1)
    loss, counted, logged = LowbitHubertCriterion(task, config)(model, sample)

    torch.manual_seed(1)
    mask = draw_mask(model, sample)
    x, _ = model.encode(model.extract(sample["waveform"], sample["lengths"]), mask)
    labelled = targets != NO_LABEL
    assert (mask & ~labelled).any()

    def error(chosen: torch.Tensor) -> torch.Tensor:
        logits = model.label_logits(x[chosen])
        return F.cross_entropy(logits, targets[chosen], reduction="sum")

    masked = mask & labelled
    expected = error(masked) + unmasked_weight * error(~mask & labelled)
    torch.testing.assert_close(loss, expected)
    assert counted == masked.sum()
    hits = (model.label_logits(x).argmax(-1) == targets)[masked].sum()
    assert logged["correct"] == hits
