#!/usr/bin/env python
"""Writes what commands print into README.md and docs/*.md, so that no table there is stale.

    python scripts/docs.py            run the commands and paste what they print
    python scripts/docs.py --check    change nothing; exit status 1 if a block is stale

A block stands between two comments. A table becomes a table of Markdown, anything else is pasted
as it was printed:

    <!-- command: fairseq-lowbit plan bitla_w1a1 -->
    <!-- end -->
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^(<!-- command: (.+) -->\n)((?:.*\n)*?)(<!-- end -->)", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--configurations", action="store_true", help="list the files of config/")
    args = parser.parse_args()
    if args.configurations:
        print(configurations())
        return 0
    stale = stale_pages(is_written=not args.check)
    for path in stale:
        name = path.relative_to(ROOT)
        print(f"{name} is stale: python scripts/docs.py" if args.check else f"{name} was rewritten")
    return int(args.check and bool(stale))


def stale_pages(is_written: bool) -> list[Path]:
    """Pages with a block that its command would print otherwise; ``is_written`` renews them."""
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = path.read_text(encoding="utf-8")
        new = with_fresh_blocks(old, printed)
        if new != old:
            stale.append(path)
            if is_written:
                path.write_text(new, encoding="utf-8")
    return stale


def with_fresh_blocks(text: str, run: Callable[[str], str]) -> str:
    """``text`` with every block replaced by what ``run`` returns for its command.

    Raises:
        SystemExit: a block without an end.
    """
    if text.count("\n<!-- command: ") != text.count("\n<!-- end -->"):
        sys.exit("a <!-- command: ... --> has no <!-- end -->, each on a line of its own")
    return BLOCK.sub(lambda block: f"{block[1]}\n{as_markdown(run(block[2]))}\n{block[4]}", text)


@cache
def printed(command: str) -> str:
    """What a command prints, run at the top of the repository.

    Raises:
        SystemExit: the command fails.
    """
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "100",
        "LC_ALL": "C.UTF-8",
    }
    result = subprocess.run(
        shlex.split(command),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if result.returncode:
        sys.exit(f"{command} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def as_markdown(output: str) -> str:
    """A box-drawn table, the title above it and the notes below it as Markdown; any other output as
    a block of code."""
    lines = [line.rstrip() for line in output.strip().splitlines()]
    heads = [cells(line) for line in lines if line.startswith("┃")]
    if not heads:
        return "\n".join(["```text", *lines, "```", ""])
    rows = [cells(line) for line in lines if line.startswith("│")]
    start = next(index for index, line in enumerate(lines) if line.startswith("┏"))
    end = next(index for index, line in enumerate(lines) if line.startswith("└"))
    table = [
        [" ".join(part.strip() for part in column if part.strip()) for column in zip(*heads)],
        [alignment(column) for column in zip(*rows)],
        *([cell.strip() for cell in row] for row in rows),
    ]
    notes = [f"- {line}" for line in lines[end + 1 :] if line]
    return "\n".join(
        [
            *(f"{line[:1].upper()}{line[1:]}:\n" for line in lines[:start]),
            *(f"| {' | '.join(row)} |" for row in table),
            *(["", *notes] if notes else []),
            "",
        ]
    )


def cells(line: str) -> list[str]:
    return re.split("[┃│]", line[1:-1])


def alignment(column: tuple[str, ...]) -> str:
    """To the right if the cells end at one place and begin at several."""
    is_right = any(cell.startswith("  ") for cell in column) and not any(
        cell.endswith("  ") for cell in column
    )
    return "--:" if is_right else "---"


def configurations() -> str:
    """The names of the files of config/, by what selects them on the command line."""
    special = {"config": "--config-name", "sweep": "+sweep="}
    lines = []
    for folder in (ROOT / "config", *sorted((ROOT / "config").iterdir())):
        names = " ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        option = special.get(folder.name, f"{folder.name}=")
        # base is what the others build on, hydra what they say to it.
        if folder.is_dir() and folder.name not in ("base", "hydra"):
            lines += textwrap.wrap(f"{option:14} {names}", 100, subsequent_indent=" " * 15)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
