"""``fairseq-lowbit plan``: the resolved precision of a configuration, without training."""

import argparse
import json

from fairseq_lowbit.configurations import meta_model, model_config
from fairseq_lowbit.precision import Plan
from fairseq_lowbit.precision.plan_table import plan_table
from fairseq_lowbit.terminal import print_table

HELP = "print which module gets how many bits, and what it stores"


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
    return meta_model(model_config(name, overrides)).plan
