"""fairseq's training loop, guarded: what happens between two updates when a run is asked to stop,
cannot save, or has nothing left to do."""

import logging
import os
from functools import wraps
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq_cli import train as fairseq_train

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import writing
from fairseq_lowbit.plugin import interruption
from fairseq_lowbit.plugin.processes import part, together
from fairseq_lowbit.plugin.trainer import LowbitTrainer, ValidationCutShort

logger = logging.getLogger(__name__)

Losses = list[float | None]


def apply() -> None:
    """Puts every guard into ``fairseq_cli.train``, once."""
    fairseq_train.Trainer = LowbitTrainer
    checkpoint_utils.verify_checkpoint_directory = _verify(
        checkpoint_utils.verify_checkpoint_directory
    )
    checkpoint_utils.save_checkpoint = _save(checkpoint_utils.save_checkpoint)
    fairseq_train.validate = _validate(fairseq_train.validate)
    fairseq_train.validate_and_save = _validate_and_save(fairseq_train.validate_and_save)
    fairseq_train.train = _train(fairseq_train.train)


def _verify(verify: Any) -> Any:
    @wraps(verify)
    def guarded(save_dir: str) -> None:
        with writing(save_dir):
            verify(save_dir)

    return guarded


def _save(save: Any) -> Any:
    # One process writes; without a word from it the others would wait for an update that it, out
    # of disk space, never makes.
    @wraps(save)
    def guarded(cfg: Any, trainer: Any, *args: Any) -> str | None:
        with together():
            _refuse_non_finite(trainer.get_model())
            with writing(cfg.save_dir):
                return save(cfg, trainer, *args)

    return guarded


def _refuse_non_finite(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise LowbitError(
                f"parameter {name} is not finite; the checkpoints keep the state before. Lower "
                "optimization.lr and run the same command to resume"
            )


def _validate(validate: Any) -> Any:
    @wraps(validate)
    def guarded(cfg: Any, trainer: LowbitTrainer, *args: Any) -> Losses:
        if trainer.stopping:
            raise ValidationCutShort
        return validate(cfg, trainer, *args)

    return guarded


def _validate_and_save(validate_and_save: Any) -> Any:
    @wraps(validate_and_save)
    def guarded(
        cfg: Any, trainer: LowbitTrainer, task: Any, epoch_itr: Any, *args: Any
    ) -> tuple[Losses, bool]:
        try:
            result = validate_and_save(cfg, trainer, task, epoch_itr, *args)
        except ValidationCutShort:
            trainer.missed_validation = True
        if not trainer.stopping:
            return result
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
        return [None], True

    return guarded


def _train(train: Any) -> Any:
    @wraps(train)
    def guarded(cfg: Any, trainer: LowbitTrainer, task: Any, epoch_itr: Any) -> tuple[Losses, bool]:
        try:
            if trainer.missed_validation:
                _make_up_validation(cfg, trainer, task, epoch_itr)
            last = cfg.optimization.max_update
            if last and trainer.get_num_updates() >= last:
                # fairseq would make one more update and save it.
                logger.info(f"this run has made its {last} updates; raise optimization.max_update")
                return [None], True
            result = train(cfg, trainer, task, epoch_itr)
        except ValidationCutShort:
            result = [None], True  # the checkpoint that was loaded says so still
        if trainer.stopping:
            logger.info(
                f"stopped by {interruption.received() or 'a signal'} and saved at update "
                f"{trainer.get_num_updates()}: run the same command to go on"
            )
            part()
            interruption.leave()
        return result

    return guarded


def _make_up_validation(cfg: Any, trainer: LowbitTrainer, task: Any, epoch_itr: Any) -> None:
    """Validates the checkpoint that a stop has saved without, and saves it as a run that was not
    stopped would have."""
    subsets = cfg.dataset.valid_subset.split(",")
    loss = fairseq_train.validate(cfg, trainer, task, epoch_itr, subsets)[0]
    trainer.missed_validation = False
    options, save = cfg.checkpoint, checkpoint_utils.save_checkpoint
    better = max if options.maximize_best_checkpoint_metric else min
    save.best = better(loss, getattr(save, "best", loss))
    state = {**trainer.loaded_state, "val_loss": loss, "best": save.best}
    last, best = (
        os.path.join(options.save_dir, f"checkpoint_{which}{trainer.checkpoint_suffix}.pt")
        for which in ("last", "best")
    )
    trainer.consolidate_optimizer()
    with together():
        trainer.save_checkpoint(last, state)
        if save.best == loss and trainer.is_data_parallel_master:
            PathManager.copy(last, best, overwrite=True)
