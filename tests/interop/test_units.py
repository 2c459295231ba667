"""Models with a CTC head: the head and its vocabulary travel with the encoder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import LoadedModel, open_model, write_model
from fairseq_lowbit.interop.checkpoint import as_checkpoint
from fairseq_lowbit.models import Hubert, start_from
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision, Rule
from tests.shapes import TINY

UNITS = ("", "|", "a", "b")


def recognizer(precision: Precision | None = None, seed: int = 0) -> LoadedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Hubert(TINY, precision=precision, units=len(UNITS)).eval()
        calibrate(model, [torch.randn(2, 600)], model.final_output)
    return LoadedModel(model, "r.pt", 7, True, normalize=False, units=UNITS)


def save(path: Path, loaded: LoadedModel) -> Path:
    torch.save(as_checkpoint(loaded), path)
    return path


def assert_same(one: LoadedModel, other: LoadedModel) -> None:
    assert one.units == other.units == UNITS
    assert one.model.plan == other.model.plan
    for name, value in one.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value), name


@pytest.mark.parametrize("precision", ["float", "bitla_w1a1"])
def test_checkpoints_and_our_own_file_keep_it(tmp_path: Path, precision: str) -> None:
    made = recognizer(Precision(precision))
    checkpoint = save(tmp_path / "r.pt", made)
    assert_same(made, open_model(checkpoint))
    assert (
        main(["export", str(checkpoint), "--to", "safetensors", f"{tmp_path}/r.safetensors"]) == 0
    )
    assert_same(made, open_model(tmp_path / "r.safetensors"))


def test_a_calibrated_model_keeps_it(tmp_path: Path) -> None:
    source = recognizer()
    model = source.model.untrained(Precision("bitl_w4a4"))
    start_from(model, source)
    assert torch.equal(model.ctc_proj.weight, source.model.ctc_proj.weight)
    calibrate(model, [torch.randn(2, 600)], model.final_output)
    write_model(tmp_path / "q.pt", model, source, tmp_path)
    assert_same(replace(source, model=model), open_model(tmp_path / "q.pt"))


def test_a_start_from_other_units_leaves_the_head_as_it_is() -> None:
    model = Hubert(TINY, units=9)
    head = model.ctc_proj.weight.detach().clone()
    source = recognizer(seed=1)
    start_from(model, source)
    assert torch.equal(model.ctc_proj.weight, head)
    assert torch.equal(
        model.encoder.layers[0].fc1.weight, source.model.encoder.layers[0].fc1.weight
    )
    start_from(Hubert(TINY), source)  # of one without a head there is nothing to keep


def test_a_head_may_be_quantized_by_a_rule() -> None:
    rules = [Rule("ctc_proj", method="elastic", weight_bits=8, activation_bits=8)]
    plan = recognizer(Precision("bitl_w2a2", rules)).model.plan
    bits = {entry.module: entry.weight_bits for entry in plan.entries}
    assert (bits["ctc_proj"], bits["final_proj"]) == (8, 16)


def test_a_model_without_a_head_draws_what_it_always_drew() -> None:
    def weights(**options: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return Hubert(TINY, **options).state_dict()

    assert not any(name.startswith("ctc_proj") for name in weights(classes=3))
    with_head = weights(units=3)
    for name, value in weights().items():
        assert torch.equal(with_head[name], value), name


def test_hugging_face_gets_the_encoder_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = save(tmp_path / "r.pt", recognizer())
    assert main(["export", str(checkpoint), "--to", "hf", str(tmp_path / "hf")]) == 0
    assert "CTC head of 4 units" in caplog.text
    assert open_model(tmp_path / "hf").units == ()


def test_a_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    state = as_checkpoint(recognizer())
    for units in ([], ["", "a"]):
        torch.save({**state, "task_state": {"units": units}}, tmp_path / "r.pt")
        with pytest.raises(LowbitError, match="ctc_proj"):
            open_model(tmp_path / "r.pt")
