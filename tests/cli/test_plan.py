"""``fairseq-lowbit plan``: what a configuration quantizes, without training."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_lowbit.cli.main import main

TINY = "model=fastconv_tiny"


def plan(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def bits(plan: dict) -> dict[str, tuple[int, int]]:
    return {e["module"]: (e["weight_bits"], e["activation_bits"]) for e in plan["entries"]}


def test_the_command_prints_the_table(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("fairseq-lowbit")
    done = subprocess.run(
        [command, "plan", "bitla_w1a1"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = [re.split(r" *│ *", line.strip("│\n ")) for line in done.stdout.splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) > 1}
    assert rows["encoder.layers.{0-11}.fc1"][:4] == ["bitla_w1a1", "elastic", "1", "1"]
    assert rows["encoder.layers.{0-11}.self_attn.probabilities"][2:4] == ["-", "1"]
    assert rows["final_proj"][2:4] == ["float", "float"]
    parameters, kilobytes = rows["total stored (float parts at 16 bits)"][-2:]
    assert parameters == "92,212,096"
    # The published size, which leaves the mask embedding out.
    assert float(kilobytes.replace(",", "")) - 1.5 == pytest.approx(25_230, abs=5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, linear, operand",
    [
        ("bitla_w1a2", (1, 2), (16, 2)),
        ("bitl_w8a8", (8, 8), (16, 16)),
        ("bitla_w3a5", (3, 5), (16, 5)),
        ("bitl_w1a16", (1, 16), (16, 16)),
        ("hubert_fastconv", (16, 16), (16, 16)),
        ("float", (16, 16), (16, 16)),
    ],
)
def test_configurations_and_any_name_of_the_grammar(
    name: str, linear: tuple, operand: tuple, capsys: pytest.CaptureFixture
) -> None:
    found = bits(plan(capsys, name, TINY))
    assert found["encoder.layers.3.fc2"] == linear
    assert found["encoder.layers.3.self_attn.key"] == operand
    assert found["feature_extractor.conv_layers.0.0"] == (16, 16)
    assert "encoder.layers.4.fc2" not in found


def test_form_and_scales_per_frame_stand_in_the_table(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "bitl_w2a2", TINY, "form=paper", "rules=per_frame"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("precision bitl_w2a2, paper form ")
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if "│" in line}
    assert "│ 2 per frame │" in rows["encoder.layers.{0-3}.fc1"]
    assert "per frame" not in rows["encoder.layers.{0-3}.fc2"]


def test_overrides_with_rules(capsys: pytest.CaptureFixture) -> None:
    rules = (
        "model.precision.rules=[{match: encoder.layers.0.*, weight_bits: 4, activation_bits: 8},"
        "{match: '*.layers.0.fc2', method: none}]"
    )
    found = plan(capsys, "bitla_w1a1", TINY, rules)
    assert found["precision"]["name"] == "bitla_w1a1"
    assert [rule["match"] for rule in found["precision"]["rules"]] == [
        "encoder.layers.0.*",
        "*.layers.0.fc2",
    ]
    assert bits(found)["encoder.layers.0.fc1"] == (4, 8)
    assert bits(found)["encoder.layers.0.fc2"] == (16, 16)
    assert bits(found)["encoder.layers.1.fc2"] == (1, 1)
    entry = next(e for e in found["entries"] if e["module"] == "encoder.layers.0.fc2")
    assert entry["rule"] == "rule *.layers.0.fc2"
    whole = sum(e["bytes"] for e in found["entries"]) + 2 * found["other_parameters"]
    assert found["bytes"] == pytest.approx(whole)
    assert found["bytes"] > plan(capsys, "bitla_w1a1", TINY)["bytes"]


def test_rules_reach_a_name_outside_of_the_configurations(capsys: pytest.CaptureFixture) -> None:
    rule = "model.precision.rules=[{match: final_proj, weight_bits: 8, activation_bits: 8}]"
    found = bits(plan(capsys, "bitla_w3a5", TINY, rule))
    assert found["final_proj"] == (8, 8)
    assert found["encoder.layers.0.fc1"] == (3, 5)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["bitla_w0a1"], ["bitla_w0a1", "0 bits", "1 to 8"]),
        (["bitter_w1a1"], ["bitter_w1a1", "bitla_wNaM"]),
        (["bitla_w1a1", "model.precision.rules=[{match: no.such}]"], ["no.such", "fc1"]),
        (
            ["bitla_w1a1", "model.precision.rules=[{match: '*.fc1', bits: 1}]"],
            ["model.precision.rules.bits: Key 'bits' not in", "match, method, weight_bits"],
        ),
        (["bitla_w1a1", "+model.precision.nmae=float"], ["nmae"]),
        (["bitla_w1a1", "model=no_such_model"], ["no_such_model", "fastconv_tiny"]),
        (["bitla_w1a1", "rules=[per_channel,nope]"], ["rules/nope", "front_end_w4a4, front_end"]),
        (["bitla_w1a1", "model.no_such_key=1"], ["no_such_key"]),
        (["bitla_w1a1", "model.encoder_layers"], ["model.encoder_layers"]),
        (["bitla_w1a1", "model.conv_pos_groups=7"], ["conv_pos_groups 7"]),
        (["bitla_w1a1", "model.encoder_layers=two"], ["encoder_layers", "two"]),
        (["bitla_w1a1", "+model.encoder_layer=2"], ["encoder_layer"]),
    ],
)
def test_mistakes_get_one_message(
    arguments: list[str], named: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    for part in named:
        assert part in captured.err


def test_brackets_of_a_pattern_are_printed(capsys: pytest.CaptureFixture) -> None:
    rule = "model.precision.rules=[{match: 'encoder.layers.[ab0]*.fc1', weight_bits: 4}]"
    assert main(["plan", "bitla_w1a1", TINY, rule]) == 0
    assert "rule encoder.layers.[ab0]*.fc1" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "fairseq_lowbit.cli.main", "plan", "bitla_w1a1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
