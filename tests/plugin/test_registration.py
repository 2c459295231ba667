"""What fairseq finds under our names."""

import shutil
from pathlib import Path

import torch
from fairseq import checkpoint_utils
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import MODEL_REGISTRY
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.tasks import TASK_REGISTRY

from fairseq_lowbit.interop import open_model
from fairseq_lowbit.plugin import register

register()


def test_names() -> None:
    assert {"lowbit_pretraining", "lowbit_distillation"} <= set(TASK_REGISTRY)
    assert {"lowbit_kd", "lowbit_hubert"} <= set(CRITERION_REGISTRY)
    assert {"hubert_fastconv", "lowbit_hubert"} <= set(MODEL_REGISTRY)
    assert "lowbit_adam" in OPTIMIZER_REGISTRY


def test_registering_again_changes_nothing() -> None:
    tasks, models = dict(TASK_REGISTRY), dict(MODEL_REGISTRY)
    register()
    assert (tasks, models) == (TASK_REGISTRY, MODEL_REGISTRY)


def test_fairseq_loads_a_student_without_its_teacher(
    student_run, tmp_path: Path, corpus: Path
) -> None:
    """A student is what people carry away; the teacher and the data stay behind."""
    path = tmp_path / "student.pt"
    state = student_run.state()
    state["cfg"]["task"]["teacher"] = str(tmp_path / "gone.pt")
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, path)
    models, config, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    assert config.model.precision.name == "bitla_w1a1"
    same_as_our_own(models[0], student_run.last)


def test_fairseq_loads_a_teacher_without_its_labels(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    state = torch.load(teacher, weights_only=False)
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, path)
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    same_as_our_own(models[0], teacher)


def same_as_our_own(model: torch.nn.Module, path: Path) -> None:
    own = open_model(path).model
    assert model.plan == own.plan
    audio = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output, _ = model.eval().extract_features(audio)
        torch.testing.assert_close(output, own.hidden_states(audio)[0][-1], rtol=0, atol=0)


def test_the_student_file_is_enough(student_run, tmp_path: Path) -> None:
    """fairseq's own interface, from another folder than the run's."""
    copy = shutil.copy(student_run.last, tmp_path / "model.pt")
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(copy)])
    layer_one, _ = model.extract_features(torch.randn(1, 8000), output_layer=1)
    assert layer_one.shape[-1] == 32
