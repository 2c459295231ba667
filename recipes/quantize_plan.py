"""What a training of recipes/quantize.sh will take, by a trial of a few updates.

    python quantize_plan.py TRIAL OUT (--updates N | --minutes M) --warmup PERCENT --validations V

It prints the plan, and writes into OUT the settings of a training of this length, one per line.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml
from progress import costs, peak_memory

RATE = 16000
# Between two checkpoints at most, as in config/base/common.yaml.
MOST_BETWEEN = 5000
_UNITS = (("day", 86400), ("h", 3600), ("min", 60), ("s", 1))


def plan(args: argparse.Namespace) -> None:
    task = yaml.safe_load((args.trial / ".hydra" / "config.yaml").read_text())["task"]
    update, validation = costs(args.trial)
    updates = args.updates
    if updates is None:
        updates = max(1, int((args.minutes * 60 - args.validations * validation) / update))
    between = min(MOST_BETWEEN, max(1, updates // args.validations))
    seconds = updates * update + updates // between * validation
    corpus = _seconds_of(Path(task["data"]) / "train.tsv")
    audio = updates * min(corpus, task["seconds_per_update"])
    settings = {
        "optimization.max_update": updates,
        "lr_scheduler.warmup_updates": updates * args.warmup // 100,
        "dataset.validate_interval_updates": between,
        "checkpoint.save_interval_updates": between,
    }
    args.out.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    memory, epochs = peak_memory(args.trial) / 1e9, audio / corpus
    print(f"the training, by the trial in {args.trial}:")
    print(f"  updates  {updates}, not tuned")
    print(f"  audio    {audio / 3600:.3g} h, which is {epochs:.3g} times what there is")
    print(f"  memory   {memory:.3g} GB of every GPU; without one, of every process")
    print(
        f"  time     {duration(seconds)}; an update {update:.3g} s, a validation {validation:.3g} s"
    )
    print("another length: --updates N or --minutes M; less memory: --batch-seconds S")


def _seconds_of(manifest: Path) -> float:
    lines = manifest.read_text().splitlines()[1:]
    return sum(int(line.split("\t")[1]) for line in lines) / RATE


def duration(seconds: float) -> str:
    """In its two largest units.

    >>> duration(183845), duration(247), duration(3600)
    ('2 days 3 h', '4 min 7 s', '1 h 0 min')
    """
    rest, parts = round(seconds), []
    for unit, size in _UNITS:
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {unit}{'s' * (unit == 'day' and count > 1)}")
    return " ".join(parts[:2]) or "0 s"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trial", type=Path)
    parser.add_argument("out", type=Path)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--updates", type=int)
    length.add_argument("--minutes", type=int)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--validations", type=int, required=True)
    plan(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
