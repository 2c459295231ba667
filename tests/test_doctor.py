"""The doctor's checks, healthy and ill, and the command line around it."""

import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_lowbit.cli import doctor, main
from fairseq_lowbit.cli.doctor import Finding, Problem
from fairseq_lowbit.errors import LowbitError

OURS = f"file://{doctor.PACKAGE_DIR.parent / 'config'}"


def test_healthy_checks_find_no_problem() -> None:
    for check in (doctor.check_python, doctor.check_torch, doctor.check_extras):
        finding = check()
        assert finding.lines
        assert finding.problems == ()


def test_fairseq_is_named_by_distribution_and_place() -> None:
    (line,) = doctor.check_fairseq().lines
    assert "fairseq" in line
    assert Path(line.split(" at ")[1]).is_dir()


def test_missing_fairseq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    (problem,) = doctor.check_fairseq().problems
    assert problem.needed
    assert "fairseq-fixed" in problem.fix


def test_two_distributions_of_fairseq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "0.12.2")
    problem = doctor.check_fairseq().problems[0]
    assert "both installed" in problem.what


def test_command_of_another_environment_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "fairseq-hydra-train"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = doctor.check_fairseq().problems
    assert str(command) in problem.what
    assert not problem.needed


def test_a_torchaudio_that_does_not_load_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its CUDA build beside a CPU torch."""
    library = "libtorch_cuda.so: cannot open shared object file"
    (tmp_path / "torchaudio.py").write_text(f"raise OSError('{library}')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = doctor.check_extras().problems
    assert library in problem.what
    assert "pip uninstall torchaudio" in problem.fix
    assert not problem.needed


def test_hydra_is_really_asked() -> None:
    providers = [provider for provider, _ in doctor.config_search_path()]
    assert providers[:2] == ["hydra", "main"]


def test_unseen_plugin_explains_the_misleading_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "config_search_path", lambda: [("hydra", "pkg://hydra.conf")])
    (problem,) = doctor.check_hydra().problems
    assert problem.needed
    assert "Must specify batch size" in problem.what
    assert "editable_mode=compat" in problem.fix
    assert f"common.user_dir={doctor.PACKAGE_DIR}" in problem.fix


def test_seen_plugin_tells_where_configs_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "config_search_path", lambda: [("fairseq_lowbit", OURS)])
    finding = doctor.check_hydra()
    assert finding.problems == ()
    assert str(doctor.PACKAGE_DIR.parent / "config") in finding.lines[1]


def test_configs_of_another_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{doctor.PRIMARY_CONFIG}.yaml").touch()
    seen = [("fairseq_lowbit", f"file://{tmp_path}")]
    monkeypatch.setattr(doctor, "config_search_path", lambda: seen)
    (problem,) = doctor.check_hydra().problems
    assert "another copy" in problem.what


def test_failing_registration_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, list[str]]:
        raise ImportError("no module named fairseq")

    monkeypatch.setattr(doctor, "registered_names", broken)
    (problem,) = doctor.check_registration().problems
    assert "ImportError: no module named fairseq" in problem.what


def test_registration_without_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"tasks": [], "models": ["lowbit_hubert"]}
    monkeypatch.setattr(doctor, "registered_names", lambda: names)
    finding = doctor.check_registration()
    assert finding.lines == ("tasks: none", "models: lowbit_hubert")
    assert [problem.what for problem in finding.problems] == [
        "no tasks of fairseq_lowbit are registered"
    ]


def test_report_ends_with_problems_and_fixes() -> None:
    problem = Problem("it is broken", "do this")
    text = doctor.report([Finding("python", ("3.11",)), Finding("torch", ("none",), (problem,))])
    assert text.splitlines() == [
        "python  3.11",
        "torch   none",
        "",
        "problem: it is broken",
        "   fix: do this",
    ]


@pytest.mark.parametrize("needed", [True, False])
def test_exit_status_tells_what_is_needed(monkeypatch: pytest.MonkeyPatch, needed: bool) -> None:
    finding = Finding("torch", ("x",), (Problem("what", "fix", needed),))
    monkeypatch.setattr(doctor, "CHECKS", (lambda: finding,))
    assert main.main(["doctor"]) == int(needed)


def test_a_users_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistaken(args: object) -> int:
        raise LowbitError("train.tsv: no such file")

    monkeypatch.setattr(doctor, "run", mistaken)
    assert main.main(["doctor"]) == 2
    assert capsys.readouterr().err == "error: train.tsv: no such file\n"


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert main.main(["doctor"]) == 130


@pytest.mark.parametrize("name", [name for name, _ in main.COMMANDS])
def test_every_command_has_its_module(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: fairseq-lowbit {name}" in capsys.readouterr().out


def test_the_listing_imports_no_command() -> None:
    program = (
        "import sys\n"
        "from fairseq_lowbit.cli.main import COMMANDS, build_parser\n"
        "build_parser(None).format_help()\n"
        "assert not any(f'fairseq_lowbit.cli.{name}' in sys.modules for name, _ in COMMANDS)\n"
    )
    root = doctor.PACKAGE_DIR.parent
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
