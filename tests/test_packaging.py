"""What a release holds, and that an installed one is found by fairseq-hydra-train."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterable, Iterator
from email import message_from_string
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fairseq_lowbit

ROOT = Path(__file__).resolve().parents[1]
BUILD_INPUTS = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"),
    *("config", "fairseq_lowbit"),
)
# What fairseq-hydra-train does, by this test's interpreter.
HYDRA_TRAIN = "from fairseq_cli.hydra_train import cli_main; cli_main()"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source distribution: what either lacks is lacking here.

    Built from a copy, because a build leaves folders in the checkout and takes up old ones.
    """
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder], cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run([sys.executable, "-m", "pip", "wheel", "-q", *options, sdist], cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of executables of a virtualenv with the wheel and this environment's packages.

    They come by a .pth file, whose folders are searched without their own .pth files: an editable
    install of this environment stays out.
    """
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder)
    python = folder / "bin" / "python"
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python]
    run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], cwd=folder)
    return python.parent


def run(command: list, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path, file: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(f".dist-info/{file}"))
        return archive.read(name).decode()


def test_configs_are_packaged_at_every_depth(wheel: Path) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "config").rglob("*.yaml")}
    packaged = {name for name in names(wheel) if name.endswith(".yaml")}
    assert packaged == {f"fairseq_lowbit/{name}" for name in expected}
    assert "config/bitla_w1a1.yaml" in expected


def test_every_module_is_packaged(wheel: Path) -> None:
    modules = {path.relative_to(ROOT) for path in (ROOT / "fairseq_lowbit").rglob("*.py")}
    expected = {path.as_posix() for path in modules if "_hydra" not in path.parts}
    assert expected <= names(wheel)


def test_the_template_of_the_report_is_packaged(wheel: Path) -> None:
    template = ROOT / "fairseq_lowbit" / "report" / "page" / "template"
    expected = {path.relative_to(ROOT).as_posix() for path in template.iterdir()}
    assert "fairseq_lowbit/report/page/template/page.html" in expected <= names(wheel)


def test_hydra_plugin_is_in_the_namespace_that_hydra_scans(wheel: Path) -> None:
    packaged = {name for name in names(wheel) if name.startswith("hydra_plugins/")}
    assert packaged == {
        "hydra_plugins/fairseq_lowbit_searchpath.py",
        "hydra_plugins/fairseq_lowbit_scale.py",
    }


def test_nothing_else_is_installed(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "fairseq_lowbit",
        "hydra_plugins",
    }


def test_metadata(wheel: Path) -> None:
    message = message_from_string(metadata(wheel, "METADATA"))
    assert message["Name"] == "fairseq-lowbit"
    assert message["Version"] == fairseq_lowbit.__version__
    assert message["Requires-Python"] == ">=3.11"
    extras = {"asr", "bench", "demo", "dev", "hf", "lm", "onnx", "superb", "sweep"}
    assert set(message.get_all("Provides-Extra")) == extras
    assert any(line.startswith("fairseq-fixed") for line in message.get_all("Requires-Dist"))
    assert "fairseq-lowbit = fairseq_lowbit.cli.main:main" in metadata(wheel, "entry_points.txt")


def required(
    requirements: Iterable[str], extras: Iterable[str]
) -> Iterator[tuple[str, frozenset[str]]]:
    """Name and extras of what is required here, except what set-up leaves out or cannot know."""
    for requirement in map(Requirement, requirements):
        marker, name = requirement.marker, canonicalize_name(requirement.name)
        here = marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
        # torchaudio: see scripts/setup.sh; the others belong to a CUDA build of torch.
        if here and not name.startswith(("torchaudio", "nvidia-", "cuda-", "triton")):
            yield name, frozenset(requirement.extras)


def test_constraints_pin_all_that_the_setup_installs(wheel: Path) -> None:
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    direct = message_from_string(metadata(wheel, "METADATA")).get_all("Requires-Dist")
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = set(required(direct, ("demo", "dev")))
    while pending:
        name, extras = pending.pop()
        seen.add((name, extras))
        pending |= set(required(requires(name) or (), extras)) - seen
    assert not {name for name, _ in seen} - set(map(canonicalize_name, pins))


def test_transformers_is_importable_beside_this_torch() -> None:
    """In the environment that set-up makes. Its import is lazy: only a model's shows a failure."""
    from transformers import HubertModel

    assert issubclass(HubertModel, torch.nn.Module)


def test_installed_config_composes_from_anywhere(installed: Path, tmp_path: Path) -> None:
    arguments = ["--config-name", "bitla_w1a1", "--cfg", "job", "--package", "common", "--resolve"]
    result = run([installed / "python", "-c", HYDRA_TRAIN, *arguments], cwd=tmp_path)
    (site_packages,) = installed.parent.glob("lib/python*/site-packages")
    assert f"user_dir: {site_packages}/fairseq_lowbit\n" in result.stdout
    assert "validated against ConfigStore" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_installed_configs_are_searched_after_fairseqs(installed: Path, tmp_path: Path) -> None:
    arguments = ["--config-name", "bitla_w1a1", "--info", "searchpath"]
    result = run([installed / "python", "-c", HYDRA_TRAIN, *arguments], cwd=tmp_path)
    rows = [line for line in result.stdout.splitlines() if line.startswith("|")]
    providers = [line.split("|")[1].strip() for line in rows]
    assert providers.index("main") < providers.index("fairseq_lowbit")
    (ours,) = (line for line in rows if "fairseq_lowbit " in line.split("|")[1])
    (site_packages,) = installed.parent.glob("lib/python*/site-packages")
    assert f"file://{site_packages}/fairseq_lowbit/config" in ours


def test_installed_command_finds_no_problem(installed: Path, tmp_path: Path) -> None:
    result = run([installed / "fairseq-lowbit", "doctor"], cwd=tmp_path)
    assert "problem:" not in result.stdout
