"""What earlier versions have written is loaded, measured and resumed: see ``make_fixture.py``."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import LoadedModel
from fairseq_lowbit.nn.operators import Operator
from tests.compatibility.make_fixture import HALF_DONE, TINIER
from tests.plugin.conftest import Trainer, corpus, trainer

__all__ = ["corpus", "trainer"]

FOLDERS = [Path(__file__).with_name(version) for version in ("v0_1", "v0_4")]


@cache
def plans(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "plans.json").read_text())


@cache
def expected(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "expected.safetensors")


@pytest.fixture(
    params=[folder / f"{name}.pt" for folder in FOLDERS for name in plans(folder)],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def loaded(path: Path) -> LoadedModel:
    return open_model(path)


def test_the_plan_is_the_stored_one(path: Path, loaded: LoadedModel) -> None:
    """Also of rules that overlap, which decide otherwise today."""
    plan, stored = loaded.model.plan, plans(path.parent)[path.stem]
    entries = [
        [e.module, e.method, e.weight_bits, e.activation_bits, e.granularity, e.group_size]
        for e in plan.entries
    ]
    assert entries == stored["entries"]
    assert plan.bytes == stored["bytes"]
    assert loaded.is_calibrated_only == stored["is_calibrated_only"]
    assert plan.precision.form == "paper"


def test_weights_have_the_same_codes(path: Path, loaded: LoadedModel) -> None:
    for module_name, module in loaded.model.named_modules():
        if isinstance(module, Operator) and module.weight_quantizer is not None:
            codes = module.weight_quantizer.codes(module.stored_weight()).integers
            stored = expected(path.parent)[f"{path.stem}.codes.{module_name}"]
            assert torch.equal(codes.flatten()[: len(stored)], stored), module_name


def test_the_output_is_the_same(path: Path, loaded: LoadedModel) -> None:
    """Up to what another processor's rounding moves: a value at a threshold has another code."""
    stored = expected(path.parent)
    with torch.inference_mode():
        output = loaded.model.hidden_states(stored["waveform"])[0][-1]
    before = stored[f"{path.stem}.output"]
    assert (output - before).square().mean() / before.square().mean() < 1e-3


@pytest.mark.parametrize("earlier", FOLDERS, ids=lambda folder: folder.name)
def test_a_half_done_run_goes_on(earlier: Path, trainer: Trainer, tmp_path: Path) -> None:
    """By the command that began it, in today's version, to where it would have ended."""
    folder = tmp_path / "run"
    shutil.copytree(earlier / "half_done", folder)
    teacher = f"task.teacher={earlier / 'teacher.pt'}"
    run = trainer.fork(folder, *HALF_DONE, teacher, *TINIER)
    assert run.status == 0, run.output
    assert "calibrating" not in run.output
    # Its own record says in which form it went on.
    record = yaml.safe_load((folder / ".hydra/config.yaml").read_text())
    assert record["model"]["precision"]["form"] == "paper"
    ended = load_file(earlier / "half_done_ended.safetensors")
    state = run.state()["model"]
    assert sorted(state) == sorted(ended)
    # Not to the bit: the processor that the fixture was made on may round otherwise, which moves
    # what has few values and small gradients by up to an update or two.
    began = open_model(earlier / "half_done/checkpoints/checkpoint_last.pt").model.state_dict()
    for key in (key for key, value in ended.items() if value.is_floating_point()):
        moved = (ended[key] - began[key]).norm()
        allowed = 0.2 * moved + (0.01 if moved > 0 and "_quantizer." in key else 0)
        assert (state[key] - ended[key]).norm() <= allowed, key
