"""``fairseq-lowbit superb``: one task of SUPERB on one model, to a result that can be compared."""

import argparse
from pathlib import Path

from fairseq_lowbit.cli.device_option import add_device_argument, read_device
from fairseq_lowbit.configurations import config_dir, meta_model, model_config
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import SOURCES
from fairseq_lowbit.profiling import profile
from fairseq_lowbit.runs.superb.results import RESULT
from fairseq_lowbit.runs.superb.tasks import TASKS, task_named

HELP = "run a task of SUPERB on a model by s3prl: train, test, and write down the result"
# SUPERB's settings are for models of this shape.
_REFERENCE = "hubert_fastconv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"Interrupted, the same command goes on; finished, it prints {RESULT} again. The settings "
        "of a task are those of config/superb/TASK.yaml and are kept in DIR/config.yaml."
    )
    parser.add_argument("task", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("model", metavar="MODEL", help=SOURCES)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the corpus")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the result")
    parser.add_argument("--name", help="of the model in tables (default: MODEL)")
    parser.add_argument("--lr", type=float, help="learning rate, which may be chosen for a model")
    parser.add_argument("--updates", type=int, help="fewer than SUPERB's, to rehearse")
    parser.add_argument("--batch", type=int, help="utterances")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting of the task's configuration",
    )
    parser.add_argument(
        "--lexicon",
        metavar="FILE|espeak",
        help="for pr: a word and its phones to a line; espeak makes it, for speech of its own",
    )
    parser.add_argument("--workers", type=int, default=4, help="processes that read audio (4)")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    task = task_named(args.task)
    if not args.data.is_dir():
        raise LowbitError(
            f"--data {args.data} is not a folder: task {task.name} needs {task.source}"
        )
    # Importing it needs s3prl.
    from fairseq_lowbit.runs.superb.preparation import ESPEAK, Order
    from fairseq_lowbit.runs.superb.running import run_task

    order = Order(
        task=task,
        model=str(Path(args.model).resolve()) if Path(args.model).exists() else args.model,
        name=args.name or args.model,
        data=args.data.resolve(),
        out=args.out.absolute(),
        changes=_changes(args),
        lexicon=args.lexicon
        if args.lexicon in (None, ESPEAK)
        else str(Path(args.lexicon).resolve()),
        workers=args.workers,
        device=read_device(args),
    )
    reference = profile(meta_model(model_config(_REFERENCE, [])), _REFERENCE)
    result = run_task(order, config_dir() / "superb" / f"{task.name}.yaml", reference)
    for metric in task.metrics:
        column = metric.column
        print(f"{order.name}: {column.title} {column.text(result.metrics)} {column.unit}")
    print(f"result {result.folder / RESULT}")
    return 0


def _changes(args: argparse.Namespace) -> tuple[str, ...]:
    """Settings that are not SUPERB's."""
    task = task_named(args.task)
    given = {"optimizer.lr": args.lr, "runner.total_steps": args.updates, task.batch: args.batch}
    changes = [f"{key}={value}" for key, value in given.items() if value is not None]
    return (*changes, *args.set)
