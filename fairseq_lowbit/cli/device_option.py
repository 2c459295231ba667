"""``--device``: where the models of a command run."""

import argparse

from fairseq_lowbit.errors import LowbitError

AUTO = "auto"


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default=AUTO,
        help="where models run: cpu, cuda, cuda:1, ... (default: cuda where there is a GPU, else "
        "cpu)",
    )


def known_devices() -> list[str]:
    """Those of this machine, the CPU first. They are only counted: no process comes to hold one."""
    import torch  # takes seconds, which labels of MFCC do without

    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def read_device(args: argparse.Namespace) -> str:
    """The device that ``--device`` chose.

    Raises:
        LowbitError: this machine has no such device; with those that it has.
    """
    known = known_devices()
    gpus = ["cuda"] if len(known) > 1 else []
    if args.device == AUTO:
        return (gpus or known)[0]
    if args.device not in known + gpus:
        raise LowbitError(
            f"--device {args.device}: this machine has {', '.join(known)}; give one of them, or "
            f"{AUTO}"
        )
    return args.device
