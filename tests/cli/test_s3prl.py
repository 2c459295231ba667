"""``fairseq-lowbit s3prl``: what it refuses, and one task trained and evaluated by s3prl."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fairseq_lowbit.cli import main
from tests.runs.superb_corpora import write_checkpoint, write_commands

TASK = ["-m", "train", "-u", "lowbit", "-d", "speech_commands", "-c", "config.yaml"]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that is refused prints."""
    assert main.main(["s3prl", *arguments]) == 2
    return capsys.readouterr().err


def test_without_s3prl_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['s3prl'] = None\n"
        "from fairseq_lowbit.cli.main import main; sys.exit(main(['s3prl', '-m', 'train']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(
        "error: s3prl is not installed: pip install requests, pip install"
    )


def test_other_commands_refuse_options_that_they_do_not_know(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main.main(["plan", "bitla_w1a1", "--upstream", "lowbit"])
    assert "unrecognized arguments: --upstream lowbit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name the upstream: -u lowbit -k CKPT"),
        (["-u", "lowbti"], "-u lowbti is no upstream: lowbit opens a checkpoint (-k CKPT), and "),
        (["-u", "hubrt"], "in s3prl the nearest are: hubert"),
        (["-u", "lowbit"], "-d TASK: s3prl has the tasks "),
        (["-u", "lowbit", "-d", "speech_command"], "-d speech_command: s3prl has the tasks "),
        (TASK[2:], "name a folder for the results: -p FOLDER"),
    ],
)
def test_mistakes_are_named_before_s3prl_begins(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("s3prl")
    assert message in fails(arguments, capsys)


def test_a_task_without_its_configuration_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of s3prl's package, which lacks most of them."""
    pytest.importorskip("s3prl")
    from fairseq_lowbit.interop.s3prl import downstream

    (tmp_path / "downstream/ctc").mkdir(parents=True)
    (tmp_path / "downstream/ctc/expert.py").touch()
    monkeypatch.setattr(downstream, "FOLDER", tmp_path)
    printed = fails(["-u", "lowbit", "-d", "ctc", "-p", "out"], capsys)
    assert f"there is no {tmp_path / 'downstream/ctc/config.yaml'}: name a configuration" in printed


def test_paths_are_read_from_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3prl")
    from fairseq_lowbit.interop.s3prl import downstream

    passed: list[list[str]] = []
    monkeypatch.setattr(downstream, "run_downstream", passed.append)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").touch()
    config = "downstream/ctc/libriphone.yaml"  # s3prl's, as its documentation names it
    assert (
        main.main(["s3prl", *TASK[:4], "-d", "ctc", "-k", "model.pt", "-c", config, "-n", "a"]) == 0
    )
    (arguments,) = passed
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given["-m"] == "train"
    assert given["--upstream_ckpt"] == str(tmp_path / "model.pt")
    assert given["--config"] == config
    assert given["--expdir"] == str(tmp_path / "result/downstream/a")
    assert given["--device"] == "cpu"


def write_configuration(path: Path, data: Path) -> None:
    every = {"log_step": 20, "eval_step": 20, "save_step": 20, "max_keep": 1}
    config = {
        "runner": {
            "total_steps": 40,
            "gradient_clipping": 1,
            "gradient_accumulate_steps": 1,
            "eval_dataloaders": ["dev"],
            **every,
        },
        "optimizer": {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 0.03},
        "downstream_expert": {
            "datarc": {
                "speech_commands_root": str(data / "train"),
                "speech_commands_test_root": str(data / "test"),
                "batch_size": 8,
                "num_workers": 0,
            },
            "modelrc": {
                "projector_dim": 16,
                "select": "UtteranceLevel",
                "UtteranceLevel": {"pooling": "MeanPooling"},
            },
        },
    }
    path.write_text(yaml.safe_dump(config))


@pytest.mark.full
def test_keyword_spotting_trains_and_is_evaluated(tmp_path: Path) -> None:
    pytest.importorskip("s3prl")
    write_checkpoint(tmp_path / "model.pt")
    write_commands(tmp_path / "data")
    write_configuration(tmp_path / "config.yaml", tmp_path / "data")

    def s3prl(*arguments: str) -> str:
        command = [sys.executable, "-m", "fairseq_lowbit.cli.main", "s3prl", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    trained = s3prl(*TASK, "-k", "model.pt", "-p", "exp")
    assert "dev acc: 1.0" in trained
    assert (tmp_path / "exp/states-40.ckpt").is_file()
    assert "test acc: 1.0" in s3prl("-m", "evaluate", "-e", "exp/dev-best.ckpt")
