"""This package's own file: one model, whole, in safetensors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_model, open_without_weights, read_checkpoint
from fairseq_lowbit.precision import Precision, Rule
from tests.interop.test_checkpoint import build, save, state_of

WAVEFORM = torch.randn(1, 700, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    precision = Precision(
        "bitla_w1a1", [Rule("encoder.pos_conv.0", weight_bits=4, activation_bits=8)]
    )
    checkpoint = save(tmp_path / "c.pt", state_of(build(precision)))
    assert (
        main(["export", str(checkpoint), "--to", "safetensors", str(tmp_path / "m.safetensors")])
        == 0
    )
    return tmp_path / "m.safetensors"


def test_a_model_comes_back_from_its_own_file(tmp_path: Path, exported: Path) -> None:
    before, after = open_model(tmp_path / "c.pt"), open_model(exported)
    assert after.model.plan == before.model.plan
    assert after.model.shape == before.model.shape
    assert (after.updates, after.normalize) == (before.updates, before.normalize) == (70, True)
    for own, other in zip(
        *(m.model.hidden_states(WAVEFORM)[0] for m in (after, before)), strict=True
    ):
        assert torch.equal(own, other)
    weight = after.model.encoder.layers[0].fc1
    assert weight.weight_quantizer.codes(weight.weight).integers.unique().tolist() == [-1, 1]


def test_it_loads_without_fairseq_and_without_the_teacher(tmp_path: Path, exported: Path) -> None:
    (tmp_path / "c.pt").unlink()
    program = (
        "import sys, torch\n"
        "from fairseq_lowbit.interop import open_model\n"
        f"model = open_model({str(exported)!r}).model\n"
        "layers, _ = model.hidden_states(torch.zeros(1, 700))\n"
        "assert 'fairseq' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_plan_is_there_for_other_readers(exported: Path) -> None:
    with safe_open(exported, "pt") as file:
        header = file.metadata()
    plan = json.loads(header["plan"])
    assert plan == open_model(exported).model.plan.to_mapping()
    assert header["format"] == "fairseq_lowbit"


def test_every_command_takes_it(exported: Path, capsys: pytest.CaptureFixture) -> None:
    assert open_without_weights(exported).plan == open_model(exported).model.plan
    assert main(["profile", str(exported), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == str(exported)


def test_a_file_that_stands_there_survives_a_failure(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = exported.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fairseq_lowbit.interop.own_file.save_file", fail)
    with pytest.raises(LowbitError, match="No space left on device"):
        write_again(exported, exported)
    assert exported.read_bytes() == before
    assert [path.name for path in exported.parent.glob("*safetensors*")] == [exported.name]


def write_again(source: Path, out: Path) -> None:
    from fairseq_lowbit.interop.exporting import FORMATS

    FORMATS["safetensors"].export(open_model(source), out)


def test_another_name_is_refused(exported: Path) -> None:
    with pytest.raises(LowbitError, match=r"m\.bin: give a file name that ends in \.safetensors"):
        write_again(exported, exported.with_suffix(".bin"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(exported: Path, share: float) -> None:
    whole = exported.read_bytes()
    exported.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(LowbitError, match=r"m\.safetensors is truncated"):
        read_checkpoint(exported)


def test_files_of_others_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(LowbitError, match=r"model\.safetensors was not written by this package"):
        open_model(path)
    save_file({"a": torch.zeros(2)}, path, {"format": "fairseq_lowbit", "version": "9"})
    with pytest.raises(LowbitError, match="version 9"):
        open_model(path)


@pytest.mark.parametrize("rest", [{}, {"version": "1"}, {"version": "1", "checkpoint": "{"}])
def test_a_header_that_lost_something_is_named(tmp_path: Path, rest: dict[str, str]) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(2)}, path, {"format": "fairseq_lowbit", **rest})
    with pytest.raises(LowbitError, match=r"m\.safetensors has a header that cannot be read"):
        open_model(path)


def test_import_teacher_says_what_it_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = state_of(build(classes=0))
    for key in ("final_proj.weight", "final_proj.bias"):
        del state["model"][key]
    source, out = save(tmp_path / "c.pt", state), tmp_path / "teacher.safetensors"
    assert main(["import-teacher", str(source), str(out)]) == 0
    shown = capsys.readouterr().out
    assert "1 post-norm layers of 16 features" in shown
    assert "task.normalize=true" in shown
    assert "no final projection" in shown
    assert not open_model(out).has_final_projection
