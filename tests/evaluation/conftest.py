"""A teacher with random weights and a corpus to measure it on; nothing is trained."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

from fairseq_lowbit.data.label_file import SPECIAL_SYMBOLS
from fairseq_lowbit.data.manifest import read_manifest, write_manifest
from fairseq_lowbit.evaluation.utterances import Utterances, read_batches
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import Architecture, Hubert, LoadedModel
from fairseq_lowbit.models.extractor import output_lengths
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision
from tests.shapes import TINY

RATE = 16000
LABELS = 3
WORDS = ("low", "middle", "high")
# The front-end of tests.shapes at 50 frames a second.
SHAPE = replace(TINY, conv_feature_layers="[(8,10,5)]+[(8,3,2)]*4+[(12,2,2)]*2", mask_length=3)


def tone(rng: np.random.Generator, hertz: float, samples: int) -> np.ndarray:
    time = np.arange(samples) / RATE
    noise = 0.02 * rng.standard_normal(samples)
    return (0.3 * np.sin(2 * np.pi * hertz * time + rng.uniform(0, 6)) + noise).astype(np.float32)


def frames(samples: int) -> int:
    layers = Hubert(SHAPE).conv_layers
    return int(output_lengths(torch.tensor(samples), layers))


def write_split(
    folder: Path, name: str, pitches: list[float], rng: np.random.Generator, times: int = 1
) -> None:
    items = []
    for index, hertz in enumerate(pitches):
        audio = tone(rng, hertz, int(rng.integers(4000, 8000)))
        soundfile.write(folder / f"{name}{index}.flac", np.tile(audio, times), RATE)
        items.append((f"{name}{index}.flac", times * len(audio)))
    write_manifest(folder / f"{name}.tsv", folder, items)


def write_labels(folder: Path, split: str) -> None:
    rng = np.random.default_rng(1)
    lines = [
        " ".join(map(str, rng.integers(0, LABELS, frames(int(samples)))))
        for samples in read_manifest(folder / f"{split}.tsv").sizes
    ]
    (folder / f"{split}.km").write_text("\n".join(lines) + "\n")
    (folder / "dict.km.txt").write_text("".join(f"{label} 1\n" for label in range(LABELS)))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Train and test splits with labels, and words that their pitch tells apart."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    # Training, and with it calibration, leaves files below half a second out.
    for split, times in (("train", 2), ("test", 1)):
        write_split(folder, split, list(rng.uniform(150, 2000, 5)), rng, times)
    write_labels(folder, "test")
    for split, count in (("train", 12), ("test", 5)):
        pitches = [hertz for hertz in (150, 600, 2400) for _ in range(count)]
        write_split(folder, f"words_{split}", pitches, rng)
        names = [word for word in WORDS for _ in range(count)]
        (folder / f"words_{split}.wrd").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture
def batches(data: Path) -> list[Utterances]:
    manifest = read_manifest(data / "test.tsv")
    return list(read_batches(manifest, list(range(len(manifest)))))


def build_teacher(shape: Architecture = SHAPE) -> Hubert:
    """Random weights large enough for every layer to have its say."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Hubert(shape, classes=SPECIAL_SYMBOLS + LABELS).eval()
        for layer in model.encoder.layers:
            for parameter in layer.parameters():
                if parameter.dim() == 2:
                    torch.nn.init.normal_(parameter, std=0.25)
    return model.requires_grad_(False)


@cache
def calibrated(precision: str) -> Hubert:
    """The teacher in low precision, without training."""
    model = Hubert(SHAPE, precision=Precision(precision))
    weights = build_teacher().state_dict()
    model.load_state_dict(
        {k: v for k, v in weights.items() if k in model.state_dict()}, strict=False
    )
    noise = torch.randn(1, 3200, generator=torch.Generator().manual_seed(0))
    calibrate(model, [0.1 * noise], model.hidden_states)
    return model.eval()


@pytest.fixture
def model() -> Hubert:
    return build_teacher()


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str, Hubert], Path]:
    """``save(name, model)``: a checkpoint as fairseq writes it."""

    def write(name: str, model: Hubert) -> Path:
        config = {**asdict(model.shape), "precision": model.plan.precision.to_mapping()}
        state = {"cfg": {"model": config, "task": {}}, "model": model.state_dict()}
        torch.save(state, tmp_path / f"{name}.pt")
        return tmp_path / f"{name}.pt"

    return write


@pytest.fixture
def teacher(save: Callable, model: Hubert) -> LoadedModel:
    return open_model(save("teacher", model))


@pytest.fixture
def make_run(tmp_path: Path, data: Path, teacher: LoadedModel) -> Callable[..., Path]:
    """``make_run(name, model)``: a folder as training leaves it, without a checkpoint for None."""

    def make(
        name: str,
        model: Hubert | None,
        *,
        updates: int = 10,
        planned: int = 10,
        best: float | None = 0.5,
        overrides: list[str] = (),
        stages: list[dict] = (),
        loss: str = "lowbit_kd",
        is_stage: bool = False,
        seed: int = 1,
        **task: Any,
    ) -> Path:
        folder = tmp_path / name
        checkpoints = folder if is_stage else folder / "checkpoints"
        precision = (model.plan if model else teacher.model.plan).precision.to_mapping()
        places = {"data": str(data), "teacher": str(teacher.source), "init_from": None}
        config = {
            "common": {"seed": seed},
            "task": places | {"stages": list(stages)} | task,
            "criterion": {"_name": loss},
            "model": {"precision": precision},
            "optimization": {"max_update": planned},
            "checkpoint": {"save_dir": "checkpoints", "no_save": False},
        }
        if not is_stage:
            (folder / ".hydra").mkdir(parents=True)
            (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
            (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
        if model is not None:
            checkpoints.mkdir(parents=True)
            plan = checkpoints / "precision_plan.json"
            plan.write_text(json.dumps(model.plan.to_mapping()))
            config["model"] |= asdict(model.shape)
            state = {
                "cfg": config,
                "model": model.state_dict(),
                "optimizer_history": [{"num_updates": updates}],
                "extra_state": {} if best is None else {"best": best},
            }
            torch.save(state, checkpoints / "checkpoint_last.pt")
        return folder

    return make
