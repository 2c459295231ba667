"""HuBERT's loss on a quantized student: the alternative to distillation, by one override."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_lowbit.configurations import compose_config
from fairseq_lowbit.interop import open_model

OPTIONS = ("loss=demo_hubert", "optimization.max_update=40", "optimization.lr=[0.01]")


@pytest.fixture(scope="module")
def student(trainer, teacher: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("hubert") / "run"
    run = trainer.run(folder, "bitla_w1a1", f"task.teacher={teacher}", *OPTIONS)
    assert run.status == 0, run.output
    return run


@pytest.mark.parametrize("loss", ["distillation", "hubert", "demo_distillation", "demo_hubert"])
@pytest.mark.parametrize("run", ["local", "demo_student"])
def test_every_loss_goes_with_every_run(loss: str, run: str) -> None:
    given = ["task.data=/data", "task.teacher=/t.pt", f"loss={loss}", f"run={run}"]
    config = compose_config("bitl_w2a2", given)
    values = OmegaConf.to_container(config)
    distils = loss.endswith("distillation")
    assert ("labels" in values["task"]) is not distils
    assert ("attention_weight" in values["criterion"]) is distils
    assert ("unmasked_weight" in values["criterion"]) is not distils
    assert values["task"]["teacher"] == "/t.pt"
    assert not OmegaConf.missing_keys(config)


def test_the_student_learns(student) -> None:
    assert "calibrating" in student.output
    losses = student.logged("loss_masked")
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.93 * sum(losses[:10])
    hits = student.logged("accuracy")
    assert sum(hits[-10:]) > 1.1 * sum(hits[:10])


def test_it_starts_from_the_teacher(train: Callable, teacher: Path) -> None:
    run = train("bitla_w1a1", f"task.teacher={teacher}", "loss=hubert", "optimization.lr=[1e-30]")
    own, start = (torch.load(p, weights_only=False)["model"] for p in (run.last, teacher))
    assert "label_embs_concat" in start
    for name, value in start.items():
        assert torch.equal(own[name], value), name


def test_another_start_keeps_the_teachers_labels(
    train: Callable, teacher: Path, student_run
) -> None:
    """A distilled student has none of its own."""
    start = f"task.init_from={student_run.last}"
    run = train(
        "bitla_w2a2", f"task.teacher={teacher}", start, "loss=hubert", "optimization.lr=[1e-30]"
    )
    own, begin = (open_model(path).model.state_dict() for path in (run.last, student_run.last))
    assert torch.equal(own["encoder.layers.0.fc1.weight"], begin["encoder.layers.0.fc1.weight"])
    labels = open_model(teacher).model.label_embs_concat
    assert torch.equal(own["label_embs_concat"], labels)


def test_killed_and_resumed(trainer, teacher: Path, student, tmp_path: Path) -> None:
    folder, options = tmp_path / "run", (f"task.teacher={teacher}", *OPTIONS)
    killed = trainer.fork(folder, "bitla_w1a1", *options, accident=("kill_in_update", 18))
    assert killed.status == -signal.SIGKILL, killed.output
    run = trainer.fork(folder, "bitla_w1a1", *options)
    assert run.status == 0, run.output
    assert "calibrating" not in run.output
    for name, value in student.state()["model"].items():
        assert torch.equal(run.state()["model"][name], value), name


def test_labels_that_are_missing_or_others(trainer, teacher: Path, broken: Path) -> None:
    def refused() -> str:
        options = (f"task.data={broken}", f"task.teacher={teacher}", "loss=hubert")
        run = trainer.fork(broken.parent / "run", "bitla_w1a1", *options)
        assert not run.last.exists()
        return run.message()

    dictionary = broken / "dict.km.txt"
    dictionary.write_text(dictionary.read_text() + "6 1\n7 1\n")
    message = refused()
    for part in (str(dictionary), "12 label classes", str(teacher), "10", "task.label_dir"):
        assert part in message
    dictionary.unlink()
    message = refused()
    for part in (str(dictionary), "does not exist", "fairseq-lowbit labels"):
        assert part in message


def test_both_losses_in_one_folder(trainer, teacher: Path, student_run) -> None:
    before = student_run.last.read_bytes()
    refused = trainer.fork(
        student_run.folder, "bitla_w1a1", f"task.teacher={teacher}", "loss=hubert"
    ).message()
    assert "hydra.run.dir" in refused
    assert student_run.last.read_bytes() == before
