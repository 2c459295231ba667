"""Commands with ``--device``: what they write is what they write on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.evaluation.probing.measure import measure_probes
from fairseq_lowbit.evaluation.quality import read_held_out
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.interop.checkpoint import as_checkpoint
from fairseq_lowbit.models import Hubert, LoadedModel
from tests.evaluation.conftest import SHAPE, calibrated
from tests.evaluation.test_compare import without
from tests.report.conftest import write_progress

COMMANDS = {
    "evaluate": ("T", "--data=D", "--out=O"),
    "ptq": ("T", "--precision=bitl_w8a8", "--data=D"),
    "probe": ("T", "--data=D", "--out=O"),
    "wer": ("a=T", "--data=D", "--out=O"),
    "transcribe": ("T", "a.wav"),
    "sweep-table": ("T",),
    "schedule-figure": ("T", "--out=O"),
    "report": ("T",),
    "labels": ("D", "--model=T", "--layer=1"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_device_that_is_not_there(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Refused before anything else is looked at: there is no T and no D either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert main([command, *COMMANDS[command], "--device", "cuda:1"]) == 2
    wanted = "--device cuda:1: this machine has cpu, cuda:0; give one of them, or auto"
    assert capsys.readouterr().err == f"error: {wanted}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Opened(Exception):
        pass

    def open_model(source: str, device: str) -> None:
        opened.append(device)
        raise Opened

    monkeypatch.setattr("fairseq_lowbit.cli.transcribe.open_model", open_model)
    for count in (0, 2):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        for options in ([], ["--device=cpu"], ["--device=cuda"] if count else []):
            with pytest.raises(Opened):
                main(["transcribe", "model", "audio.wav", *options])
    assert opened == ["cpu", "cpu", "cpu", "cuda", "cpu", "cuda"]


def run(device: str, command: str, *arguments: object) -> None:
    assert main([command, *map(str, arguments), "--device", device]) == 0


def test_ptq_and_evaluate(teacher: LoadedModel, data: Path, tmp_path: Path, device: str) -> None:
    without(data, "words_*")
    for place in ("cpu", device):
        out = tmp_path / f"{place}.pt"
        settings = ("--precision", "bitl_w8a8", "--calibration", "absmax")
        run(place, "ptq", teacher.source, "--data", data, "--out", out, *settings)
        rows = ("--ptq", "absmax_w4a8", "--student", f"w8a8={tmp_path / 'cpu.pt'}")
        run(place, "evaluate", teacher.source, "--data", data, "--out", tmp_path / place, *rows)
    own, other = (open_model(tmp_path / f"{place}.pt").model for place in ("cpu", device))
    for name, operator in own.named_modules():
        if getattr(operator, "weight_quantizer", None) is not None:
            codes = [
                each.weight_quantizer.codes(each.stored_weight()).integers
                for each in (operator, other.get_submodule(name))
            ]
            assert torch.equal(*codes), name
    for (name, value), (_, there) in zip(own.named_parameters(), other.named_parameters()):
        torch.testing.assert_close(there, value, rtol=1e-4, atol=1e-5, msg=name)
    # A file is read where there is no such device.
    stored = torch.load(tmp_path / f"{device}.pt", weights_only=True)["model"]
    assert {value.device.type for value in stored.values()} == {"cpu"}
    first, second = (
        json.loads((tmp_path / place / "comparison.json").read_text())["rows"]
        for place in ("cpu", device)
    )
    for own, other in zip(first, second, strict=True):
        assert own["name"] == other["name"]
        assert own["masked"]["accuracy"] == pytest.approx(other["masked"]["accuracy"], abs=0.02)
        if own["agreement"] is not None:
            for key, near in (("cosine", 1e-3), ("snr_db", 0.1)):
                assert own["agreement"][key] == pytest.approx(other["agreement"][key], abs=near)


@pytest.mark.full
def test_probes(teacher: LoadedModel, data: Path, device: str) -> None:
    held_out = read_held_out(data, teacher)
    here = measure_probes(teacher.model, held_out.probes, seeds=1)
    there = measure_probes(open_model(teacher.source, device).model, held_out.probes, seeds=1)
    for key, probe in here.items():
        assert probe.rate.value == pytest.approx(there[key].rate.value, abs=0.1)
        assert probe.layer_weights == pytest.approx(there[key].layer_weights, abs=0.01)


@pytest.mark.full
def test_sweep_table_and_report(
    make_run: Callable, data: Path, tmp_path: Path, device: str
) -> None:
    without(data, "words_*")
    folder = make_run("run", calibrated("bitla_w1a1"))
    write_progress(folder, 3)
    table = tmp_path / "table.csv"
    run(device, "sweep-table", folder, "--seconds", 3, "--csv", table)
    assert "cosine" in table.read_text()
    page = tmp_path / "page.html"
    run(device, "report", folder, "--out", page, "--seconds", 3)
    assert "attention of teacher and student" in page.read_text()


def test_labels(teacher: LoadedModel, data: Path, device: str) -> None:
    for place in ("cpu", device):
        options = ("--model", teacher.source, "--layer", 1, "--clusters", 4, "--splits", "test")
        run(place, "labels", data, *options, "--name", place)
    own, other = ((data / f"test.{place}").read_text().split() for place in ("cpu", device))
    same = sum(a == b for a, b in zip(own, other, strict=True))
    assert same >= 0.99 * len(own)


def test_transcribe_and_wer(data: Path, tmp_path: Path, device: str, capsys) -> None:
    units = ("", "|", *"abc")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Hubert(SHAPE, units=len(units)).eval()
        torch.nn.init.normal_(model.ctc_proj.weight)
    checkpoint = tmp_path / "r.pt"
    torch.save(as_checkpoint(LoadedModel(model, "", 0, True, False, units=units)), checkpoint)
    count = len(read_manifest(data / "test.tsv"))
    (data / "test.wrd").write_text("ab c\n" * count)
    said = []
    for place in ("cpu", device):
        capsys.readouterr()
        run(place, "transcribe", checkpoint, data / "test.tsv")
        said.append(capsys.readouterr().out)
        run(place, "wer", f"model={checkpoint}", "--data", data, "--out", tmp_path / place)
    assert said[0] == said[1] != ""
    texts = [(tmp_path / place / "model.txt").read_text() for place in ("cpu", device)]
    assert texts[0] == texts[1]
