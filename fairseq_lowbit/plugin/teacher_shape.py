"""``model=as_teacher``: a run takes the shape of its model, and how audio is normalized, from its
teacher, or where it has none from what it starts from (``task.init_from``).
``task.normalize=as_teacher`` takes the second alone, and ``quant=as_teacher`` the precision.

Before anything is built, values replace the words ``as_teacher`` of the configuration.
The run's record and its checkpoints hold them, so that nobody needs the teacher for them again.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from fairseq_lowbit.configurations import AS_TEACHER
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import Source, read_source
from fairseq_lowbit.models import Architecture
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.precision.rules import ASYMMETRIC
from fairseq_lowbit.runs.folder import LAST_CHECKPOINT

# Fields of Architecture that belong to a training, not to a model. All others are its shape.
_OF_TRAINING = {
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "dropout_input",
    "encoder_layerdrop",
    "feature_grad_mult",
    "mask_prob",
    "mask_length",
    "logit_temp",
}
SHAPE = tuple(f.name for f in fields(Architecture) if f.name not in _OF_TRAINING)
# Of the shape, what a student may have otherwise: it changes no weight.
_MAY_DIFFER = ("padding",)


def adopt_teacher(config: DictConfig, folder: Path) -> None:
    """Replaces ``as_teacher`` in a configuration by the teacher's values.

    Args:
        config: of the run, with absolute paths; it is changed.
        folder: of the run's checkpoints. What they hold already decides: it does not change with a
            file that has been replaced.

    Raises:
        LowbitError: a shape that is given beside the teacher's; there is no teacher, or it cannot
            be read.
    """
    model = config.get("model")
    given = OmegaConf.to_container(model, resolve=False) if OmegaConf.is_dict(model) else {}
    shape = _open_shape(given) if AS_TEACHER in given.values() else []
    takes_normalize = OmegaConf.select(config, "task.normalize") == AS_TEACHER
    takes_precision = OmegaConf.select(config, "model.precision.name") == AS_TEACHER
    if not (shape or takes_normalize or takes_precision):
        return
    if takes_precision:
        _refuse_rules(given["precision"])
    source = _source(config, folder)
    with read_write(config), open_dict(config):
        for name in shape:
            config.model[name] = getattr(source.shape, name)
        if takes_normalize:
            config.task.normalize = source.normalize
        if takes_precision:
            config.model.precision = (source.precision or Precision()).to_mapping()


def _open_shape(given: dict[str, Any]) -> list[str]:
    """Fields of the shape that the teacher decides; raises LowbitError for one that is given."""
    names = [name for name in SHAPE if given.get(name, AS_TEACHER) == AS_TEACHER]
    beside = [name for name in SHAPE if name not in (*names, *_MAY_DIFFER)]
    if beside:
        raise LowbitError(
            f"model.{beside[0]}={given[beside[0]]} beside model=as_teacher, which takes the whole "
            "shape from task.teacher: leave it out, or choose another model="
        )
    return names


def _refuse_rules(precision: dict[str, Any]) -> None:
    is_refined = any(precision.get("rule_files", {}).values()) or precision.get("rules")
    if is_refined or precision.get("form", ASYMMETRIC) != ASYMMETRIC:
        what = "rules" if is_refined else f"form={precision['form']}"
        raise LowbitError(
            f"{what} beside quant=as_teacher, which takes the whole precision from a checkpoint: "
            "drop that, or choose another quant="
        )


def _source(config: DictConfig, folder: Path) -> Source:
    own = folder / LAST_CHECKPOINT
    if own.is_file():
        return read_source(own, with_weights=False)
    task = config.get("task") or {}
    keys = [key for key in ("teacher", "init_from") if key in task]
    teacher = next(
        (task[key] for key in keys if not OmegaConf.is_missing(task, key) and task[key]), None
    )
    if not teacher:
        raise LowbitError(
            f"task.{keys[0] if keys else 'teacher'} is not set: model=as_teacher, quant=as_teacher "
            "and task.normalize=as_teacher take what they stand for from it"
        )
    return read_source(teacher, with_weights=False)
