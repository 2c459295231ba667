"""``fairseq-lowbit profile``: counted costs, and the paper's beside them."""

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.cli import profile_timing
from fairseq_lowbit.cli.main import main
from fairseq_lowbit.cli.profile_targets import Target
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.profiling.paper import CELLS, REASONS, TABLE
from fairseq_lowbit.profiling.timing import Runnable, runnable, with_random_weights
from tests.shapes import TINY


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(Hubert(TINY, classes=5, precision=Precision("bitla_w2a2")), tmp_path / "student.pt")


def save(model: Hubert, path: Path) -> Path:
    config = {**asdict(TINY), "precision": model.plan.precision.to_mapping()}
    torch.save({"cfg": {"model": config, "task": {}}, "model": model.state_dict()}, path)
    return path


def rows(capsys: pytest.CaptureFixture, *arguments: str, status: int = 0) -> list[dict]:
    assert main(["profile", "--json", *arguments]) == status
    return json.loads(capsys.readouterr().out)


def test_any_number_of_names_and_checkpoints(checkpoint: Path, capsys) -> None:
    found = rows(capsys, "bitla_w1a1", "bitl_w3a5", str(checkpoint), "--seconds", "2")
    assert [row["name"] for row in found] == ["bitla_w1a1", "bitl_w3a5", str(checkpoint)]
    for row in found:
        assert {"storage_bytes", "flops", "quantops", "runtime"} <= set(row)
        assert row["seconds"] == 2
    model = Hubert(TINY, classes=5, precision=Precision("bitla_w2a2"))
    assert found[-1]["storage_bytes"] == model.plan.bytes
    assert found[-1]["parameters"] == model.plan.parameters


def test_overrides_and_modules(capsys) -> None:
    (tiny,) = rows(capsys, "bitla_w1a1", "--set", "model=fastconv_tiny", "--per-module")
    assert tiny["name"] == "bitla_w1a1 model=fastconv_tiny"
    for key in ("flops", "quantops", "parameters", "storage_bytes", "runtime"):
        assert sum(module[key] for module in tiny["modules"]) == pytest.approx(tiny[key])
    peaks = [module["activation_bytes"] for module in tiny["modules"]]
    assert max(peaks) == tiny["peak_activation_bytes"]
    assert {"encoder.layers.3.fc2", "encoder.layers.0.self_attn.scores"} <= {
        module["module"] for module in tiny["modules"]
    }
    assert main(["profile", "bitla_w1a1", "--per-module"]) == 0
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if "layers.{0-11}.self_attn.softmax" in line]
    assert line.split("│")[-2].strip() == "23.9"
    (line,) = [line for line in output.splitlines() if "layers.{0-11}.fc1" in line]
    assert line.split("│")[-3].strip() == "0.0040"  # 56.5 of its 93.9 Gbit, by K and 105.6 GFLOPs
    assert "K = 66.5" in output


def test_the_conversion_rate_is_a_choice(capsys) -> None:
    (usual,), (slow,) = (
        rows(capsys, "bitla_w1a1", *rate) for rate in ((), ("--conversion-rate", "10"))
    )
    assert slow["runtime"] > usual["runtime"]
    assert (usual["conversion_rate"], slow["conversion_rate"]) == (66.5, 10)


@pytest.fixture(scope="module")
def paper_cells() -> list[dict]:
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["profile", "--paper", "--json"]) == 0
    return json.loads(printed.getvalue())


def test_the_paper_cell_by_cell(paper_cells: list[dict], capsys) -> None:
    known = [(row.name, key) for row in TABLE for key in row.cells]
    assert [(cell["name"], cell["cell"]) for cell in paper_cells] == known
    assert main(["profile", "--paper"]) == 0
    output = capsys.readouterr().out
    form = r"│ (\S.*?) +│ (\S.*?) +│ +(\S+) │ +(\S+) │ +(\S.*?) │"
    printed = re.findall(form, output)
    shown = [(cell["name"], CELLS[cell["cell"]]) for cell in paper_cells]
    assert [row[:2] for row in printed] == shown
    assert ("BiT-L W1A1", "GFLOPs", "82.29", "20.87", "-61.42 (-74.6%)") in printed
    assert ("BiT-LA W1A1", "runtime", "0.12", "0.12", "+0.00 (+0.0%)") in printed
    assert ("SqWQ W8", "QuantOps Gbit", "452.99", "678.12", "+225.13 (+49.7%)") in printed
    assert ("SqWQ W2", "WER %", "12.56", "-", "-") in printed
    assert all(reason in output for reason in REASONS)


def test_storage_is_the_papers(paper_cells: list[dict]) -> None:
    storage = [cell for cell in paper_cells if cell["cell"] == "storage_mb"]
    assert len(storage) == 7
    for cell in storage:
        assert abs(cell["ours"] - cell["paper"]) <= 0.01, cell["name"]


def test_every_difference_has_its_reason(paper_cells: list[dict]) -> None:
    counted = [cell for cell in paper_cells if cell["ours"] is not None]
    assert {cell["cell"] for cell in counted} == {"storage_mb", "gflops", "gquantops", "runtime"}
    for cell in counted:
        if abs(round(cell["ours"], 2) / cell["paper"] - 1) > 0.01:
            kind, name = CELLS[cell["cell"]].split()[0], cell["name"]
            families = (name, name.split()[0])
            assert any(kind in r and any(f in r for f in families) for r in REASONS), cell


def test_a_checkpoint_of_the_other_form_says_so(tmp_path: Path, capsys) -> None:
    paper = Hubert(TINY, classes=5, precision=Precision("bitla_w2a2", form="paper"))
    old = str(save(paper, tmp_path / "old.pt"))
    found = rows(capsys, old, "bitla_w2a2", "sqwq_w2")
    assert [row["name"] for row in found] == [f"{old}, paper form", "bitla_w2a2", "sqwq_w2"]
    assert [row["form"] for row in found] == ["paper", "asymmetric", None]
    (given,) = rows(capsys, "bitla_w2a2", "--set", "form=paper")
    assert (given["name"], given["form"]) == ("bitla_w2a2 form=paper", "paper")
    assert given["storage_bytes"] == found[1]["storage_bytes"]


def test_one_bad_target_leaves_the_others(checkpoint: Path, tmp_path: Path, capsys) -> None:
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(checkpoint.read_bytes()[:1000])
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(3)}, other)
    language_model = tmp_path / "lm.pt"
    config = {"model": {"_name": "transformer_lm"}}
    torch.save({"cfg": config, "model": {"decoder.weight": torch.zeros(3)}}, language_model)
    targets = [str(truncated), "bitl_w9a1", str(other), "bitla_w1a1", str(tmp_path / "gone.pt")]
    assert main(["profile", *targets, str(language_model)]) == 1
    output, errors = capsys.readouterr()
    assert "bitla_w1a1" in output
    messages = errors.strip().splitlines()
    parts = ("truncated", "9 bits", "not a fairseq checkpoint", "does not exist", "lm.pt holds a t")
    assert len(messages) == len(parts)
    for message, part in zip(messages, parts, strict=True):
        assert message.startswith("error: ")
        assert part in message


def test_names_win_over_what_lies_in_the_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "hubert_fastconv").mkdir()
    (tmp_path / "bitla_w3a5").mkdir()
    checkpoint.rename(tmp_path / "bitla_w1a1")
    monkeypatch.chdir(tmp_path)
    found = rows(capsys, "bitla_w1a1", "hubert_fastconv", "bitla_w3a5", "./bitla_w1a1")
    assert [row["parameters"] == 92_212_096 for row in found] == [True, True, True, False]


def test_shapes_are_names(capsys) -> None:
    base, small = rows(capsys, "hubert_base", "distilhubert")
    assert base["storage_bytes"] / 1e6 == pytest.approx(189.14, abs=0.01)
    assert small["quantops"] == 0
    assert base["flops"] > small["flops"] > 0
    assert main(["profile", "hubert_bse"]) == 1
    assert {"hubert_fastconv,", "hubert_base"} <= set(capsys.readouterr().err.split())


def test_broken_checkpoints_leave_the_others(tmp_path: Path, capsys) -> None:
    def broken(name: str, weights: object = None, **config: object) -> str:
        model = Hubert(TINY)
        state = {"model": {**model.state_dict(), **(weights or {})}}
        state["cfg"] = {"model": {**asdict(TINY), **config}}
        torch.save(state, tmp_path / name)
        return str(tmp_path / name)

    rule = {"name": "bitl_w1a1", "rules": [{"pattern": "*.fc1"}]}
    targets = [
        broken("text.pt", encoder_layers="x"),
        broken("none.pt", encoder_layers=None),
        broken("precision.pt", precision="foo"),
        broken("rule.pt", precision=rule),
        broken("tensor.pt", {"mask_emb": "text"}),
        str(tmp_path),
    ]
    assert main(["profile", *targets, "bitla_w1a1"]) == 1
    output, errors = capsys.readouterr()
    assert "25.23" in output
    messages = errors.strip().splitlines()
    assert [m.startswith(f"error: {t}: ") for m, t in zip(messages, targets, strict=True)] == [
        True
    ] * len(targets)
    assert "Error: " in messages[0]
    assert "is a folder" in messages[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("float", "--seconds", "0"), "--seconds 0"),
        (("float", "--conversion-rate", "0"), "--conversion-rate 0"),
        (("float", "--conversion-rate", "-3"), "--conversion-rate -3"),
        ((), "name a configuration"),
        (("float", "--seconds", "inf"), "--seconds inf"),
        (("float", "--paper"), "--paper has its own models"),
        (("--paper", "--per-module"), "--paper has its own models"),
        (("--paper", "--measure"), "--paper counts only"),
        (("float", "--measure", "--measure-seconds", "2", "0"), "--measure-seconds 0"),
        (("float", "--measure", "--measure-seconds", "nan"), "--measure-seconds nan"),
        (("float", "--measure", "--measure-seconds", "0.001"), "0.001 s of audio give no frame"),
        (("float", "--measure", "--repeats", "0"), "--repeats 0"),
        (("float", "--measure-seconds", "2"), "belong to --measure"),
        (("float", "--repeats", "2"), "belong to --measure"),
        (("float", "--measure", "--conversion-rate", "inf"), "--conversion-rate inf"),
        (("bitl_w1a1", "--measure", "--conversion-rate", "1e-320"), "makes the runtime infinite"),
    ],
)
def test_contradictions(arguments: tuple, message: str, capsys) -> None:
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err


BRIEFLY = ("--measure", "--measure-seconds", "0.5", "--repeats", "1")
OVERRIDE = ("--set", "model=fastconv_tiny")


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads on a busy core take seconds to wait for each other."""
    monkeypatch.setattr(profile_timing, "usable_cores", lambda: 1)


@pytest.fixture
def small_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names load a tiny model."""
    load = Target.load

    def small(target: Target) -> Hubert:
        if target.has_weights:
            return load(target)
        return with_random_weights(partial(Hubert, TINY, precision=target.config().precision))

    monkeypatch.setattr(Target, "load", small)


def test_measured_beside_estimated(one_core, tmp_path: Path, capsys) -> None:
    build = partial(Hubert, TINY, precision=Precision("bitla_w2a2"))
    student = save(with_random_weights(build), tmp_path / "student.pt")
    targets = ("bitla_w1a1", "bitla_w1a1", str(student))
    assert main(["profile", "--json", *targets, *OVERRIDE, *BRIEFLY]) == 0
    output, progress = capsys.readouterr()
    found = json.loads(output)
    assert "timing 0.5 s, 1 thread" in progress

    names = ["hubert_fastconv (reference)", "bitla_w1a1 model=fastconv_tiny", str(student)]
    assert [row["name"] for row in found] == names
    assert [row["weights"] for row in found] == ["random", "random", "checkpoint"]
    fake = "fake quantization in fp32"
    assert [row["arithmetic"] for row in found] == ["fp32", fake, fake]
    for row in found:
        assert row["seconds"] == 10
        assert {"cpu", "cores", "instruction_sets", "torch"} == set(row["machine"])
        (entry,) = row["measured"]
        assert (entry["seconds"], entry["threads"]) == (0.5, 1)
        assert entry["times_s"] == [entry["time_s"]]
        assert entry["real_time_factor"] == entry["time_s"] / 0.5
        assert entry["measured_runtime"] > 0
        assert entry["peak_resident_bytes"] > row["libraries_resident_bytes"] / 2
    assert found[0]["measured"][0]["measured_runtime"] == 1
    assert found[0]["measured"][0]["runtime"] == 1

    # What stands beside it is the profile of the same audio.
    counted = rows(capsys, "bitla_w1a1", *OVERRIDE, "--seconds", "0.5")[0]
    entry = found[1]["measured"][0]
    for key in ("flops", "quantops", "runtime", "peak_activation_bytes"):
        assert entry[key] == counted[key]


def test_every_model_at_every_length_with_one_thread_and_all(
    small_reference, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(profile_timing, "usable_cores", lambda: 3)
    monkeypatch.setattr(profile_timing, "runnable", lambda model: replace(runnable(model), run=len))
    arguments = ("hubert_fastconv", "bitl_w1a1", "--measure")
    assert main(["profile", *arguments, "--repeats", "2", "--measure-seconds", "1", "0.5"]) == 0
    conditions = [(0.5, 1), (0.5, 3), (1.0, 1), (1.0, 3)]
    names = ("hubert_fastconv", "bitl_w1a1")  # the named reference is the reference
    output = capsys.readouterr().out
    table = output[output.index("measured beside estimated") :]
    cells = re.findall(r"│ +([\d.]+) │ +(\d+) │ (\w+) ", table)
    assert [(float(s), int(t), n) for s, t, n in cells] == [
        (*condition, name) for condition in conditions for name in names
    ]
    assert "\nbitl_w1a1: run as fake quantization" in table
    assert "\nhubert_fastconv, bitl_w1a1: no checkpoints" in table
    assert f"torch {torch.__version__}" in table


def test_what_computes_in_float_is_not_called_fake(small_reference, one_core, capsys) -> None:
    assert main(["profile", "hubert_fastconv", *BRIEFLY]) == 0
    assert "fake" not in capsys.readouterr().out


def test_what_cannot_be_measured_leaves_the_others(
    checkpoint: Path, small_reference, one_core, tmp_path: Path, capsys
) -> None:
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(checkpoint.read_bytes()[:1000])
    targets = (str(truncated), "bitl_w9a1", str(checkpoint), "bitla_w1a1")
    assert main(["profile", "--json", *targets, *BRIEFLY]) == 1
    output, errors = capsys.readouterr()
    measured = {row["name"]: len(row["measured"]) for row in json.loads(output)}
    # The checkpoint can be counted, but its quantizers have no scales to run with.
    assert measured == {"hubert_fastconv (reference)": 1, str(checkpoint): 0, "bitla_w1a1": 1}
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    for message, part in zip(
        messages, ("truncated, corrupt", "9 bits", "never calibrated"), strict=True
    ):
        assert part in message
    # Where nothing can be read, nothing is run.
    assert main(["profile", "--json", "bitl_w9a1", *BRIEFLY]) == 1
    output, errors = capsys.readouterr()
    assert (output, "timing" in errors) == ("", False)


@pytest.mark.parametrize(
    "last, times",
    # Each model runs once for its memory and once to warm up; then the turns begin.
    [(6, [1, 1]), (0, [0, 0])],
)
def test_an_interruption_shows_what_was_measured(
    last: int,
    times: list[int],
    small_reference,
    one_core,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    runs = []

    def run(waveform: torch.Tensor) -> None:
        if len(runs) == last:
            raise KeyboardInterrupt
        runs.append(waveform)

    monkeypatch.setattr(profile_timing, "runnable", lambda model: Runnable(run, "nothing"))
    arguments = ("bitla_w1a1", "--measure", "--measure-seconds", "1")
    assert main(["profile", "--json", *arguments]) == 130
    output, errors = capsys.readouterr()
    found = json.loads(output)
    assert [sum(len(entry["times_s"]) for entry in row["measured"]) for row in found] == times
    assert "interrupted" in errors
    # A row without measurements keeps its estimate.
    assert all(row["flops"] > 0 for row in found)
