"""The order in which the rooms of the package may import each other.

``python tests/test_import_rules.py`` prints it, for docs/design.md.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fairseq_lowbit"

# Room -> rooms it may import. Besides these: itself, errors.py and files.py.
CORE = {"quantization", "precision", "nn", "models"}
MAY_IMPORT: dict[str, set[str]] = {
    "quantization": set(),
    "precision": {"quantization"},
    "nn": {"quantization", "precision"},
    "models": {"quantization", "precision", "nn"},
    "distillation": CORE,
    "data": set(),
    "profiling": CORE,
    "monitoring": CORE,
    "evaluation": CORE | {"data"},
    "configurations": CORE,
    "interop": CORE | {"data"},
}
MAY_IMPORT["runs"] = CORE | {"data", "interop", "monitoring", "evaluation", "profiling"}
MAY_IMPORT["report"] = MAY_IMPORT["runs"] | {"runs"}
MAY_IMPORT["plugin"] = set(MAY_IMPORT) - {"report"}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["_hydra"] = set()
# report/ in the order of its imports: what all need, the folders, what puts them together.
REPORT = ("*.py", "page/*.py", "overview/*.py", "training/*.py", "inside/*.py", "sections.py")

FAIRSEQ = {"fairseq", "fairseq_cli"}


def room_of(module: str) -> str:
    """``fairseq_lowbit.nn.linear`` -> ``nn``; the package itself -> an empty name."""
    return (module.split(".") + [""])[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every module named by an import in ``source``, relative and lazy ones included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = len(parents) - node.level + is_package
                base = ".".join([*parents[:kept], *([base] if base else [])])
            # `from fairseq_lowbit import nn` names the room only in its list
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            function, first = node.func, node.args[0]
            called = getattr(function, "attr", getattr(function, "id", ""))
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    room = room_of(module)
    found = []
    for name in imported_modules(source, module, is_package):
        top, target = name.split(".")[0], room_of(name)
        if top in FAIRSEQ and room != "plugin":
            found.append(f"{module} imports {name}: only plugin knows fairseq")
        elif top == "fairseq_lowbit" and target in MAY_IMPORT:
            # The package's own __init__ registers and quantizes, lazily.
            allowed = (
                MAY_IMPORT[room] | {room} if room in MAY_IMPORT else {*CORE, "interop", "plugin"}
            )
            if target not in allowed:
                found.append(f"{module} imports {name}: {room} may import {sorted(allowed)}")
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_run_one_way(path: Path) -> None:
    module = module_name(path)
    found = violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_the_report_imports_one_way() -> None:
    # A module beside the folders is in the first layer, but sections.py in its own.
    layers = {
        path: i for i, names in enumerate(REPORT) for path in (PACKAGE / "report").glob(names)
    }
    order = {module_name(path): layer for path, layer in layers.items()}
    for path, layer in layers.items():
        names = imported_modules(path.read_text(encoding="utf-8"), module_name(path), False)
        later = [name for name in names if order.get(name.rpartition(".")[0], 0) > layer]
        assert not later, f"{path} imports {later}"


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    assert rooms <= set(MAY_IMPORT), f"say in MAY_IMPORT what {rooms - set(MAY_IMPORT)} may import"


def test_what_a_room_may_import_its_readers_may_too() -> None:
    """The picture of the floors leaves out what follows from this."""
    for room, below in MAY_IMPORT.items():
        assert all(MAY_IMPORT[other] <= below for other in below), room


@pytest.mark.parametrize(
    "source, module",
    [
        ("import fairseq.tasks", "fairseq_lowbit.models.encoder"),
        ("def f():\n    from fairseq import utils", "fairseq_lowbit.cli.doctor"),
        ("importlib.import_module('fairseq')", "fairseq_lowbit.cli.doctor"),
        ("from fairseq_lowbit import nn", "fairseq_lowbit.precision.plan"),
        ("from ..models import encoder", "fairseq_lowbit.nn.linear"),
        ("from fairseq_lowbit.precision import plan", "fairseq_lowbit.data.audio"),
    ],
)
def test_the_rules_catch(source: str, module: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    "source, module",
    [
        ("from fairseq.tasks import register_task", "fairseq_lowbit.plugin.tasks"),
        ("from ..quantization import codes", "fairseq_lowbit.nn.linear"),
        ("from .linear import Linear", "fairseq_lowbit.nn.conv"),
        ("from ..errors import LowbitError", "fairseq_lowbit.quantization.codes"),
        ("from fairseq_lowbit import __version__", "fairseq_lowbit.cli.main"),
    ],
)
def test_the_rules_let_pass(source: str, module: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_of_a_package_start_at_itself() -> None:
    names = imported_modules("from .codes import Codes", "fairseq_lowbit.quantization", True)
    assert list(names) == ["fairseq_lowbit.quantization.codes.Codes"]


@pytest.mark.parametrize("module", ["fairseq_lowbit", "fairseq_lowbit.cli.main"])
def test_importing_is_light(module: str) -> None:
    program = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {"fairseq", "hydra", "torch", "numpy"}.isdisjoint(result.stdout.split())


def floors() -> str:
    """The rooms from the top floor to the ground, and beside each what it builds on directly."""
    lines = []
    for room in sorted(MAY_IMPORT, key=lambda room: (-_floor(room), room)):
        below = MAY_IMPORT[room]
        direct = below - {far for near in below for far in MAY_IMPORT[near]}
        arrow = f"  <-  {', '.join(sorted(direct))}" if direct else ""
        lines.append(f"{_floor(room)}  {room:14}{arrow}".rstrip())
    return "\n".join(lines)


def _floor(room: str) -> int:
    return 1 + max((_floor(other) for other in MAY_IMPORT[room]), default=-1)


if __name__ == "__main__":
    print(floors())
