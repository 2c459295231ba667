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


def read_device(args: argparse.Namespace) -> str:
    """The device that ``--device`` chose. It only counts GPUs: no process comes to hold one.

    Raises:
        LowbitError: this machine has no such device; with those that it has.
    """
    import torch  # takes seconds, which labels of MFCC do without

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    chosen: str = args.device
    if chosen == AUTO:
        return "cuda" if gpus else "cpu"
    if chosen not in ("cpu", *gpus, *(["cuda"] if gpus else [])):
        raise LowbitError(
            f"--device {chosen}: this machine has {', '.join(['cpu', *gpus])}; give one of them, "
            f"or {AUTO}"
        )
    return chosen
