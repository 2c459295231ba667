"""Adam with own rates for quantizer scales and shifts, as ratios of the main rate."""

from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II

from fairseq_lowbit.errors import LowbitError, require_number
from fairseq_lowbit.quantization.quantizer import SCALE_GROUP, SHIFT_GROUP
from fairseq_lowbit.quantization.squashed import SQUASHED_GROUP


@dataclass
class LowbitAdamConfig(FairseqDataclass):
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    adam_eps: float = 1e-6
    # Decoupled; squashed weights and quantizer parameters have none.
    weight_decay: float = 0.01
    # Rates relative to optimization.lr: of log scales, of shifts, of squashed weights.
    scale_lr_ratio: float = 1.0
    shift_lr_ratio: float = 1.0
    squashed_lr_ratio: float = 3.0
    lr: list[float] = II("optimization.lr")


@register_optimizer("lowbit_adam", dataclass=LowbitAdamConfig)
class LowbitAdam(FairseqOptimizer):
    """AdamW over parameter groups: weights, quantizer scales, quantizer shifts, squashed weights.

    Any fairseq scheduler drives it: a rate it sets is multiplied by each group's ratio.
    """

    def __init__(self, cfg: LowbitAdamConfig, params: list[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        for key in ("scale_lr_ratio", "shift_lr_ratio", "squashed_lr_ratio", "weight_decay"):
            require_number(f"optimizer.{key}", getattr(cfg, key), 0)
        for lr in cfg.lr:
            require_number("optimization.lr", lr, 0)
        ratios = {
            SCALE_GROUP: cfg.scale_lr_ratio,
            SHIFT_GROUP: cfg.shift_lr_ratio,
            SQUASHED_GROUP: cfg.squashed_lr_ratio,
        }
        groups: dict[str, list] = {"weights": [], **{name: [] for name in ratios}}
        for param in params:
            groups[getattr(param, "param_group", "weights")].append(param)
        if len(params) == 1 and params[0].dim() == 1:
            raise LowbitError(
                "lowbit_adam got one flat parameter: set common.fp16_no_flatten_grads=true"
            )
        self._optimizer = torch.optim.AdamW(
            [
                {
                    "params": members,
                    "lr_ratio": ratios.get(name, 1.0),
                    "weight_decay": 0.0 if name in ratios else cfg.weight_decay,
                }
                for name, members in groups.items()
                if members
            ],
            **self.optimizer_config,
            # One pass over the weights instead of ten, and none of the square roots of zero (the
            # gradient of a clipped weight) that cost CPUs ten times those of other numbers.
            fused=True,
        )
        self._configured = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {
            "lr": self.cfg.lr[0],
            "betas": tuple(self.cfg.adam_betas),
            "eps": self.cfg.adam_eps,
        }

    def load_state_dict(self, state_dict: dict, optimizer_overrides: dict | None = None) -> None:
        """A resumed run takes the moments from the checkpoint and the options from its own
        configuration; torch would take both from the checkpoint."""
        super().load_state_dict(state_dict)
        for group, configured in zip(self.param_groups, self._configured, strict=True):
            group.update({**configured, **(optimizer_overrides or {})})

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr * group["lr_ratio"]
