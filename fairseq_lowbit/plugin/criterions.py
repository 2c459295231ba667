"""fairseq criterions: label-free distillation and HuBERT's masked prediction."""

from dataclasses import dataclass
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor
from torch.nn import functional as F

from fairseq_lowbit.errors import LowbitError, require_number
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.models.masking import span_mask
from fairseq_lowbit.nn import squashed_weights
from fairseq_lowbit.plugin.dataset import NO_LABEL
from fairseq_lowbit.quantization import squash_penalty

# Of a logged loss; fairseq prints six significant digits of it, of which small terms need all.
_DECIMALS = 10


@dataclass
class FrameCriterionConfig(FairseqDataclass):
    squash_weight: float = 1.0  # lambda_q, of the spread of squashed weights


@dataclass
class LowbitKdConfig(FrameCriterionConfig):
    final_weight: float = 1.0  # of the final output term
    layer_weight: float = 1.0  # of the layer output term
    front_end_weight: float = 0.0  # of the term of the first layer's inputs
    attention_weight: float = 1.0
    attention: str = "probabilities"  # what is compared: probabilities, or row-centred scores
    mask: bool = False  # the same frames in both models


@dataclass
class LowbitHubertCriterionConfig(FrameCriterionConfig):
    unmasked_weight: float = 0.0  # of the labels of unmasked frames
    feature_penalty: float = 10.0  # weight of the mean squared front-end feature


class FrameCriterion(FairseqCriterion):
    """A loss that is a mean over frames (or units), handed to fairseq as sum and number of them."""

    weight_keys: tuple[str, ...] = ("squash_weight",)

    def __init__(self, task: Any, cfg: FrameCriterionConfig) -> None:
        super().__init__(task)
        for key in self.weight_keys:
            require_number(f"criterion.{key}", getattr(cfg, key), 0)
        self.squash_weight = cfg.squash_weight

    @classmethod
    def build_criterion(cls, cfg: FrameCriterionConfig, task: Any) -> "FrameCriterion":
        return cls(task, cfg)

    def squash_terms(self) -> dict[str, Tensor]:
        """The weighted regulariser of squashed weights; empty for a model without any."""
        weights = squashed_weights(self.task.model)
        return {"squash": self.squash_weight * squash_penalty(weights)} if weights else {}

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        totals = {key: sum(log[key] for log in logging_outputs) for key in logging_outputs[0]}
        size = totals["sample_size"]
        for key, total in totals.items():
            if key.startswith("loss"):
                metrics.log_scalar(key, total / size, size, round=_DECIMALS)
        if "correct" in totals:
            metrics.log_scalar("accuracy", totals["correct"] / size, size, round=4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


@register_criterion("lowbit_kd", dataclass=LowbitKdConfig)
class LowbitKdCriterion(FrameCriterion):
    """L = w_y MSE(y) + w_o mean_i MSE(o_i) + w_a mean_i E(a_i); see docs/numerics.md."""

    weight_keys = (
        "final_weight",
        "layer_weight",
        "attention_weight",
        "front_end_weight",
        "squash_weight",
    )

    def __init__(self, task: Any, cfg: LowbitKdConfig) -> None:
        super().__init__(task, cfg)
        if cfg.attention not in ("probabilities", "scores"):
            raise LowbitError(
                f"criterion.attention {cfg.attention!r}; allowed are probabilities, scores"
            )
        if not hasattr(task, "teacher"):
            raise LowbitError("criterion lowbit_kd needs task lowbit_distillation")
        final_weight = cfg.final_weight if task.teacher.has_final_projection else 0.0
        self.weights = {
            "final": final_weight,
            "layers": cfg.layer_weight,
            "attention": cfg.attention_weight,
            "front_end": cfg.front_end_weight,
        }
        if not any(self.weights.values()):
            raise LowbitError(
                "criterion.final_weight (0 for a teacher without final_proj), layer_weight, "
                "attention_weight and front_end_weight are all 0: give one of them a number above 0"
            )
        self.attention = cfg.attention if cfg.attention_weight else None
        self.mask = cfg.mask
        if not cfg.mask:
            # Without a gradient, weight decay alone would move it.
            task.model.mask_emb.requires_grad_(False)

    def forward(
        self, model: torch.nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mask = draw_mask(self.task.model, sample) if self.mask else None
        teacher = self.task.teacher
        # First, so that the backward comes to it last: its gradients are as large as the weights
        # and would wait for the others while all activations are still held.
        squash = self.squash_terms()
        computed, frames = model(
            sample["waveform"],
            sample["lengths"],
            mask,
            teacher=teacher.model,
            attention=self.attention,
            layers=self.weights["layers"] > 0,
            shared_front_end=self.task.shares_front_end,
            front_end=self.weights["front_end"] > 0,
        )
        terms = {name: term for name, term in computed._asdict().items() if term is not None}
        loss = sum(self.weights[name] * term for name, term in terms.items())
        loss = (loss + sum(squash.values())) * frames
        # A term of weight 0 is no part of the loss, computed or not.
        counted = {name: term for name, term in terms.items() if self.weights[name]}
        logged = {
            f"loss_{name}": (term * frames).detach() for name, term in {**counted, **squash}.items()
        }
        return loss, frames, {"loss": loss.detach(), **logged, **counts(sample, frames)}


@register_criterion("lowbit_hubert", dataclass=LowbitHubertCriterionConfig)
class LowbitHubertCriterion(FrameCriterion):
    """Cross-entropy over the labels of masked frames, plus HuBERT's feature penalty."""

    weight_keys = ("unmasked_weight", "feature_penalty", "squash_weight")

    def __init__(self, task: Any, cfg: LowbitHubertCriterionConfig) -> None:
        super().__init__(task, cfg)
        if not getattr(task, "label_classes", 0):
            raise LowbitError("criterion lowbit_hubert needs task lowbit_pretraining with labels")
        self.unmasked_weight, self.feature_penalty = cfg.unmasked_weight, cfg.feature_penalty

    def forward(
        self, model: torch.nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        host_mask = draw_host_mask(self.task.model, sample)
        mask = _on_device(host_mask, sample)
        targets = frame_targets(sample["targets"][0], mask.shape[1], self.task.label_ratio)
        targets, masked, predict = targets.flatten(), mask.flatten(), None
        if not self.unmasked_weight:
            # Counted on the host, where it is known how many there are: nothing waits for a device.
            predict = _on_device(host_mask.flatten().nonzero().flatten(), sample)
            targets, masked = targets[predict], masked[predict]
        squash = self.squash_terms()  # first, as in distillation
        logits, penalty = model(sample["waveform"], sample["lengths"], mask, predict)
        error = F.cross_entropy(logits, targets, reduction="none", ignore_index=NO_LABEL)
        scored = masked & (targets != NO_LABEL)
        frames = scored.sum().clamp_min(1)
        terms = {
            "loss_masked": error.masked_fill(~masked, 0).sum(),
            "loss_unmasked": self.unmasked_weight * error.masked_fill(masked, 0).sum(),
            "loss_features": self.feature_penalty * penalty * frames,
            **{f"loss_{name}": term * frames for name, term in squash.items()},
        }
        loss = sum(terms.values())
        logged = {
            "loss": loss.detach(),
            **{name: term.detach() for name, term in terms.items()},
            "correct": ((logits.argmax(-1) == targets) & scored).sum(),
            **counts(sample, frames),
        }
        return loss, frames, logged


def counts(sample: dict[str, Any], frames: Tensor) -> dict[str, Any]:
    """What fairseq's own meters want beside a loss."""
    return {"sample_size": frames, "ntokens": frames, "nsentences": len(sample["sizes"])}


def draw_mask(model: Hubert, sample: dict[str, Any]) -> Tensor:
    """Span mask [batch, frames] for a batch, on its device."""
    return _on_device(draw_host_mask(model, sample), sample)


def draw_host_mask(model: Hubert, sample: dict[str, Any]) -> Tensor:
    """Span mask [batch, frames] for a batch, on the host."""
    lengths = model.frame_lengths(torch.tensor(sample["sizes"]))
    shape = model.shape
    return span_mask(lengths, int(lengths.max()), shape.mask_prob, shape.mask_length)


def _on_device(tensor: Tensor, sample: dict[str, Any]) -> Tensor:
    return tensor.to(sample["waveform"].device, non_blocking=True)


def frame_targets(targets: Tensor, frames: int, labels_per_frame: float) -> Tensor:
    """[batch, labels] at the label rate -> [batch, frames], NO_LABEL where labels run out."""
    index = (torch.arange(frames, device=targets.device) * labels_per_frame).long()
    needed = int((frames - 1) * labels_per_frame) + 1
    padded = F.pad(targets, (0, max(0, needed - targets.shape[1])), value=NO_LABEL)
    return padded[:, index]
