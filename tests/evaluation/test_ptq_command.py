"""``fairseq-lowbit ptq``: a calibrated checkpoint without training."""

import csv
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import LoadedModel
from fairseq_lowbit.nn import float_state, is_calibrated

RULE = "[{match: '*.fc1', granularity: per_group, group_size: 4}]"
W8A8 = ("--precision", "bitl_w8a8")


def ptq(teacher: LoadedModel, data: Path, out: Path, *arguments: str) -> int:
    return main(["ptq", str(teacher.source), "--data", str(data), "--out", str(out), *arguments])


def audio(*settings: str) -> tuple[str, ...]:
    """Options that set what the calibration runs on."""
    return tuple(f"--override=task.calibration.{setting}" for setting in settings)


@pytest.mark.parametrize(
    "precision", ["bitl_w8a8", "bitla_w2a2", "sqwq_w2", "absmax_w4a8", "minmax_w4a8"]
)
def test_writes_a_calibrated_checkpoint(
    teacher: LoadedModel, data: Path, tmp_path: Path, precision: str, capsys
) -> None:
    out = tmp_path / "ptq.pt"
    assert ptq(teacher, data, out, "--precision", precision) == 0
    loaded = open_model(out)
    assert loaded.model.plan.precision.name == precision
    assert is_calibrated(loaded.model)
    # Whatever the method, the float weights are the teacher's, but for what squashing clipped.
    weights, own = float_state(loaded.model), teacher.model.state_dict()
    for name in ("encoder.layers.0.fc1.weight", "final_proj.weight", "layer_norm.weight"):
        assert (weights[name] - own[name]).abs().mean() < 1e-2 * own[name].abs().mean(), name
    output = capsys.readouterr().out
    assert f"precision {precision}" in output
    assert ("squashed the weights of 12 modules" in output) == (precision == "sqwq_w2")
    assert list(tmp_path.glob(".*tmp")) == []


def test_tables_know_whose_it_is_and_what_to_measure_on(
    teacher: LoadedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    out = tmp_path / "ptq.pt"
    assert ptq(teacher, Path(data.name), out, *W8A8) == 0
    table = tmp_path / "table.csv"
    monkeypatch.chdir("/")
    assert main(["sweep-table", str(out), "--csv", str(table), "--seconds", "5"]) == 0
    (found,) = (row for row in csv.DictReader(table.open()) if row["name"] == "ptq.pt")
    assert found["teacher"] == str(teacher.source)
    assert found["data"] == str(data)
    assert float(found["cosine"]) > 0.9


def test_rules_and_criteria_reach_the_result(
    teacher: LoadedModel, data: Path, tmp_path: Path
) -> None:
    scales = {}
    for criterion in ("mse", "absmax", "percentile"):
        out = tmp_path / f"{criterion}.pt"
        arguments = ("--precision", "bitl_w4a4", "--calibration", criterion, "--rules", RULE)
        assert ptq(teacher, data, out, *arguments) == 0
        layer = open_model(out).model.encoder.layers[0]
        assert layer.fc1.weight_quantizer.log_scale.shape == (24 * 16 // 4, 1)
        scales[criterion] = layer.fc2.weight_quantizer.scale.item()
        highest = layer.fc2.weight.abs().max().item() / 7
        if criterion == "absmax":
            assert scales[criterion] == pytest.approx(highest, rel=1e-5)
    assert scales["absmax"] > scales["percentile"] > scales["mse"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--precision", "bitl_w9a8"), "9 bits"),
        ((*W8A8, "--rules", "[{match: nothing}]"), "matches no module"),
        ((*W8A8, "--rules", "[{mtch: '*'}]"), "mtch"),
        ((*W8A8, "--split", "valid"), "valid.tsv"),
        ((*W8A8, "--calibration", "percentile", "--percentile", "0"), "percentile 0"),
        ((*W8A8, "--percentile", "99"), "--percentile belongs to --calibration percentile"),
        ((*W8A8, "--calibration", "mse", "--percentile", "99"), "--percentile belongs to"),
        (("--precision", "minmax_w4a8", "--calibration", "absmax"), "no scale of minmax_w4a8"),
        (("--precision", "sqwq_w2", "--calibration", "mse"), "no scale of sqwq_w2 is learned"),
        ((*W8A8, "--rules", "per_chanel"), "among ffn_inputs_a2, front_end_w4a4, "),
        ((*W8A8, *audio("batches=0")), "calibration.batches 0: give"),
        (
            (*W8A8, *audio("max_seconds=0.001")),
            "calibration.max_seconds 0.001: give a number from 0.025 up",
        ),
        ((*W8A8, *audio("seed=-1")), "seed -1"),
        ((*W8A8, "--override", "task.min_sample_size=100000"), "see task.min_sample_size and"),
        ((*W8A8, "--override", "task.min_sample_size=half"), "task.min_sample_size: Value 'half'"),
        ((*W8A8, "--override", "task.min_sampl_size=1"), "task.min_sampl_size"),
        (("--precision", "float"), "float has nothing to calibrate"),
        (("--precision", "hubert_fastconv"), "float has nothing to calibrate"),
        ((*W8A8, "--rules", "none", "--override", "rules=per_channel"), "drop it; --rules decides"),
        ((*W8A8, "--rules", RULE, "--override", "model.precision.rules=[]"), "--rules decides"),
        ((*W8A8, "--override", "model.precision.name=sqwq_w4"), "drop it; --precision decides"),
        ((*W8A8, "--override", "quant=sqwq_w4"), "drop it; --precision decides"),
        (
            (*W8A8, "--calibration", "mse", "--override", "task.calibration.criterion=absmax"),
            "task.calibration.criterion=absmax: drop it; --calibration decides",
        ),
        ((*W8A8, "--override", "+task.label_rate=0"), "task.label_rate 0.0: give a number above 0"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    teacher: LoadedModel, data: Path, tmp_path: Path, arguments: tuple, message: str, capsys
) -> None:
    out = tmp_path / "ptq.pt"
    assert ptq(teacher, data, out, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize("way", ["itself", "relative", "link"])
def test_the_teacher_is_not_overwritten(
    teacher: LoadedModel,
    data: Path,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    before = Path(teacher.source).read_bytes()
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "link.pt"
    link.symlink_to(teacher.source)
    out = {
        "itself": Path(teacher.source),
        "relative": Path(Path(teacher.source).name),
        "link": link,
    }[way]
    assert ptq(teacher, data, out, *W8A8) == 2
    assert f"--out: {out} is the teacher itself" in capsys.readouterr().err
    assert Path(teacher.source).read_bytes() == before
    assert link.is_symlink()


def test_rules_by_the_name_of_their_file(teacher: LoadedModel, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "ptq.pt"
    assert ptq(teacher, data, out, *W8A8, "--rules", "per_channel, none") == 0
    entries = open_model(out).model.plan.entries
    assert {entry.granularity for entry in entries if entry.is_quantized} == {"per_channel"}


def test_the_form_is_stored_with_the_model(
    teacher: LoadedModel, data: Path, tmp_path: Path
) -> None:
    """The two decode otherwise behind the GELU, and a file is read as it was written."""
    ends = {}
    for form in ("asymmetric", "paper"):
        for suffix in ("pt", "safetensors"):
            out = tmp_path / f"{form}.{suffix}"
            override = ("--override", f"form={form}")
            assert ptq(teacher, data, out, "--precision", "bitl_w4a4", *override) == 0
            model = open_model(out).model
            assert model.plan.precision.form == form
            quantizer = model.encoder.layers[0].fc2.input_quantizer
            ends[form] = quantizer(torch.full((24,), -1.0)).unique().item()
    assert ends == {"asymmetric": -87 / 512, "paper": 0.0}


def test_the_audio_is_chosen(teacher: LoadedModel, data: Path, tmp_path: Path) -> None:
    def scales(*arguments: str) -> list[float]:
        assert ptq(teacher, data, tmp_path / "ptq.pt", *W8A8, *arguments) == 0
        state = open_model(tmp_path / "ptq.pt").model.state_dict()
        return [v.item() for k, v in state.items() if k.endswith("input_quantizer.log_scale")]

    less = audio("batches=1", "max_seconds=0.1")
    usual, one, other = scales(), scales(*less), scales(*less, *audio("seed=2"))
    assert usual == scales(*audio("batches=8", "max_seconds=10", "seed=1"))
    assert usual != one != other
    assert usual != scales("--override", "task.min_sample_size=12000")


def test_a_folder_that_is_not_there(teacher: LoadedModel, data: Path, tmp_path: Path) -> None:
    assert ptq(teacher, data, tmp_path / "no" / "ptq.pt", "--precision", "bitl_w8a8") == 2
