"""Training on another device than the CPU: the losses and gradients of the criterions everywhere,
and whole runs on a GPU (``-m gpu``)."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf
from torch import Tensor, nn

from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import LoadedModel
from fairseq_lowbit.nn import calibrate, is_calibrated
from fairseq_lowbit.plugin import compat, progress, register
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.quantization import Criterion
from tests.plugin.conftest import Run, Trainer
from tests.shapes import TINY

register()
from fairseq_lowbit.plugin.criterions import (  # noqa: E402
    FrameCriterionConfig,
    LowbitHubertCriterion,
    LowbitHubertCriterionConfig,
    LowbitKdConfig,
    LowbitKdCriterion,
)
from fairseq_lowbit.plugin.ctc import LowbitCtcCriterion  # noqa: E402
from fairseq_lowbit.plugin.models import HubertFastConvModel  # noqa: E402

# Random numbers on a GPU are others.
SHAPE = replace(
    TINY,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    dropout_input=0.0,
    encoder_layerdrop=0.0,
)
CLASSES, UNITS = 5, ("", "|", "a", "b")


@cache
def calibrated(precision: str) -> HubertFastConvModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"precision": Precision(precision), "classes": CLASSES, "units": len(UNITS)}
        model = HubertFastConvModel(SHAPE, **options)
        batch = 0.1 * torch.randn(2, 800)
        calibrate(model, [batch], model.final_output, Criterion("absmax"))
    return model


def build(precision: str, device: str) -> HubertFastConvModel:
    return deepcopy(calibrated(precision)).to(device).train()


def sample(device: str) -> dict:
    """Two padded utterances with labels and units."""
    generator = torch.Generator().manual_seed(1)
    frames = 99
    made = {
        "waveform": 0.1 * torch.randn(2, 1600, generator=generator),
        "lengths": torch.tensor([1600, 1000]),
        "targets": [torch.randint(CLASSES, (2, frames), generator=generator)],
        "units": torch.tensor([[2, 1, 3], [3, 2, 0]]),
    }
    on_device = {
        key: [part.to(device) for part in value] if isinstance(value, list) else value.to(device)
        for key, value in made.items()
    }
    return {**on_device, "sizes": [1600, 1000], "unit_sizes": [3, 2]}


def kd(model: nn.Module, device: str) -> LowbitKdCriterion:
    teacher = LoadedModel(build("float", device).eval().requires_grad_(False), "", 0, True, False)
    task = SimpleNamespace(model=model, teacher=teacher, shares_front_end=False)
    return LowbitKdCriterion(task, LowbitKdConfig(mask=True))


def hubert(model: nn.Module, device: str) -> LowbitHubertCriterion:
    task = SimpleNamespace(model=model, label_classes=CLASSES, label_ratio=1.0)
    return LowbitHubertCriterion(task, LowbitHubertCriterionConfig(unmasked_weight=0.5))


def ctc(model: nn.Module, device: str) -> LowbitCtcCriterion:
    return LowbitCtcCriterion(SimpleNamespace(model=model, units=UNITS), FrameCriterionConfig())


def trained_a_step(make, precision: str, device: str) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients of the parameters that have one."""
    model = build(precision, device)
    criterion = make(model, device)
    torch.manual_seed(2)
    loss, size, _ = criterion(model, sample(device))
    (loss / size).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {gradient.device.type for gradient in gradients.values()} == {device}
    return float(loss / size), {name: gradient.cpu() for name, gradient in gradients.items()}


@pytest.mark.parametrize(
    "make, precision", [(kd, "bitla_w2a2"), (hubert, "sqwq_w2"), (ctc, "bitla_w1a1")]
)
def test_loss_and_gradients(make, precision: str, device: str) -> None:
    loss, gradients = trained_a_step(make, precision, "cpu")
    there, others = trained_a_step(make, precision, device)
    assert there == pytest.approx(loss, rel=1e-3)
    assert others.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        # That of a bias of keys is rounding: softmax does not know it.
        scale = float(gradient.abs().max()) + 1e-4 * largest
        torch.testing.assert_close(others[name], gradient, rtol=0.01, atol=0.01 * scale, msg=name)


def launch_on(monkeypatch: pytest.MonkeyPatch, cpu: bool) -> tuple[str, str]:
    """How a run of two processes is begun on a machine with GPUs, and by what backend they talk."""
    begun = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.multiprocessing.spawn", lambda fn, *_, **__: begun.append(fn))
    training = {
        "distributed_world_size": 2,
        "distributed_rank": 0,
        "distributed_backend": "nccl",
        "distributed_init_method": None,
        "distributed_port": -1,
        "distributed_no_spawn": False,
        "distributed_num_procs": 2,
        "ddp_backend": "legacy_ddp",
        "pipeline_model_parallel": False,
        "tpu": False,
        "device_id": 0,
    }
    config = OmegaConf.create(
        {"common": {"cpu": cpu, "tpu": False}, "distributed_training": training}
    )
    distributed_utils.call_main(config, main=None)
    return begun[0].__name__, config.distributed_training.distributed_backend


def test_processes_are_begun_where_the_run_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """``common.cpu`` is obeyed on a machine that has GPUs."""
    assert launch_on(monkeypatch, cpu=False) == ("distributed_main", "nccl")
    assert launch_on(monkeypatch, cpu=True) == (compat._train_and_part.__name__, "gloo")


def test_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(progress, "_device", torch.device("cpu"))
    assert progress._peak_memory() > 1e6
    progress.train_on(torch.device("cuda"))
    assert progress._peak_memory() == 7


# Whole runs


def assert_trained_alike(run: Run, other: Run, near: float) -> None:
    assert run.status == 0, run.output
    assert other.status == 0, other.output
    assert len(run.logged("loss")) == 5
    assert run.logged("loss") == pytest.approx(other.logged("loss"), rel=near)
    for trained in (run, other):
        loaded = open_model(trained.last)
        assert loaded.updates == 5
        assert is_calibrated(loaded.model)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bitla_w2a2", "sqwq_w2"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_a_run_on_a_gpu_trains_what_one_on_the_cpu_trains(
    half: bool, precision: str, trainer: Trainer, teacher: Path, tmp_path: Path
) -> None:
    options = [f"task.teacher={teacher}", f"common.bf16={str(half).lower()}"]
    run = trainer.run(tmp_path / "gpu", precision, *options)
    other = trainer.run(tmp_path / "cpu", precision, *options, "common.cpu=true")
    assert_trained_alike(run, other, near=0.1 if half else 0.02)
    assert "1 GPU x" in run.output
    assert "1 process x" in other.output
    # A code is that of the fp32 weight, which is what is kept.
    assert run.state()["model"]["encoder.layers.0.fc1.weight"].dtype == torch.float32


@pytest.mark.gpu
def test_two_processes_on_gpus(trainer: Trainer, teacher: Path, tmp_path: Path) -> None:
    """By nccl where there are two GPUs, else by gloo on the one."""
    options = [f"task.teacher={teacher}", "dataset.max_tokens=48000"]
    alone = trainer.run(tmp_path / "alone", "bitla_w2a2", *options, "optimization.update_freq=[2]")
    if torch.cuda.device_count() < 2:
        options.append("distributed_training.distributed_backend=gloo")
    first, second = trainer.fork_ranks(tmp_path / "run", "bitla_w2a2", *options)
    assert second.status == 0, second.output
    assert_trained_alike(first, alone, near=0.02)
