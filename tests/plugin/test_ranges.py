"""Numbers out of range: the message names the key and what is allowed, before anything is read."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairseq_lowbit.configurations import ModelConfig, compose_config
from fairseq_lowbit.data.calibration_audio import CalibrationConfig
from fairseq_lowbit.errors import LowbitError, describe_config_error
from fairseq_lowbit.plugin.callback import user_mistake
from fairseq_lowbit.plugin.criterions import (
    LowbitHubertCriterion,
    LowbitHubertCriterionConfig,
    LowbitKdConfig,
    LowbitKdCriterion,
)
from fairseq_lowbit.plugin.optimizer import LowbitAdam, LowbitAdamConfig
from fairseq_lowbit.plugin.tasks import LowbitDistillationConfig, LowbitDistillationTask
from fairseq_lowbit.plugin.trainer import _describe

NAN, INFINITY = math.nan, math.inf


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("task.health_interval", -1, "from 0 up"),
        ("task.max_unusable", NAN, "from 0 up"),
        ("calibration.batches", 0, "from 1 up"),
        ("calibration.batch_size", -2, "from 1 up"),
        ("calibration.max_seconds", 0.0, "above 0"),
        ("calibration.max_seconds", INFINITY, "above 0"),
    ],
)
def test_task(key: str, value: float, allowed: str, tmp_path: Path) -> None:
    config = LowbitDistillationConfig(data=str(tmp_path), output_dir=str(tmp_path))
    section, _, name = key.rpartition(".")
    if section == "calibration":
        config = replace(config, calibration=replace(CalibrationConfig(), **{name: value}))
    else:
        config = replace(config, **{name: value})
    with pytest.raises(LowbitError) as refused:
        LowbitDistillationTask(config)
    assert str(refused.value) == f"{key} {value}: give a number {allowed}"


@pytest.mark.parametrize("value", [-0.5, NAN, INFINITY])
@pytest.mark.parametrize(
    "key", ["scale_lr_ratio", "shift_lr_ratio", "squashed_lr_ratio", "weight_decay"]
)
def test_optimizer(key: str, value: float) -> None:
    weights = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(LowbitError) as refused:
        LowbitAdam(LowbitAdamConfig(**{"lr": [0.1], key: value}), weights)
    assert str(refused.value) == f"optimizer.{key} {value}: give a number from 0 up"
    LowbitAdam(LowbitAdamConfig(**{"lr": [0.1], key: 0.0}), weights)


def test_learning_rate() -> None:
    weights = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(LowbitError, match=r"^optimization\.lr nan: give a number from 0 up$"):
        LowbitAdam(LowbitAdamConfig(lr=[0.1, NAN]), weights)


def distillation(has_final_projection: bool = True, **weights: float) -> LowbitKdCriterion:
    teacher = SimpleNamespace(has_final_projection=has_final_projection)
    task = SimpleNamespace(teacher=teacher, model=SimpleNamespace(mask_emb=torch.ones(1)))
    return LowbitKdCriterion(task, LowbitKdConfig(**weights))


@pytest.mark.parametrize("value", [-1.0, NAN])
def test_loss_weights(value: float) -> None:
    for key in ("final_weight", "layer_weight", "attention_weight", "squash_weight"):
        with pytest.raises(LowbitError, match=rf"^criterion\.{key} {value}: give .* from 0 up$"):
            distillation(**{key: value})
    for key in ("unmasked_weight", "feature_penalty", "squash_weight"):
        with pytest.raises(LowbitError, match=rf"^criterion\.{key} {value}: give .* from 0 up$"):
            LowbitHubertCriterion(
                SimpleNamespace(label_classes=4), LowbitHubertCriterionConfig(**{key: value})
            )


def test_a_loss_of_nothing() -> None:
    others = {"layer_weight": 0.0, "attention_weight": 0.0, "front_end_weight": 0.0}
    with pytest.raises(LowbitError, match="are all 0: give one of them a number above 0"):
        distillation(final_weight=0.0, **others)
    with pytest.raises(LowbitError, match="are all 0: give one of them a number above 0"):
        distillation(has_final_projection=False, **others)
    weights = distillation(**others).weights
    assert weights == {"final": 1.0, "layers": 0.0, "attention": 0.0, "front_end": 0.0}


# Words for what is wrong


def test_errors_of_omegaconf_keep_one_line() -> None:
    schema = OmegaConf.structured(ModelConfig)
    with pytest.raises(OmegaConfBaseException) as raised:
        OmegaConf.merge(schema, {"precision": {"nmae": "float"}})
    assert "object_type=" in str(raised.value)
    message = user_mistake(raised.value)
    assert message.startswith("precision.nmae: Key 'nmae' not in ")
    assert describe_config_error(raised.value, "model") == f"model.{message}"
    assert "full_key" not in message
    assert len(message.splitlines()) == 1


def test_errors_of_hydra_keep_one_line() -> None:
    with pytest.raises(LowbitError) as raised:
        compose_config("bitla_w1a1", ["model.encoder_layer=2"])
    assert isinstance(raised.value.__cause__, HydraException)
    message = str(raised.value)
    assert "model.encoder_layer" in message
    assert "object_type" not in message
    assert len(message.splitlines()) == 1


def test_losses_of_a_bad_batch_are_those_of_the_logs() -> None:
    terms = {"loss": torch.tensor(30.0), "loss_final": torch.tensor(15.0), "sample_size": 10}
    told = _describe({"names": ["a.flac"]}, terms)
    assert told == "loss 3, loss_final 1.5, files of the batch a.flac"
