"""fairseq criterion: connectionist temporal classification."""

from typing import Any

import torch
from fairseq.criterions import register_criterion
from fairseq.logging import metrics
from torch import Tensor
from torch.nn import functional as F

from fairseq_lowbit.data.units import BLANK, collapsed, decode
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.word_errors import count_errors
from fairseq_lowbit.plugin.criterions import (
    FrameCriterion,
    FrameCriterionConfig,
    counts,
    draw_mask,
)


@register_criterion("lowbit_ctc", dataclass=FrameCriterionConfig)
class LowbitCtcCriterion(FrameCriterion):
    """The negative log-likelihood of the units over all their alignments to frames (Graves et al.
    2006, eq. 5), in fp32, as a mean over units. Validation also counts what the best units of all
    frames get wrong: ``wer`` of the words and ``cer`` of the characters, in percent."""

    def __init__(self, task: Any, cfg: FrameCriterionConfig) -> None:
        super().__init__(task, cfg)
        if not task.units:
            raise LowbitError("criterion lowbit_ctc needs task lowbit_asr")

    def forward(
        self, model: torch.nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        encoder = self.task.model
        masks = model.training and encoder.shape.mask_prob
        mask = draw_mask(encoder, sample) if masks else None
        squash = self.squash_terms()  # first, as in distillation
        scores = model(sample["waveform"], sample["lengths"], mask, recognize=True)
        # Lengths stay on the host, where they are wanted.
        frames = encoder.frame_lengths(torch.tensor(sample["sizes"]))
        error = ctc_loss(scores, frames, sample["units"], torch.tensor(sample["unit_sizes"]))
        size = max(1, sum(sample["unit_sizes"]))
        terms = {"ctc": error, **{name: term * size for name, term in squash.items()}}
        loss = sum(terms.values())
        logged = {
            "loss": loss.detach(),
            **{f"loss_{name}": term.detach() for name, term in terms.items()},
            **counts(sample, size),
        }
        if not model.training:
            logged |= self._errors(scores, frames, sample)
        return loss, size, logged

    def _errors(self, scores: Tensor, frames: Tensor, sample: dict[str, Any]) -> dict[str, int]:
        units = self.task.units
        best, targets = scores.argmax(-1).tolist(), sample["units"].tolist()
        said = [
            decode(row[:size], units)
            for row, size in zip(targets, sample["unit_sizes"], strict=True)
        ]
        heard = [
            decode(collapsed(row[:size]), units)
            for row, size in zip(best, frames.tolist(), strict=True)
        ]
        errors = count_errors(said, heard)
        return {
            "words_wrong": sum(one.word_errors for one in errors),
            "words_said": sum(one.words for one in errors),
            "characters_wrong": sum(one.character_errors for one in errors),
            "characters_said": sum(one.characters for one in errors),
        }

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        FrameCriterion.reduce_metrics(logging_outputs)
        for name, kind in (("wer", "words"), ("cer", "characters")):
            if f"{kind}_wrong" in logging_outputs[0]:
                wrong, total = (
                    sum(log[f"{kind}_{which}"] for log in logging_outputs)
                    for which in ("wrong", "said")
                )
                metrics.log_scalar(name, 100 * wrong / max(1, total), total, round=3)


def ctc_loss(scores: Tensor, frames: Tensor, units: Tensor, unit_sizes: Tensor) -> Tensor:
    """Sum over a batch of the CTC losses, 0 for an utterance that has too few frames for its units.

    Args:
        scores: log-probabilities [batch, frames, units].
        frames: [batch] valid frames, on the CPU.
        units: [batch, most units].
        unit_sizes: [batch] units of each utterance, on the CPU.
    """
    return F.ctc_loss(
        scores.transpose(0, 1),
        units,
        frames,
        unit_sizes,
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )
