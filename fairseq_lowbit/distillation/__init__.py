"""Label-free knowledge distillation: losses on plain tensors and the lock-step forward."""

from fairseq_lowbit.distillation.lockstep import DistillationTerms, distill, same_front_end
from fairseq_lowbit.distillation.losses import attention_error, feature_error

__all__ = ["DistillationTerms", "attention_error", "distill", "feature_error", "same_front_end"]
