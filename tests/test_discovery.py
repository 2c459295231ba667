"""How Hydra and fairseq find this package in the environment the tests run in."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import pytest
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "fairseq_lowbit/_hydra/hydra_plugins/fairseq_lowbit_searchpath.py"


@pytest.fixture
def searchpath() -> ModuleType:
    """The plugin's module, from its file: no installation is needed."""
    spec = importlib.util.spec_from_file_location("searchpath_under_test", PLUGIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hydra_plugins_stays_a_namespace() -> None:
    assert not list((ROOT / "fairseq_lowbit/_hydra").rglob("__init__.py"))


def test_a_checkout_takes_the_configs_next_to_the_package(searchpath: ModuleType) -> None:
    assert searchpath.package_dir() == ROOT / "fairseq_lowbit"
    assert searchpath.config_dir() == ROOT / "config"


def test_an_install_takes_the_configs_in_the_package(
    searchpath: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fairseq_lowbit" / "config").mkdir(parents=True)
    (tmp_path / "config").mkdir()
    monkeypatch.setattr(searchpath, "package_dir", lambda: tmp_path / "fairseq_lowbit")
    assert searchpath.config_dir() == tmp_path / "fairseq_lowbit" / "config"


def test_our_configs_come_last(searchpath: ModuleType) -> None:
    path = ConfigSearchPathImpl()
    path.append("main", "pkg://fairseq.config")
    searchpath.FairseqLowbitSearchPath().manipulate_search_path(path)
    assert [element.provider for element in path.get_path()] == ["main", "fairseq_lowbit"]
    assert path.get_path()[-1].path == f"file://{ROOT / 'config'}"


def test_user_dir_resolves_to_the_package(searchpath: ModuleType) -> None:
    config = OmegaConf.create({"user_dir": "${fairseq_lowbit.user_dir:}"})
    assert config.user_dir == str(ROOT / "fairseq_lowbit")


def test_a_plugin_left_behind_says_so(
    searchpath: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searchpath, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="reinstall fairseq-lowbit"):
        searchpath.package_dir()


def test_fairseqs_import_of_the_user_directory_registers() -> None:
    """It is an import of the package and nothing more; the package's own __init__ does the rest."""
    program = (
        "import argparse, fairseq.tasks, fairseq.utils\n"
        f"user_dir = argparse.Namespace(user_dir={str(ROOT / 'fairseq_lowbit')!r})\n"
        "fairseq.utils.import_user_module(user_dir)\n"
        "tasks = fairseq.tasks.TASK_REGISTRY.values()\n"
        "assert any(task.__module__.startswith('fairseq_lowbit.') for task in tasks)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``fairseq-hydra-train`` in ``folder``, as a user starts it."""
    try:
        distribution("fairseq-lowbit")
    except PackageNotFoundError:
        pytest.skip("fairseq-lowbit is not installed here: bash scripts/setup.sh")
    command = Path(sys.executable).with_name("fairseq-hydra-train")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [command, *arguments],
        cwd=folder,
        env=environment | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_this_environment_composes_from_anywhere(tmp_path: Path) -> None:
    shown = ("--cfg", "job", "--package", "common")
    result = start(tmp_path, "--config-name", "bitla_w1a1", *shown)
    assert result.returncode == 0, result.stderr
    assert "user_dir: ${fairseq_lowbit.user_dir:}" in result.stdout
    assert result.stderr == ""  # nothing of Hydra's before it, above all


def test_an_unknown_configuration_is_told_the_ones_there_are(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "bitla_w1a3_mine.yaml").touch()
    given = ("--config-name", "bitla_w1a3", "--config-dir", "own", "task.data=data")
    result = start(tmp_path, *given)
    assert result.returncode == 2
    begin, _, names = result.stderr.partition(" There are, closest first, ")
    assert begin == "--config-name bitla_w1a3: there is no such configuration."
    assert names.startswith("bitla_w1a2, ")
    assert {"bitla_w1a3_mine", "hubert_fastconv", "sqwq_w8"} < set(names.strip().split(", "))
    assert len(names.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    "name", ["config", "mine", "sub/mine", "theirs", "bitla_w1a1", "sqwq_w2.yaml", "base/student"]
)
def test_configurations_of_others_are_found(
    name: str, searchpath: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("main/config.yaml", "own/mine.yaml", "own/sub/mine.yaml", "other/theirs.yaml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()

    class Other(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("other", f"file://{tmp_path}/other")

    # Another plugin may be asked after ours.
    monkeypatch.setattr(Plugins.instance(), "discover", lambda kind: [Other])
    monkeypatch.chdir(tmp_path)
    path = ConfigSearchPathImpl()
    path.append("main", f"file://{tmp_path}/main")
    plugin = searchpath.FairseqLowbitSearchPath()
    arguments = ["bin/fairseq-hydra-train", "--config-dir", "own", "--config-name"]
    monkeypatch.setattr(sys, "argv", [*arguments, name])
    plugin.manipulate_search_path(path)
    assert [element.provider for element in path.get_path()] == ["main", "fairseq_lowbit"]
    monkeypatch.setattr(sys, "argv", [*arguments, "no"])
    with pytest.raises(SystemExit):
        plugin.manipulate_search_path(path)
    # Of a folder that is not there Hydra itself tells.
    monkeypatch.setattr(sys, "argv", [*arguments, "no", "--config-dir", "nowhere"])
    plugin.manipulate_search_path(path)
