"""This package's configurations outside of training: composing them, and what they ask for."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

import fairseq_lowbit
from fairseq_lowbit.errors import LowbitError, describe_config_error
from fairseq_lowbit.models import Architecture, Hubert, WithoutWeights
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.precision.grammar import parse_precision

_PACKAGE = Path(fairseq_lowbit.__file__).parent
# Stands in a configuration for what is taken from the checkpoint of task.teacher or init_from.
AS_TEACHER = "as_teacher"


@dataclass
class ModelConfig(Architecture):
    """The part of a configuration that a plan depends on; its types check what a user wrote."""

    precision: Precision = field(default_factory=Precision)


def config_dir() -> Path:
    """``config`` inside the installed package, or next to it in a checkout."""
    installed = _PACKAGE / "config"
    return installed if installed.is_dir() else _PACKAGE.parent / "config"


def config_names() -> list[str]:
    """Names for ``--config-name``."""
    return sorted(path.stem for path in config_dir().glob("*.yaml"))


def _shape_names() -> list[str]:
    """Names for ``model=``."""
    return sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))


def _rules_names() -> list[str]:
    """Names for ``rules=``."""
    return sorted(path.stem for path in (config_dir() / "rules").glob("*.yaml"))


def is_configuration(name: str) -> bool:
    """Whether :func:`model_config` finds ``name`` among our files."""
    return name in config_names() or name in _shape_names()


def compose_config(name: str, overrides: list[str]) -> DictConfig:
    """What ``fairseq-hydra-train --config-name NAME OVERRIDES`` composes from our files.

    Raises:
        LowbitError: an override or a name that does not fit.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose(name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        missing = getattr(error, "missing_cfg_file", None) or ""
        if missing.startswith("rules/"):  # of a list Hydra does not name the files there are
            names = ", ".join(_rules_names())
            raise LowbitError(f"rules: there is no {missing}; want names among {names}") from error
        raise LowbitError(f"configuration {name}: {describe_config_error(error)}") from error


def rules_overrides(text: str) -> list[str]:
    """Overrides for rules by the names of files in ``config/rules``, or for a list of rules.

    Raises:
        LowbitError: neither of them.
    """
    names = _rules_names()
    given = [name.strip() for name in text.split(",")]
    if all(name in names for name in given):
        return [f"rules=[{','.join(given)}]"]
    if text.strip().startswith("["):
        return [f"model.precision.rules={text}"]
    raise LowbitError(
        f"rules {text!r}: want names among {', '.join(names)}, or a list of rules such as "
        "[{match: encoder.layers.0.*, weight_bits: 8}]"
    )


def fold_rules(config: DictConfig) -> None:
    """Puts the rules of the chosen files, in order, before those that the configuration lists.

    Args:
        config: its ``model`` section, which is changed.
    """
    precision = config.get("precision")
    if precision is None or "rule_files" not in precision:
        return
    with read_write(config), open_dict(config):
        files = precision.pop("rule_files") or {}
        own = precision.get("rules") or []
        if not OmegaConf.is_list(own) and not isinstance(own, list):
            raise LowbitError(f"model.precision.rules {own!r}: give a list of rules")
        precision.rules = [*(rule for rules in files.values() for rule in rules or []), *own]


def training_config(name: str, overrides: list[str]) -> DictConfig:
    """The whole configuration of a configuration name, of a precision name at base size, or of a
    shape (``hubert_base``) as a float model.

    Raises:
        LowbitError: an unknown name; an override that does not fit.
    """
    if not is_configuration(name):
        _check_precision(name)
        overrides = [f"model.precision.name={name}", *overrides]
        name = "hubert_fastconv"
    elif name not in config_names():
        overrides = [f"model={name}", *overrides]
        name = "hubert_fastconv"
    return compose_config(name, overrides)


def model_config(name: str, overrides: list[str]) -> ModelConfig:
    """Shape and precision of what :func:`training_config` composes.

    Raises:
        LowbitError: as there; a key or a value that does not fit.
    """
    return read_model_config(training_config(name, overrides).model)


def _check_precision(name: str) -> None:
    try:
        parse_precision(name)
    except LowbitError as error:
        if "_w" in name:  # meant as a precision
            raise
        names = ", ".join([*config_names(), *_shape_names()])
        raise LowbitError(f"{error}; or a configuration: {names}") from error


def read_model_config(config: DictConfig) -> ModelConfig:
    """The ``model`` section of a configuration.

    Raises:
        LowbitError: an unknown key, or a value of another type.
    """
    config = copy.deepcopy(config)
    fold_rules(config)
    given = {key: value for key, value in config.items() if key != "_name"}
    _refuse_unknown_yet(given)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), given))
    except OmegaConfBaseException as error:
        raise LowbitError(describe_config_error(error, "model")) from error


def _refuse_unknown_yet(given: Mapping[str, Any]) -> None:
    precision = given.get("precision") or {}
    if AS_TEACHER in (*given.values(), precision.get("name")):
        raise LowbitError(
            f"model={AS_TEACHER} and quant={AS_TEACHER} stand for what a checkpoint has, which is "
            "read when a run starts: name that checkpoint instead, or another model= and quant="
        )


def build_model(config: ModelConfig) -> Hubert:
    """The model with random weights.

    Raises:
        LowbitError: an impossible shape or precision.
    """
    return Hubert(config, precision=config.precision)


def meta_model(config: ModelConfig) -> Hubert:
    """The model without its weights; raises as :func:`build_model`."""
    with WithoutWeights():
        return build_model(config)
