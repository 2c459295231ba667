"""fairseq models: the float and the quantized HuBERT."""

from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from fairseq.modules import GradMultiply
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_lowbit.distillation import DistillationTerms, distill
from fairseq_lowbit.models import Architecture, Hubert
from fairseq_lowbit.models.protocols import Frames, LayeredEncoder
from fairseq_lowbit.nn.attention import AttentionMap
from fairseq_lowbit.precision import Precision


@dataclass
class HubertConfig(Architecture, FairseqDataclass):
    """Shape, regularisation and precision; the defaults are a float base-size HuBERT-FastConv."""

    precision: Precision = field(default_factory=Precision)


@register_model("hubert_fastconv", dataclass=HubertConfig)
class HubertFastConvModel(Hubert, BaseFairseqModel):
    """:class:`Hubert` under fairseq's trainer."""

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "HubertFastConvModel":
        is_config = OmegaConf.is_config(cfg)
        values = OmegaConf.to_container(cfg, resolve=True) if is_config else vars(cfg)
        precision = values.get("precision")
        return cls(
            Architecture.from_mapping(values),
            getattr(task, "label_classes", 0),
            Precision.from_mapping(precision) if precision else None,
            len(getattr(task, "units", ())),
        )

    def forward(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        predict: Tensor | None = None,
        teacher: LayeredEncoder | None = None,
        attention: AttentionMap | None = "probabilities",
        layers: bool = True,
        shared_front_end: bool = False,
        front_end: bool = False,
        recognize: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[DistillationTerms, Tensor]:
        """What a criterion needs, in one call, because DistributedDataParallel only sees forward.

        With ``teacher``: the terms of :func:`distill`. With ``recognize``: log-probabilities of the
        CTC head, [batch, frames, units]. Else masked prediction: logits
        [predicted frames, classes] of the frames that ``predict`` numbers, all frames of the batch
        in a row, or of every frame without it, and the mean squared front-end feature (HuBERT's
        feature penalty).
        """
        if teacher is not None:
            return distill(
                teacher,
                self,
                waveform,
                lengths,
                mask,
                attention,
                layers,
                shared_front_end,
                front_end,
            )
        frames, penalty = self._extract_for_training(waveform, lengths)
        x, _ = self.encode(frames, mask)
        if recognize:
            return self.classify_units(x)
        x = x.flatten(0, 1)
        return self.label_logits(x if predict is None else x[predict]), penalty

    def _extract_for_training(
        self, waveform: Tensor, lengths: Tensor | None
    ) -> tuple[Frames, Tensor]:
        factor = self.shape.feature_grad_mult
        with torch.set_grad_enabled(factor > 0 and torch.is_grad_enabled()):
            frames = self.extract(waveform, lengths)
        if factor not in (0, 1):
            frames = Frames(GradMultiply.apply(frames.x, factor), frames.padding_mask)
        energy = frames.x.float().square().mean(-1)
        valid = frames.valid()
        return frames, (energy * valid).sum() / valid.sum()

    def extract_features(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        mask: bool = False,
        output_layer: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """fairseq's interface: ``source`` [batch, samples] and ``padding_mask`` [batch, samples] to
        the output of layer ``output_layer`` (1-based; None: the encoder's) and a frame mask."""
        if mask:
            raise ValueError("extract_features does not mask; use forward in pre-training")
        lengths = None if padding_mask is None else (~padding_mask).sum(1)
        frames = self.extract(source, lengths)
        x, outputs = self.encode(frames)
        return (x if output_layer is None else outputs[output_layer - 1]), frames.padding_mask

    def max_positions(self) -> None:
        return None


@register_model("lowbit_hubert", dataclass=HubertConfig)
class LowbitHubertModel(HubertFastConvModel):
    """The quantized HuBERT."""
