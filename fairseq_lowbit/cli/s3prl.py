"""``fairseq-lowbit s3prl``: s3prl's downstream tasks on a model of ours."""

import argparse
from difflib import get_close_matches
from pathlib import Path

from fairseq_lowbit.cli.device_option import add_device_argument, read_device
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import SOURCES

HELP = "run s3prl's downstream tasks (SUPERB) with a model of ours as the upstream"
PASSES_ON = True

_OPTIONS = ("upstream", "upstream_model_config", "downstream")
# s3prl's options that name a file or folder, whose names are read from where the user is.
_PATHS = ("upstream_ckpt", "config", "expdir", "past_exp", "init_ckpt", "cache_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s -m MODE -u lowbit -k CKPT -d TASK -p FOLDER [option of s3prl ...]"
    parser.epilog = (
        "These and all other options are passed to s3prl's run_downstream, for example -m train, "
        "-m evaluate, -a to resume, -o to change values of the configuration. Paths in values and "
        "configurations are read from s3prl's own folder: make them absolute."
    )
    parser.allow_abbrev = False  # what looks like one may be another option of s3prl
    parser.add_argument("-u", "--upstream", metavar="NAME", help="lowbit, or one of s3prl's own")
    parser.add_argument("-k", "--upstream_ckpt", metavar="CKPT", help=SOURCES)
    parser.add_argument("-g", "--upstream_model_config", help=argparse.SUPPRESS)
    parser.add_argument("-d", "--downstream", metavar="TASK", help="such as speech_commands")
    parser.add_argument("-c", "--config", metavar="FILE", help="default: s3prl's for the task")
    parser.add_argument("-p", "--expdir", metavar="FOLDER", help="for checkpoints and results")
    parser.add_argument("-n", "--expname", metavar="NAME", help="-p result/downstream/NAME")
    parser.add_argument("-e", "--past_exp", metavar="PATH", help="checkpoint or folder to resume")
    parser.add_argument("-i", "--init_ckpt", metavar="PATH", help="checkpoint to start from")
    parser.add_argument("--cache_dir", metavar="FOLDER", help="for downloads")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    # Importing it needs s3prl, which --help must not.
    from fairseq_lowbit.interop.s3prl import downstream

    if args.past_exp is None:
        _check_upstream(args, downstream.upstream_names())
        _check_task(args, downstream.FOLDER)
    downstream.run_downstream(_arguments(args))
    return 0


def _check_upstream(args: argparse.Namespace, known: list[str]) -> None:
    if args.upstream is None:
        raise LowbitError("name the upstream: -u lowbit -k CKPT")
    if args.upstream not in known:
        similar = get_close_matches(args.upstream, known, n=5)
        raise LowbitError(
            f"-u {args.upstream} is no upstream: lowbit opens a checkpoint (-k CKPT), and of all "
            f"names in s3prl the nearest are: {', '.join(similar) or 'none'}"
        )


def _check_task(args: argparse.Namespace, folder: Path) -> None:
    """Refuses what s3prl would find out, or write to its own folder, after it has begun."""
    known = sorted(path.parent.name for path in folder.glob("downstream/*/expert.py"))
    if args.downstream not in known:
        raise LowbitError(f"-d {args.downstream or 'TASK'}: s3prl has the tasks {', '.join(known)}")
    default = folder / "downstream" / args.downstream / "config.yaml"
    if args.config is None and not default.is_file():
        raise LowbitError(
            f"there is no {default}: name a configuration (-c FILE), or install s3prl from its "
            "repository, which has those that its package lacks"
        )
    if args.expdir is None and args.expname is None:
        raise LowbitError("name a folder for the results: -p FOLDER")


def _arguments(args: argparse.Namespace) -> list[str]:
    """The command line of s3prl, which runs in another folder."""
    values = {name: getattr(args, name) for name in _OPTIONS}
    values |= {name: _absolute(getattr(args, name)) for name in _PATHS}
    if args.expdir is not None:
        values["expdir"] = str(Path(args.expdir).absolute())
    elif args.expname is not None:
        values["expdir"] = str(Path("result/downstream", args.expname).absolute())
    values["device"] = read_device(args)
    given = [(f"--{name}", value) for name, value in values.items() if value is not None]
    return [*args.others, *(word for pair in given for word in pair)]


def _absolute(path: str | None) -> str | None:
    """``path`` where it exists from here; else as it is: an id, or a file of s3prl's folder."""
    if path is not None and Path(path).exists():
        return str(Path(path).absolute())
    return path
