"""What a run with quantizers does beside fairseq's training, whatever its task: it calibrates, and
leaves the plan and health records beside its checkpoints."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fairseq import utils
from fairseq.data import data_utils
from torch import Tensor

from fairseq_lowbit.data.calibration_audio import CalibrationConfig
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.monitoring.collapse import CollapseWatch
from fairseq_lowbit.monitoring.health import collapsed_layers, measure_health
from fairseq_lowbit.nn import (
    calibrate,
    describe_squashing,
    every_quantizer_called,
    is_calibrated,
)
from fairseq_lowbit.plugin.compiling import compile_layers
from fairseq_lowbit.plugin.processes import (
    is_first,
    refuse_different,
    share_weights,
    together,
)
from fairseq_lowbit.plugin.run_files import write_health, write_plan
from fairseq_lowbit.quantization import Criterion

if TYPE_CHECKING:
    from fairseq_lowbit.plugin.trainer import LowbitTrainer

logger = logging.getLogger(__name__)

HEALTH_INTERVAL = 200


class QuantizedTraining:
    """Calibration, plan file and health of a model with a ``plan``, for any task of fairseq.

    ``task.calibration`` and ``task.health_interval`` are used where the task has such settings. A
    task may say what its model is run on, and ``task.compile`` that layers are compiled:

    - ``calibration_batches()``: batches without padding, the same in every process;
    - ``forward_for_calibration(model, batch)``: runs all of the model, and returns the outputs of
      its layers, [batch, frames, features] each, whose collapse is watched.

    Otherwise these are the first batches of the first epoch, run through the criterion.

    Raises:
        LowbitError: the run's folder cannot be written.
    """

    def __init__(self, trainer: "LowbitTrainer") -> None:
        self._trainer, self._task = trainer, trainer.task
        self._model = trainer.get_model()
        config = trainer.cfg
        self._calibration = getattr(config.task, "calibration", CalibrationConfig())
        self._criterion = Criterion(self._calibration.criterion, self._calibration.percentile)
        self._health_interval = getattr(config.task, "health_interval", HEALTH_INTERVAL)
        self._health_batch: Any = None
        self._health_update: int | None = None
        self._collapse_watch = CollapseWatch()
        self._folder = Path(config.checkpoint.save_dir)
        # Some processes may not see which stages of a schedule are finished.
        refuse_different("models", lambda: (self._model.plan.to_mapping(), self._folder.name))
        with together():
            write_plan(self._folder, self._model.plan)

    # Calibration

    def prepare(self) -> None:
        """Calibrates a new run, and proves that every quantizer is called. Belongs behind the
        checkpoint and before the optimizer, which may copy parameters when it is made.

        Raises:
            LowbitError: a quantizer that is not called; nothing to calibrate on.
        """
        if self._health_batch is not None:
            return
        with together(), self._fixed_random_numbers():
            self._calibrate()
        # Other hardware may round otherwise, and nothing would even it out again.
        share_weights(self._model)
        if getattr(self._trainer.cfg.task, "compile", False):
            teacher = getattr(self._task, "teacher", None)
            compile_layers(self._model, *([] if teacher is None else [teacher.model]))

    def _calibrate(self) -> None:
        is_new = not is_calibrated(self._model)
        batches = list(islice(self._batches(), self._calibration.batches if is_new else 1))
        if not batches:
            raise LowbitError("the training data have no batch to calibrate on")
        self._health_batch = batches[0]
        if not is_new:
            self._check_every_quantizer_is_called()
            return
        logger.info(f"calibrating on {len(batches)} batches")
        clipped = calibrate(self._model, batches, self._forward, self._criterion)
        if clipped:
            logger.info(describe_squashing(clipped))

    def _batches(self) -> Iterator[Any]:
        """As a training step would hand them to the model."""
        offered = getattr(self._task, "calibration_batches", self._first_training_batches)
        return map(self._trainer.to_device, offered())

    def _first_training_batches(self) -> Iterator[Any]:
        """Of all processes together."""
        task, data = self._task, self._trainer.cfg.dataset
        positions = utils.resolve_max_positions(
            task.max_positions(), self._model.max_positions(), data.max_tokens
        )
        batches = task.get_batch_iterator(
            task.dataset(data.train_subset),
            max_tokens=data.max_tokens,
            max_sentences=data.batch_size,
            max_positions=positions,
            ignore_invalid_inputs=True,
            required_batch_size_multiple=data.required_batch_size_multiple,
            seed=self._calibration.seed,
            disable_iterator_cache=True,
        )
        return batches.next_epoch_itr(shuffle=True)

    def _forward(self, batch: Any) -> Sequence[Tensor]:
        """The outputs of the layers, of a task that knows them."""
        forward = getattr(self._task, "forward_for_calibration", None)
        if forward is not None:
            return forward(self._model, batch)
        self._trainer.get_criterion()(self._model, batch)
        return ()

    @torch.no_grad()
    def _check_every_quantizer_is_called(self) -> None:
        was_training = self._model.training
        self._model.eval()
        try:
            with every_quantizer_called(self._model):
                self._forward(self._health_batch)
        finally:
            self._model.train(was_training)

    @contextmanager
    def _fixed_random_numbers(self) -> Iterator[None]:
        """Those of training stay as they are, and masks of a foreign criterion the same."""
        seed = self._calibration.seed
        with data_utils.numpy_seed(seed), utils.set_torch_seed(seed):
            yield

    # Health

    def record_health(self, update: int) -> None:
        """Before each attempt at an update; recorded once, though fp16 may need several."""
        interval = self._health_interval
        if not interval or update % interval or update == self._health_update:
            return
        self._health_update = update
        with together():
            if is_first():
                self._measure_health(update)

    def _measure_health(self, update: int) -> None:
        with self._fixed_random_numbers():
            health = measure_health(self._model, self._health_batch, self._forward)
        write_health(self._folder, update, health)
        dead = collapsed_layers(health.centered_std)
        if dead:
            logger.warning(
                f"layers {dead} are constant over time at update {update}: the model is "
                "collapsing; lower optimization.lr or lengthen its warm-up"
            )
        collapsed = self._collapse_watch.warning(health.quantizers)
        if collapsed:
            logger.warning(f"at update {update} {collapsed}")
