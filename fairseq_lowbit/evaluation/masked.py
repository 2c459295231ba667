"""Masked-frame label accuracy: what pre-training optimises, on held-out audio."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_lowbit.data.label_file import LabelFile
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.utterances import Utterances
from fairseq_lowbit.models import Hubert, device_of
from fairseq_lowbit.models.masking import span_mask
from fairseq_lowbit.models.model import cosine_logits
from fairseq_lowbit.models.protocols import SpeechModel

_SEED = 7


@dataclass(frozen=True)
class MaskedAccuracy:
    """How many labels of masked frames a model predicts.

    Attributes:
        accuracy: share of masked frames whose label is predicted.
        chance: share of the most frequent label among the same frames.
    """

    accuracy: float
    chance: float


@torch.no_grad()
def masked_accuracy(
    model: SpeechModel, teacher: Hubert, batches: Sequence[Utterances], labels: LabelFile
) -> MaskedAccuracy:
    """Masks the same frames for every model that is given the same teacher and batches.

    Args:
        model: predicts with its own label embeddings if it has them (the HuBERT loss trains
            them), else with those of the teacher.
        teacher: decides which frames are masked; its temperature is used.
        labels: at the model's frame rate, lines as in the manifest of ``batches``.
    """
    shape, label_embeddings = teacher.shape, _label_embeddings(model, teacher)
    device = device_of(model)
    correct = total = 0
    counts: Counter[int] = Counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        for batch in batches:
            frames = model.frame_lengths(batch.lengths)
            mask = span_mask(frames, int(frames.max()), shape.mask_prob, shape.mask_length)
            on_device = batch.to(device)
            outputs, _ = model.hidden_states(on_device.waveform, on_device.lengths, mask.to(device))
            targets, scored = (part.to(device) for part in _targets(batch.lines, mask, labels))
            projected = model.project_final(outputs[-1][scored])
            predicted = cosine_logits(projected, label_embeddings, shape.logit_temp).argmax(-1)
            correct += int((predicted == targets).sum())
            total += len(targets)
            counts.update(targets.tolist())
    if not total:
        raise LowbitError(f"{labels.path} has no label for any masked frame")
    return MaskedAccuracy(correct / total, counts.most_common(1)[0][1] / total)


def _label_embeddings(model: SpeechModel, teacher: Hubert) -> Tensor:
    own, theirs = getattr(model, "label_embs_concat", None), teacher.label_embs_concat
    return theirs if own is None or own.shape != theirs.shape else own


def _targets(lines: list[int], mask: Tensor, labels: LabelFile) -> tuple[Tensor, Tensor]:
    """Labels of the masked frames that have one, and where these are, [batch, frames]: the labels
    of an utterance may end early, and an unusable file has none."""
    targets, scored = [], mask.clone()
    for line, row in zip(lines, scored, strict=True):
        numbers = torch.from_numpy(labels[line])[: len(row)]
        row[len(numbers) :] = False
        targets.append(numbers[row[: len(numbers)]])
    return torch.cat(targets), scored
