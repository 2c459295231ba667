"""Label-free knowledge distillation: losses on plain tensors and the lock-step forward."""

from fairseq_lowbit.distillation.front_end import refuse_other_frames, same_front_end
from fairseq_lowbit.distillation.lockstep import DistillationTerms, distill
from fairseq_lowbit.distillation.losses import attention_error, feature_error

__all__ = [
    "DistillationTerms",
    "attention_error",
    "distill",
    "feature_error",
    "refuse_other_frames",
    "same_front_end",
]
