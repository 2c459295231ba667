"""``model=as_teacher``: a run takes the shape of its model, and how audio is normalized, from its
teacher.

Before anything is built, values replace the words ``as_teacher`` of config/model/as_teacher.yaml.
The run's record and its checkpoints hold them, so that nobody needs the teacher for them again.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import read_checkpoint, read_source
from fairseq_lowbit.runs.folder import LAST_CHECKPOINT

AS_TEACHER = "as_teacher"
# Fields of Architecture that a student shares with its teacher; the others regularise training.
SHAPE = (
    "conv_feature_layers",
    "extractor_mode",
    "conv_bias",
    "encoder_layers",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim",
    "encoder_attention_heads",
    "layer_norm_first",
    "conv_pos",
    "conv_pos_groups",
    "final_dim",
)


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
    open_keys = list(_open_keys(config))
    if not open_keys:
        return
    _refuse_contradictions(config)
    value_of = _stored_values(folder) if _has_begun(folder) else _teacher_values(config)
    with read_write(config), open_dict(config):
        for key in open_keys:
            OmegaConf.update(config, key, value_of(key))


def _open_keys(config: DictConfig) -> Iterator[str]:
    for section in ("model", "task"):
        values = config.get(section)
        for key in values if OmegaConf.is_dict(values) else ():
            if OmegaConf.to_container(values, resolve=False)[key] == AS_TEACHER:
                yield f"{section}.{key}"


def _refuse_contradictions(config: DictConfig) -> None:
    given = [key for key in SHAPE if config.model.get(key, AS_TEACHER) != AS_TEACHER]
    if given:
        raise LowbitError(
            f"model.{given[0]}={config.model[given[0]]} beside model=as_teacher, which takes the "
            "whole shape from task.teacher: leave it out, or choose another model="
        )


def _has_begun(folder: Path) -> bool:
    return (folder / LAST_CHECKPOINT).is_file()


def _stored_values(folder: Path) -> Callable[[str], Any]:
    stored = OmegaConf.create(read_checkpoint(folder / LAST_CHECKPOINT, mmap=True)["cfg"])
    return lambda key: OmegaConf.select(stored, key)


def _teacher_values(config: DictConfig) -> Callable[[str], Any]:
    teacher = OmegaConf.select(config, "task.teacher", throw_on_missing=False)
    if not teacher:
        raise LowbitError("task.teacher is not set, from which model=as_teacher takes its shape")
    source = read_source(teacher, with_weights=False)

    def value_of(key: str) -> Any:
        section, _, name = key.partition(".")
        return source.normalize if section == "task" else getattr(source.shape, name)

    return value_of
