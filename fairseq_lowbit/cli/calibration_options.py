"""The options of calibration without training, of ``ptq`` and ``evaluate --ptq``."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairseq_lowbit.configurations import read_model_config, rules_overrides, training_config
from fairseq_lowbit.data.calibration_audio import CalibrationAudio, CalibrationConfig
from fairseq_lowbit.data.manifest import Manifest
from fairseq_lowbit.data.recordings import LABEL_RATE, AudioConfig, AudioOptions, Recordings
from fairseq_lowbit.errors import LowbitError, describe_config_error
from fairseq_lowbit.evaluation.ptq import Calibrated, post_training_quantized
from fairseq_lowbit.models import LoadedModel, WithoutWeights
from fairseq_lowbit.models.extractor import receptive_field
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.precision.grammar import LEARNED_SCALE
from fairseq_lowbit.quantization import Criterion
from fairseq_lowbit.quantization.calibration import CRITERIA

# Options, and the keys of a training configuration that they set.
_KEYS = {
    "calibration": "task.calibration.criterion",
    "percentile": "task.calibration.percentile",
}
_DEFAULT = Criterion()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        choices=CRITERIA,
        help="what a learned scale fits: mse (default), the least squared error, which suits every "
        "width; absmax, nothing clipped, or percentile, little clipped, for many levels (8 bits): "
        "at w2a2 percentile 99.9 is the worst of the three",
    )
    parser.add_argument(
        "--percentile",
        type=float,
        metavar="P",
        help="percentage of the magnitudes that --calibration percentile does not clip "
        f"({_DEFAULT.percentile:g})",
    )
    parser.add_argument(
        "--rules",
        metavar="NAME|LIST",
        help="files of config/rules, as front_end_w8a8,per_channel, or a list as in "
        "model.precision.rules: [{match: ...}]",
    )
    parser.add_argument(
        "--override",
        action="append",
        metavar="OVERRIDE",
        help="Hydra override of the training that this is the start of, for example "
        "task.calibration.batches=16 or task.min_sample_size=4000 (shorter files are left out)",
    )


def check_needed(args: argparse.Namespace, rows: Sequence[str]) -> None:
    """Raises LowbitError if there are options of calibration but nothing to calibrate."""
    for name in ("calibration", "percentile", "rules", "override"):
        if not rows and getattr(args, name) is not None:
            raise LowbitError(f"--{name} belongs to --ptq: give a precision to calibrate too")


def read_config(name: str, args: argparse.Namespace) -> DictConfig:
    """The configuration of the training whose start is asked for: of a precision and the options.

    Raises:
        LowbitError: an unknown name, rule, file of rules or override; an override of what an option
            decides.
    """
    given = [] if args.rules is None else rules_overrides(args.rules)
    precision = "--ptq" if "ptq" in args else "--precision"
    decided = {"model.precision.name": precision, "quant": precision, "rules": "--rules"}
    decided |= {_key(text): "--rules" for text in given}
    for option, key in _KEYS.items():
        value = getattr(args, option)
        if value is not None:
            given.append(f"{key}={value}")
            decided[key] = f"--{option}"
    own = args.override or []
    for text in own:
        if _key(text) in decided:
            raise LowbitError(f"--override {text}: drop it; {decided[_key(text)]} decides that")
    return training_config(name, own + given)


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].strip()


def read_precision(config: DictConfig) -> Precision:
    """Raises LowbitError for a value that does not fit."""
    return read_model_config(config.model).precision


def check_criterion(args: argparse.Namespace, teacher: LoadedModel, precision: Precision) -> None:
    """Raises LowbitError for an option without effect in this combination, and for a precision
    that does not fit ``teacher`` or quantizes nothing."""
    if args.percentile is not None and args.calibration != "percentile":
        raise LowbitError("--percentile belongs to --calibration percentile: give it too")
    with WithoutWeights():
        entries = teacher.model.untrained(precision).plan.entries
    if not any(entry.is_quantized for entry in entries):
        raise LowbitError(
            f"{precision.name} has nothing to calibrate: name a precision that quantizes, for "
            "example bitl_w8a8"
        )
    learned = any(entry.method in LEARNED_SCALE for entry in entries)
    if args.calibration is not None and not learned:
        raise LowbitError(
            f"--calibration {args.calibration}: no scale of {precision.name} is learned, so none "
            "is fitted: drop it"
        )


@dataclass
class _TaskSection(AudioConfig):
    """What calibration depends on; its types check what a user wrote."""

    label_rate: float = LABEL_RATE
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)


def _read_task(config: DictConfig) -> _TaskSection:
    given = {e.name: config.task[e.name] for e in fields(_TaskSection) if e.name in config.task}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_TaskSection), given))
    except OmegaConfBaseException as error:
        raise LowbitError(describe_config_error(error, "task")) from error


def quantize(teacher: LoadedModel, config: DictConfig, manifest: Manifest) -> Calibrated:
    """``teacher`` as a training of ``config`` on ``manifest`` starts with it.

    Raises:
        LowbitError: settings that make no sense; no file of a usable size; too many unusable ones.
    """
    task = _read_task(config)
    frame = receptive_field(teacher.model.conv_layers)
    options = AudioOptions.from_config(task, frame, config.common.seed)
    return post_training_quantized(
        teacher,
        read_precision(config),
        Recordings(manifest, replace(options, normalize=teacher.normalize)),
        Criterion(task.calibration.criterion, task.calibration.percentile),
        CalibrationAudio.from_config(task.calibration),
    )
