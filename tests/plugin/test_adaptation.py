"""A float student with a front-end of its own, made from a teacher with another one."""

from collections.abc import Callable
from pathlib import Path

from fairseq_lowbit.interop import open_model
from tests.plugin.conftest import Trainer

OTHER = "model.conv_feature_layers='[(8,10,5)]+[(12,3,2),(12,1,1)]*4+[(8,2,2)]*2'"


def test_a_new_front_end_learns_what_the_encoder_wants(train: Callable, teacher: Path) -> None:
    run = train(
        "fastconv_adaptation",
        f"task.teacher={teacher}",
        OTHER,
        "optimization.max_update=30",
        "dataset.validate_interval_updates=10",
        "checkpoint.save_interval_updates=10",
    )
    assert run.state()["cfg"]["task"]["normalize"] is False  # as the teacher's
    losses = run.logged("loss_front_end")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    student, source = open_model(run.last).model, open_model(teacher).model
    assert student.conv_layers[1] == (12, 3, 2)
    assert student.shape.encoder_layers == source.shape.encoder_layers
    # The encoder starts as the teacher's: one that began anew would differ by 1.4 norms.
    own, other = (m.encoder.layers[0].fc1.weight for m in (student, source))
    assert 0 < (own - other).norm() < 0.5 * other.norm()


def test_frames_of_another_rate_are_refused(
    trainer: Trainer, teacher: Path, tmp_path: Path
) -> None:
    other = "model.conv_feature_layers='[(8,10,5)]+[(8,3,2)]*3+[(8,2,2)]*2'"
    run = trainer.fork(tmp_path / "run", "fastconv_adaptation", f"task.teacher={teacher}", other)
    assert "model.conv_feature_layers: a frame every 160 samples" in run.message()
    assert "has a frame every 320 samples" in run.message()


def test_without_the_key_another_front_end_is_refused(
    trainer: Trainer, teacher: Path, tmp_path: Path
) -> None:
    run = trainer.fork(tmp_path / "run", "bitla_w1a1", f"task.teacher={teacher}", OTHER)
    assert "is of another shape than the model: feature_extractor" in run.message()
