"""SUPERB's tasks on tiny corpora of the right layout: what is refused, and what comes out."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_lowbit.cli import main
from fairseq_lowbit.configurations import config_dir
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.runs.superb.preparation import Order, configure, prepare
from fairseq_lowbit.runs.superb.tasks import TASKS, Task
from tests.runs import superb_corpora as corpora

SMALL = (
    "--set=downstream_expert.modelrc.project_dim=16",
    "--set=downstream_expert.modelrc.RNNs.dim=[16,16]",
)
RECIPE = Path(__file__).parents[2] / "recipes" / "superb.sh"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    corpora.write_checkpoint(path)
    return path


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("S3PRL_ROOT", raising=False)
    shutil.copy(checkpoint, tmp_path / "model.pt")
    return tmp_path


def superb(folder: Path, task: str, *options: str, updates: int = 4) -> dict:
    """The result of a task, which a process of its own runs: s3prl changes it for good."""
    command = [sys.executable, "-m", "fairseq_lowbit.cli.main", *arguments(task, *options)]
    if task != "qbe":
        command += ["--updates", str(updates), "--batch", "2"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads((folder / task / "result.json").read_text())


def arguments(task: str, *options: str) -> list[str]:
    where = ["superb", task, "model.pt", "--data", "data", "--out", task]
    return [*where, "--workers", "0", "--device", "cpu", *options]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints of a mistake."""
    assert main.main(["superb", *arguments, "--data", "data", "--out", "out"]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_has_its_configuration(task: Task) -> None:
    """With the places that the table of tasks fills in, and SUPERB's settings."""
    config = OmegaConf.load(config_dir() / "superb" / f"{task.name}.yaml")
    assert OmegaConf.select(config, task.batch) >= 1
    assert OmegaConf.select(config, task.workers) is not None
    for path in task.paths:
        assert OmegaConf.is_missing(
            OmegaConf.select(config, path.key.rpartition(".")[0]), path.key.rpartition(".")[2]
        )
    assert (OmegaConf.select(config, "optimizer.lr") is not None) == task.is_trained


def test_keyword_spotting_by_the_command_of_the_recipe(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("s3prl")
    corpora.write_commands(folder / "data")
    options = ("--lr", "0.03", "--name", "w2a2")
    result = superb(folder, "ks", *options, updates=20)
    assert result["metrics"]["ks_accuracy"] > 0.7
    assert result["settings"]["learning_rate"] == 0.03
    kept = OmegaConf.load(folder / "ks/config.yaml")
    assert kept.optimizer.lr == 0.03
    assert kept.runner.total_steps == 20
    # Finished, it is not run again.
    again = arguments("ks", *options, "--updates", "20", "--batch", "2")
    (folder / "ks/log.txt").unlink()
    assert main.main(again) == 0
    assert "w2a2: KS " in capsys.readouterr().out
    assert not (folder / "ks/log.txt").exists()
    assert main.main([*again, "--set=runner.eval_step=4"]) == 2
    printed = capsys.readouterr().err
    assert "ks was begun with changed ('downstream_expert.datarc.batch_size=2'," in printed


@pytest.mark.full
@pytest.mark.parametrize("task", ["pr", "asr", "ks"])
def test_a_task_goes_on_where_it_stopped(task: str, folder: Path) -> None:
    """Whose last checkpoint is cut off: it trains on from the one before and is tested."""
    if task == "ks":
        corpora.write_commands(folder / "data")
    else:
        corpora.write_librispeech(folder / "data")
    (folder / "lexicon.txt").write_text(corpora.LEXICON)
    options = (
        *(["--lexicon", "lexicon.txt"] if task == "pr" else []),
        *(SMALL if task == "asr" else ()),
    )
    every = ("--set=runner.save_step=4", "--set=runner.eval_step=4")
    superb(folder, task, *options, *every, updates=8)
    (folder / task / "result.json").unlink()
    states = folder / task / "s3prl"
    (states / "states-8.ckpt").write_bytes((states / "states-8.ckpt").read_bytes()[:1000])
    result = superb(folder, task, *options, *every, updates=8)
    log = (folder / task / "log.txt").read_text()
    assert f"Resume from {states / 'states-4.ckpt'}" in log
    assert set(result["metrics"]) == {metric.column.key for metric in TASKS[task].metrics}
    assert (states / "states-8.ckpt").stat().st_size > 1000


@pytest.mark.full
@pytest.mark.parametrize(
    "task, write",
    [
        ("ic", corpora.write_intents),
        ("sid", corpora.write_voxceleb),
        ("er", corpora.write_emotions),
        ("sd", corpora.write_conversations),
        ("qbe", corpora.write_queries),
    ],
)
def test_other_tasks_run_to_their_end(
    task: str, write: Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    """Through s3prl's own code; of the query by example, the scorer is a stand-in."""
    for module in TASKS[task].modules:
        pytest.importorskip(module)
    write(folder / "data")
    s3prl = Path(importlib.util.find_spec("s3prl").origin).parent
    before = sorted(s3prl.rglob("*.pkl"))
    with_java = folder / "bin" / "java"
    with_java.parent.mkdir()
    with_java.touch(0o755)
    os.environ["PATH"] += f":{with_java.parent}"
    result = superb(folder, task)
    assert set(result["metrics"]) == {metric.column.key for metric in TASKS[task].metrics}
    assert sorted(s3prl.rglob("*.pkl")) == before
    if task == "qbe":
        assert result["metrics"]["qbe_mtwv"] == 0.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["kws", "model.pt"], "task kws: SUPERB has pr, asr, ks, qbe, ic, sf, asv, sd, er, sid"),
        (["ks", "nowhere.pt"], "nowhere.pt"),
        (["ks", "model.pt"], "data/train has no yes/*.wav: task ks needs the folder of Speech"),
        (["pr", "model.pt"], "data has no train-clean-100/*/*/*.flac: task pr needs LibriSpeech"),
        (["ks", "model.pt", "--set", "runner.steps=1"], "runner.steps=1: the task's configuration"),
        (["ks", "model.pt", "--updates", "300000"], "no multiple"),
        (["sf", "model.pt"], "task sf needs code that s3prl's package lacks: set S3PRL_ROOT"),
    ],
)
def test_mistakes_are_named_before_anything_is_run(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("s3prl")
    (folder / "data/train").mkdir(parents=True)
    if "300000" in arguments:
        corpora.write_commands(folder / "data")
        arguments[arguments.index("300000")] = "7777"
    assert message in refused(capsys, *arguments)
    assert not list(folder.glob("out/s3prl"))


def test_words_phones_and_letters_are_checked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("s3prl")
    corpora.write_librispeech(folder / "data")
    assert "task pr needs the phones of words: --lexicon FILE" in refused(capsys, "pr", "model.pt")
    lexicon = folder / "lexicon.txt"
    lexicon.write_text("ONE W AH N\nTWO T UW\n")
    printed = refused(capsys, "pr", "model.pt", "--lexicon", "lexicon.txt")
    assert "the lexicon lacks the word TEN of data/LibriSpeech" in printed.replace(f"{folder}/", "")
    lexicon.write_text("ONE W AH N\nTWO\n")
    printed = refused(capsys, "pr", "model.pt", "--lexicon", "lexicon.txt")
    assert "lexicon.txt, line 2: TWO has no phones" in printed
    transcript = folder / "data/LibriSpeech/test-clean/13/7/13-7.trans.txt"
    said = transcript.read_text()
    transcript.write_text(said.replace("ONE", "OÑE"))
    assert "has the character 'Ñ', which is nowhere in" in refused(capsys, "asr", "model.pt")
    transcript.write_text(said.partition("\n")[2])
    printed = refused(capsys, "asr", "model.pt")
    assert "13-7.trans.txt: there is no line for 13-7-0000" in printed


def test_other_phones_are_other_inputs(folder: Path) -> None:
    """Whose figures do not stand in one column."""
    corpora.write_librispeech(folder / "data")
    lexicon, template = folder / "lexicon.txt", config_dir() / "superb/pr.yaml"
    order = Order(
        TASKS["pr"], "model.pt", "w2a2", folder / "data", folder / "out", (), str(lexicon), 0, "cpu"
    )
    digests = []
    for text in (corpora.LEXICON, corpora.LEXICON.replace("UW", "OO"), corpora.LEXICON):
        lexicon.write_text(text)
        config, _ = configure(order, template)
        digests.append(prepare(order, config, folder))
    assert digests[0] == digests[2] != digests[1]


def test_a_folder_keeps_its_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("s3prl")
    corpora.write_commands(folder / "data")
    begun = {
        "task": "ks",
        "model": str(folder / "model.pt"),
        "data": str(folder / "data"),
        "learning_rate": 0.1,
        "updates": 200000,
        "batch_size": 32,
        "accumulated": 1,
        "changed": [],
        "lexicon": None,
        "s3prl": "0.4.18",
        "inputs": "",
    }
    (folder / "out").mkdir()
    (folder / "out/begun.json").write_text(json.dumps(begun))
    printed = refused(capsys, "ks", "model.pt")
    assert "out was begun with learning_rate 0.1, not 0.0001: take another --out" in printed


def test_a_checkpoint_that_was_trained_again_is_another_model(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its task is finished or only begun."""
    pytest.importorskip("s3prl")
    from fairseq_lowbit.runs.superb import running

    corpora.write_commands(folder / "data")
    monkeypatch.setattr(running._Session, "metrics", lambda session: {"ks_accuracy": 0.5})
    assert main.main(["superb", "ks", "model.pt", "--data", "data", "--out", "out"]) == 0
    content = (folder / "model.pt").read_bytes()
    assert json.loads((folder / "out/result.json").read_text())["settings"][
        "checkpoint"
    ].startswith(f"{len(content)} bytes, sha256 ")
    checkpoint = torch.load("model.pt", weights_only=True)
    checkpoint["model"]["mask_emb"] += 1
    torch.save(checkpoint, "model.pt")
    wanted = f"{folder / 'model.pt'} has changed since {folder / 'out'} was begun"
    for left in ("out/result.json", "out/begun.json"):
        assert wanted in refused(capsys, "ks", "model.pt")
        (folder / left).unlink()
    (folder / "model.pt").write_bytes(content)
    assert main.main(["superb", "ks", "model.pt", "--data", "data", "--out", "out"]) == 0


def test_a_root_of_s3prl_has_to_be_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("s3prl")
    (folder / "data").mkdir()
    monkeypatch.setenv("S3PRL_ROOT", str(folder))
    printed = refused(capsys, "ks", "model.pt")
    assert f"S3PRL_ROOT={folder} is not the repository of s3prl" in printed


def test_an_unknown_version_of_s3prl_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3prl")
    from fairseq_lowbit.interop.s3prl.compat import find_s3prl

    package = folder / "s3prl"
    package.mkdir()
    for name in ("__init__.py", "hub.py"):
        (package / name).touch()
    (package / "version.txt").write_text("0.5.0\n")
    monkeypatch.setenv("S3PRL_ROOT", str(folder))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "s3prl", raising=False)
    with pytest.raises(
        LowbitError, match=r"is s3prl 0\.5\.0, which is not known to work: pip inst"
    ):
        find_s3prl()


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(RECIPE), *arguments, "--dry-run"]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_recipe_shows_a_command_for_every_task_and_model(tmp_path: Path) -> None:
    models = "fp=teacher.pt w1a1=student.pt"
    given = ["--models", models, "--data-ks", str(tmp_path), "--data-asr", str(tmp_path)]
    shown = dry_run(*given, "--lr-ks", "0.01", "--slurm", "-p gpu", "--work", "/work").stdout
    *jobs, table = shown.splitlines()
    assert [job.split()[:6] for job in jobs] == [
        ["srun", "-p", "gpu", "fairseq-lowbit", "superb", task]
        for task in ("asr", "asr", "ks", "ks")
    ]
    assert ["--lr 0.01" in job for job in jobs] == [False, False, True, True]
    assert "student.pt --name w1a1" in jobs[1]
    assert table.startswith("fairseq-lowbit superb-table /work --csv")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "a=b"], "no task has a corpus: name some, such as --data-asr DIR"),
        (["--models", "a=b", "--tasks", "ks"], "--tasks names ks: --data-ks DIR is missing"),
        (["--models", "a=b", "--tasks", "kws"], "--tasks kws: choose one of pr asr ks"),
        (["--models", "b", "--data-ks", "."], "--models b: give NAME=SOURCE"),
        (["--models", "a=b a=c", "--data-ks", "."], "--models names a twice"),
        (["--models", "a=b", "--data-ks", "nowhere"], "--data-ks nowhere is not a folder"),
        (["--data-ks", "."], "is missing"),
    ],
)
def test_the_recipe_refuses_what_cannot_be_run(arguments: list[str], message: str) -> None:
    run = dry_run(*arguments)
    assert run.returncode == 2
    assert message in run.stderr
