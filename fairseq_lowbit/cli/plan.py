"""``fairseq-lowbit plan``: the resolved precision of a configuration, without training."""

import argparse
import json
from dataclasses import dataclass, field

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.tables import plan_table, print_table
from fairseq_lowbit.models import Architecture, Hubert
from fairseq_lowbit.plugin.configs import compose_config, config_names
from fairseq_lowbit.precision import Plan, Precision

HELP = "print which module gets how many bits, and what it stores"


@dataclass
class ModelConfig(Architecture):
    """The part of a configuration that a plan depends on; its types check what a user wrote."""

    precision: Precision = field(default_factory=Precision)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a configuration (bitla_w1a1) or any precision (bitla_w3a5)")
    parser.add_argument(
        "overrides", nargs="*", help="Hydra overrides, for example model=fastconv_tiny"
    )
    parser.add_argument("--json", action="store_true", help="the whole plan as JSON")


def run(args: argparse.Namespace) -> int:
    plan = plan_for(args.name, args.overrides)
    if args.json:
        print(json.dumps(plan.to_mapping(), indent=1))
    else:
        print_table(plan_table(plan))
    return 0


def plan_for(name: str, overrides: list[str]) -> Plan:
    """The plan of a configuration name, or of a precision name at base size.

    Raises:
        LowbitError: see :func:`fairseq_lowbit.precision.resolve_plan`.
    """
    model = model_config(name, overrides)
    with torch.device("meta"):
        return Hubert(model, precision=model.precision).plan


def model_config(name: str, overrides: list[str]) -> ModelConfig:
    """Shape and precision of a configuration name, or of a precision name at base size.

    Raises:
        LowbitError: an override, a key or a value that does not fit.
    """
    if name not in config_names():
        overrides = [f"model.precision.name={name}", *overrides]
        name = "hubert_fastconv"
    config = compose_config(name, overrides).model
    given = {key: value for key, value in config.items() if key != "_name"}
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), given))
    except OmegaConfBaseException as error:
        raise LowbitError(f"model: {error}") from error
