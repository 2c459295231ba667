"""One task of SUPERB on one model by s3prl: trained, tested and written down."""

import re
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig, OmegaConf

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_without_weights
from fairseq_lowbit.interop.s3prl import NAME
from fairseq_lowbit.interop.s3prl.compat import find_s3prl
from fairseq_lowbit.interop.s3prl.downstream import run_downstream
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.profiling import Profile, profile
from fairseq_lowbit.runs.superb.preparation import (
    Order,
    check_machine,
    configure,
    fingerprint,
    prepare,
)
from fairseq_lowbit.runs.superb.results import (
    RESULT,
    Result,
    Settings,
    begin,
    check_same_settings,
    read_result,
    write_result,
)
from fairseq_lowbit.runs.superb.tasks import Metric, Task

_LOG = "log.txt"


def run_task(order: Order, template: Path, reference: Profile) -> Result:
    """Runs a task to its end, or from where an interrupted start has left it; a finished one is
    only read.

    Args:
        template: the task's file of ``config/superb``.
        reference: HuBERT-FastConv, of whose cost a runtime is a multiple.

    Raises:
        LowbitError: before anything is run for what is missing or wrong; afterwards for an s3prl
            that printed no figure.
    """
    folder, version = find_s3prl()
    check_machine(order, folder)
    model = open_without_weights(order.model)
    config, changed = configure(order, template)
    settings = _settings(order, config, changed, version)
    if (order.out / RESULT).exists():
        result = read_result(order.out)
        known = replace(settings, inputs=result.settings.inputs)
        check_same_settings(order.out, result.settings, known)
        return result
    settings = replace(settings, inputs=prepare(order, config, folder))
    begin(order.out, settings)
    print(f"{settings.task}: {settings.training}; kept in {order.out}", flush=True)
    metrics = _Session(order, config, model).metrics()
    cost = profile(model, order.name)
    result = Result(
        name=order.name,
        settings=settings,
        metrics=metrics,
        storage_mb=cost.storage_bytes / 1e6,
        runtime=cost.runtime(reference),
        folder=order.out,
    )
    write_result(result)
    return result


def _settings(order: Order, config: DictConfig, changed: tuple[str, ...], version: str) -> Settings:
    """Without the digest of inputs."""
    return Settings(
        task=order.task.name,
        model=order.model,
        data=str(order.data),
        learning_rate=OmegaConf.select(config, "optimizer.lr"),
        updates=config.runner.get("total_steps"),
        batch_size=OmegaConf.select(config, order.task.batch),
        accumulated=config.runner.get("gradient_accumulate_steps", 1),
        changed=changed,
        lexicon=order.lexicon,
        s3prl=version,
        inputs="",
        checkpoint=fingerprint(order.model),
    )


@dataclass(frozen=True)
class _Session:
    """Calls of s3prl for one task."""

    order: Order
    config: DictConfig
    model: Hubert

    @property
    def task(self) -> Task:
        return self.order.task

    def metrics(self) -> dict[str, float]:
        """The mean over folds, where a task has some."""
        if not self.task.is_trained:
            return self._best_layer()
        if not self.task.folds:
            return self._train_and_test(self.order.out, self.config)
        found = []
        for fold in self.task.folds:
            config = self.config.copy()
            config.downstream_expert.datarc.test_fold = fold
            found.append(self._train_and_test(self.order.out / fold, config))
        return {key: statistics.fmean(figures[key] for figures in found) for key in found[0]}

    def _train_and_test(self, folder: Path, config: DictConfig) -> dict[str, float]:
        written = _write(config, folder)
        newest = _newest_checkpoint(folder)
        if newest is None:
            self._call("train", *self._fresh(folder / "s3prl", written))
        elif _updates(newest) < config.runner.total_steps:
            self._call("train", "-e", str(newest))
        states = folder / "s3prl"
        checkpoints = sorted(states.glob("states-*.ckpt"), key=_updates)
        if self.task.best is not None:
            # There is none if no validation was better than nothing learned.
            best = states / self.task.best
            checkpoints = [best if best.exists() else checkpoints[-1]]
        first = self.task.metrics[0].column
        tested = [self._test(checkpoint) for checkpoint in checkpoints]
        return (min if first.lower_is_better else max)(tested, key=lambda found: found[first.key])

    def _test(self, checkpoint: Path) -> dict[str, float]:
        printed = self._call("evaluate", "-e", str(checkpoint), "-t", self.task.split)
        return {
            metric.column.key: _figure(metric, printed, self.order.out / _LOG)
            for metric in self.task.metrics
        }

    def _best_layer(self) -> dict[str, float]:
        """Of the layer that is best on the development set; every layer's score is kept."""
        (metric,) = self.task.metrics
        layers = range(len(self.model.encoder.layers) + 1)
        scores = {layer: self._score(metric, layer, "dev") for layer in layers}
        best = max(scores, key=scores.__getitem__)
        return {metric.column.key: self._score(metric, best, "eval")}

    def _score(self, metric: Metric, layer: int, split: str) -> float:
        folder = self.order.out / f"layer{layer}_{split}"
        log = folder / "score.out"
        if not log.exists():
            written = _write(self.config, folder)
            self._call("evaluate", "-t", split, "-l", str(layer), *self._fresh(folder, written))
            scoring = Path(self.config.downstream_expert.datarc.dataset_root, "scoring")
            script = scoring / "score-TWV-Cnxe.sh"
            command = ["bash", str(script), str(folder), f"groundtruth_quesst14_{split}", "-10"]
            subprocess.run(command, cwd=scoring, check=False)
        printed = log.read_text(encoding="utf-8") if log.exists() else ""
        return _figure(metric, printed, log)

    def _fresh(self, folder: Path, config: Path) -> list[str]:
        """Arguments of a first start."""
        names = ["-u", NAME, "-k", self.order.model, "-d", self.task.downstream]
        return [*names, "-c", str(config), "-p", str(folder)]

    def _call(self, mode: str, *arguments: str) -> str:
        """What s3prl prints, which goes to the screen and the log too."""
        workers = f"config.{self.task.workers}={self.order.workers}"
        fixed = ["--device", self.order.device, "-o", workers]
        with _recorded(self.order.out / _LOG) as printed:
            run_downstream(["-m", mode, *arguments, *fixed], self.order.out / "lists")
        return printed.getvalue()


def _write(config: DictConfig, folder: Path) -> Path:
    """``config.yaml``, for s3prl and to be kept with the result."""
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml")
    return folder / "config.yaml"


def _updates(checkpoint: Path) -> int:
    return int(checkpoint.stem.rpartition("-")[2])


def _newest_checkpoint(folder: Path) -> Path | None:
    """Removes those that an interrupted write has left behind, which s3prl would stop at."""
    whole = []
    for checkpoint in (folder / "s3prl").glob("states-*.ckpt"):
        if zipfile.is_zipfile(checkpoint):
            whole.append(checkpoint)
        else:
            checkpoint.unlink()
    return max(whole, key=_updates, default=None)


def _figure(metric: Metric, printed: str, log: Path) -> float:
    found = re.findall(rf"{metric.printed}(-?\d[\d.e+-]*)", printed)
    if not found:
        raise LowbitError(
            f"s3prl printed no {metric.column.title} ({metric.column.unit}): see {log}"
        )
    return float(found[-1])


@contextmanager
def _recorded(path: Path) -> Iterator[StringIO]:
    """What is printed meanwhile, also shown and added to a file."""
    printed = StringIO()
    with open(path, "a", encoding="utf-8") as log, redirect_stdout(_Tee(sys.stdout, log, printed)):
        yield printed


class _Tee(StringIO):
    def __init__(self, *files: TextIO) -> None:
        super().__init__()
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            file.write(text)
            file.flush()
        return len(text)
