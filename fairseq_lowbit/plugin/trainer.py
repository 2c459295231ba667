"""fairseq's trainer with what a run of days needs: it stops when asked to, says where numbers stop
being finite, keeps the fp32 weights of a bf16 or fp16 run, and looks after a model's quantizers."""

import logging
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.data.iterators import EpochBatchIterator
from fairseq.trainer import Trainer
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.monitoring.divergence import first_non_finite
from fairseq_lowbit.plugin import interruption, progress
from fairseq_lowbit.plugin.processes import (
    SharedError,
    gather,
    is_first,
    raise_shared,
    together,
)
from fairseq_lowbit.plugin.quantized_training import QuantizedTraining
from fairseq_lowbit.plugin.scale import describe_scale
from fairseq_lowbit.precision import Plan
from fairseq_lowbit.quantization import weights_encoded_once
from fairseq_lowbit.runs.folder import LAST_CHECKPOINT

logger = logging.getLogger(__name__)

_MISSED = "missed_validation"
_CRASH_FILE = "crash.pt"
_NAMED = 4


class ValidationCutShort(Exception):
    """A validation pass that gives way to saving and stopping."""


class _Diverged(Exception):
    """Gradients that are not finite, on every process, before the optimizer's step."""


class LowbitTrainer(Trainer):
    """Attributes:
    stopping: whether all processes agreed to stop after the present update.
    missed_validation: whether the present update was saved without the validation it was due.
    loaded_state: what the checkpoint that was resumed holds beside weights and optimizer.
    """

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        if cfg.common.amp:
            raise SharedError(
                "common.amp=true: fairseq divides these gradients by the loss scale twice; set "
                "common.bf16=true instead to train in half precision"
            )
        super().__init__(cfg, *args, **kwargs)
        self.stopping = False
        self.missed_validation = False
        self.loaded_state: dict[str, Any] | None = None
        self._signalled: Tensor | float = 0.0
        self._has_told_scale = False
        # With several GPUs fairseq moves the model to its own when it is first asked for: too late
        # for calibration there.
        _ = self.model
        is_planned = isinstance(getattr(self.get_model(), "plan", None), Plan)
        self._quantized = QuantizedTraining(self) if is_planned else None
        progress.train_on(self.device)
        interruption.listen()

    # Quantizers

    def get_train_iterator(self, *args: Any, **kwargs: Any) -> EpochBatchIterator:
        iterator = super().get_train_iterator(*args, **kwargs)
        if not self._has_told_scale and is_first():
            for line in describe_scale(self.cfg, iterator, self.cuda):
                logger.info(line)
        self._has_told_scale = True
        if self._quantized is not None:
            self._quantized.prepare()
        return iterator

    def to_device(self, sample: Any) -> Any:
        """A sample as a training step hands it to the model."""
        return self._fp_convert_sample(utils.move_to_cuda(sample) if self.cuda else sample)

    # Stopping

    def _aggregate_logging_outputs(
        self, logging_outputs: list[dict[str, Any]], *extra_stats_to_sum: Any, ignore: bool = False
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        # A signal may reach the processes at different updates. What they exchange after every
        # batch anyway tells all of them in the same update, without a message of its own.
        signalled = float(interruption.received() is not None)
        outputs, sums = super()._aggregate_logging_outputs(
            logging_outputs, *extra_stats_to_sum, signalled, ignore=ignore
        )
        *sums, self._signalled = sums
        return outputs, sums

    def _agree_to_stop(self) -> None:
        if self.data_parallel_world_size == 1:
            self._signalled = float(interruption.received() is not None)
        self.stopping = self.stopping or bool(self._signalled > 0)

    # Numbers that are not finite

    def train_step(
        self, samples: list[dict[str, Any]], raise_oom: bool = False
    ) -> dict[str, Any] | None:
        if self._quantized is not None:
            self._quantized.record_health(self.get_num_updates())
        try:
            # Weights change at the end of it alone, by whatever optimizer.
            with weights_encoded_once():
                logged = super().train_step(samples, raise_oom)
        except _Diverged as error:
            self._refuse_to_go_on(samples, "the loss or its gradient", error)
        if not _loss_is_finite(logged):
            self._refuse_to_go_on(samples, "the loss")
        self._agree_to_stop()
        return logged

    def valid_step(self, sample: dict[str, Any], raise_oom: bool = False) -> dict[str, Any]:
        logged = super().valid_step(sample, raise_oom)
        if not _loss_is_finite(logged):
            self._refuse_to_go_on([sample], "the validation loss")
        self._agree_to_stop()
        if self.stopping:
            raise ValidationCutShort
        return logged

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        try:
            norm = super().clip_grad_norm(clip_norm)
        except FloatingPointError as error:  # fp16: the loss scale has no room left
            raise _Diverged from error
        # fairseq asks the same next, so this waits for the device no more.
        if not torch.isfinite(norm).all():
            raise _Diverged
        return norm

    def _refuse_to_go_on(
        self, samples: list[dict[str, Any]], what: str, cause: BaseException | None = None
    ) -> None:
        """Raises the same LowbitError on every process; each looks at its own batches."""
        begin = f"{what} is not finite at update {self.get_num_updates()}"
        last = os.path.abspath(os.path.join(self.cfg.checkpoint.save_dir, LAST_CHECKPOINT))
        end = (
            f". {last} is left as it was: lower optimization.lr or leave those files out, and run "
            "the same command to resume"
        )
        found = gather(self._find_non_finite(samples))
        if not any(found):
            found = ["every number is finite when the batch is computed again, so a sum overflowed"]
        raise_shared([where and f"{begin}: {where}{end}" for where in found], cause)

    def _find_non_finite(self, samples: list[dict[str, Any]]) -> str | None:
        """Where the first of ``samples`` that is not finite stops being so, in words."""
        models = {"": self.get_model()}
        if getattr(self.task, "teacher", None) is not None:
            models["teacher"] = self.task.teacher.model
        # The random numbers of the first time.
        self._set_seed()
        for sample in samples:
            sample, is_dummy = self._prepare_sample(sample)
            if is_dummy:
                continue
            self.zero_grad()
            terms: dict[str, Any] = {}
            found = first_non_finite(models, partial(self._loss, sample, terms))
            if found is not None:
                return f"first {found} ({_describe(sample, terms)})"
        return None

    def _loss(self, sample: dict[str, Any], terms: dict[str, Any]) -> Tensor:
        # The model without its wrapper: the other processes do not take part.
        loss, _, logged = self.criterion(self.get_model(), sample)
        terms.update(logged)
        return loss

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """fairseq's, with the fp32 weights that the optimizer moves where the model's own are bf16
        or fp16: from rounded ones, a resumed run would go another way."""
        state = super().state_dict()
        state["model"].update({name: master.data for name, master in self._masters()})
        return state

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        weights: dict[str, Tensor] = {}
        hook = self.get_model().register_load_state_dict_pre_hook(
            lambda module, state, *_: weights.update(state)
        )
        try:
            with together():
                extra_state = super().load_checkpoint(*args, **kwargs)
                progress.forget_after(Path(self.cfg.checkpoint.save_dir), self.get_num_updates())
        finally:
            hook.remove()
        # Only the optimizer that fairseq has loaded too: a new one is built after calibration.
        if weights and self._optimizer is not None:
            for name, master in self._masters():
                master.data.copy_(weights[name])
        self.loaded_state = extra_state
        # A model to start from is not this run's own.
        goes_on = extra_state is not None and self.get_num_updates() > 0
        self.missed_validation = goes_on and bool(extra_state.get(_MISSED))
        return extra_state

    def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> str | None:
        # A mistake said in one message needs no copy of the model beside it.
        if os.path.basename(filename) == _CRASH_FILE and isinstance(sys.exception(), LowbitError):
            return None
        return super().save_checkpoint(filename, {**extra_state, _MISSED: self.missed_validation})

    def _masters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """(name, fp32 copy) of the parameters in training; empty where the model is fp32 itself."""
        copies = getattr(self.optimizer, "fp32_params", None)
        if not isinstance(copies, list):
            return []
        names = {id(parameter): name for name, parameter in self.get_model().named_parameters()}
        pairs = zip(self.optimizer.fp16_params, copies, strict=True)
        return [(names[id(own)], copy) for own, copy in pairs if id(own) in names]


def _loss_is_finite(logged: dict[str, Any] | None) -> bool:
    return logged is None or math.isfinite(float(logged.get("loss", 0.0)))


def _describe(sample: dict[str, Any], terms: dict[str, Any]) -> str:
    # Sums over the batch; the logs have means.
    size = float(terms.get("sample_size", 1))
    losses = [f"{key} {float(v) / size:.4g}" for key, v in terms.items() if key.startswith("loss")]
    names = sample.get("names", [])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join([*losses, f"files of the batch {', '.join(names[:_NAMED])}{more}"])
