"""``fairseq-lowbit ptq``: a calibrated checkpoint without training."""

from pathlib import Path

import pytest

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.models import LoadedModel, load_model
from fairseq_lowbit.nn import float_state, is_calibrated

RULE = "[{match: '*.fc1', granularity: per_group, group_size: 4}]"


def ptq(teacher: LoadedModel, data: Path, out: Path, *arguments: str) -> int:
    return main(["ptq", str(teacher.path), "--data", str(data), "--out", str(out), *arguments])


@pytest.mark.parametrize(
    "precision", ["bitl_w8a8", "bitla_w2a2", "sqwq_w2", "absmax_w4a8", "minmax_w4a8"]
)
def test_writes_a_calibrated_checkpoint(
    teacher: LoadedModel, data: Path, tmp_path: Path, precision: str, capsys
) -> None:
    out = tmp_path / "ptq.pt"
    assert ptq(teacher, data, out, "--precision", precision) == 0
    loaded = load_model(out)
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


def test_rules_and_criteria_reach_the_result(
    teacher: LoadedModel, data: Path, tmp_path: Path
) -> None:
    scales = {}
    for criterion in ("mse", "absmax", "percentile"):
        out = tmp_path / f"{criterion}.pt"
        arguments = ("--precision", "bitl_w4a4", "--calibration", criterion, "--rules", RULE)
        assert ptq(teacher, data, out, *arguments) == 0
        layer = load_model(out).model.encoder.layers[0]
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
        (("--precision", "bitl_w8a8", "--rules", "[{match: nothing}]"), "matches no module"),
        (("--precision", "bitl_w8a8", "--rules", "[{mtch: '*'}]"), "mtch"),
        (("--precision", "bitl_w8a8", "--split", "valid"), "valid.tsv"),
        (("--precision", "bitl_w8a8", "--percentile", "0"), "percentile 0"),
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


def test_a_folder_that_is_not_there(teacher: LoadedModel, data: Path, tmp_path: Path) -> None:
    assert ptq(teacher, data, tmp_path / "no" / "ptq.pt", "--precision", "bitl_w8a8") == 2
