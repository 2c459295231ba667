"""What version 0.1 has written is loaded, measured and resumed: see ``make_fixture.py``."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import LoadedModel
from fairseq_lowbit.nn.operators import Operator
from tests.plugin.conftest import Trainer, corpus, trainer

__all__ = ["corpus", "trainer"]

FOLDER = Path(__file__).with_name("v0_1")
PLANS = json.loads((FOLDER / "plans.json").read_text())
EXPECTED = load_file(FOLDER / "expected.safetensors")
HALF_DONE = FOLDER / "half_done"


@pytest.fixture(params=sorted(PLANS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def loaded(name: str) -> LoadedModel:
    return open_model(FOLDER / f"{name}.pt")


def test_the_plan_is_the_stored_one(name: str, loaded: LoadedModel) -> None:
    """Also of rules that overlap, which decide otherwise today."""
    plan = loaded.model.plan
    entries = [
        [e.module, e.method, e.weight_bits, e.activation_bits, e.granularity, e.group_size]
        for e in plan.entries
    ]
    assert entries == PLANS[name]["entries"]
    assert plan.bytes == PLANS[name]["bytes"]
    assert loaded.is_calibrated_only == PLANS[name]["is_calibrated_only"]


def test_weights_have_the_same_codes(name: str, loaded: LoadedModel) -> None:
    for module_name, module in loaded.model.named_modules():
        if isinstance(module, Operator) and module.weight_quantizer is not None:
            codes = module.weight_quantizer.codes(module.stored_weight()).integers
            expected = EXPECTED[f"{name}.codes.{module_name}"]
            assert torch.equal(codes.flatten()[: len(expected)], expected), module_name


def test_the_output_is_the_same(name: str, loaded: LoadedModel) -> None:
    """Up to what another processor's rounding moves: a value at a threshold has another code."""
    with torch.inference_mode():
        output = loaded.model.hidden_states(EXPECTED["waveform"])[0][-1]
    expected = EXPECTED[f"{name}.output"]
    error = (output - expected).square().mean() / expected.square().mean()
    assert error < 1e-3


def test_a_half_done_run_goes_on(trainer: Trainer, tmp_path: Path) -> None:
    """By the command that began it, in today's version, to where it would have ended."""
    folder = tmp_path / "run"
    shutil.copytree(HALF_DONE, folder)
    small = (
        "model.conv_feature_layers='[(4,10,5)]+[(4,3,2)]*4+[(8,2,2)]*2'",
        "model.encoder_embed_dim=16",
        "model.encoder_ffn_embed_dim=32",
        "model.final_dim=8",
        "checkpoint.save_interval_updates=3",
        "dataset.validate_interval_updates=3",
        "optimization.lr=[0.005]",
    )
    teacher = f"task.teacher={FOLDER / 'teacher.pt'}"
    run = trainer.fork(folder, "bitla_w2a2", teacher, *small, "optimization.max_update=12")
    assert run.status == 0, run.output
    assert "calibrating" not in run.output
    ended = load_file(FOLDER / "half_done_ended.safetensors")
    state = run.state()["model"]
    assert sorted(state) == sorted(ended)
    # Not to the bit: the processor that the fixture was made on may round otherwise, which moves
    # what has few values and small gradients by up to an update or two.
    began = open_model(HALF_DONE / "checkpoints/checkpoint_last.pt").model.state_dict()
    for key in (key for key, value in ended.items() if value.is_floating_point()):
        moved = (ended[key] - began[key]).norm()
        allowed = 0.2 * moved + (0.01 if moved > 0 and "_quantizer." in key else 0)
        assert (state[key] - ended[key]).norm() <= allowed, key
