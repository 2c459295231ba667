"""scripts/bench_accuracy.py: which runs it makes, what it keeps, what its table says."""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from fairseq_lowbit.data.manifest import write_manifest
from fairseq_lowbit.models import Hubert
from tests.shapes import TINY

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
# The front-end of tests.shapes at 50 frames a second.
SHAPE = replace(TINY, conv_feature_layers="[(8,10,5)]+[(8,3,2)]*4+[(12,2,2)]*2")
SMALL = ["--updates", "4", "--batch", "2", "--seconds", "0.5", "--held-out", "2", "--jobs", "1"]
RATES = (0.001, 0.01)
# Where scripts/test_full.sh puts the other libraries.
LIBRARIES = Path(sys.prefix) / "fairseq_lowbit_bench"


@pytest.fixture
def bench() -> Iterator[ModuleType]:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        import bench_accuracy

        yield bench_accuracy
    for name in [name for name in sys.modules if name.partition(".")[0] == "accuracy"]:
        del sys.modules[name]
    del sys.modules["bench_accuracy"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones in noise; ``teacher.pt`` has random weights large enough to matter."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for split, count in (("train", 4), ("valid", 2), ("test", 2)):
        names = [f"{split}{number}.flac" for number in range(count)]
        for name in names:
            time = np.arange(16000) / 16000
            tone = 0.3 * np.sin(2 * np.pi * rng.uniform(150, 2000) * time)
            soundfile.write(folder / name, tone + 0.02 * rng.standard_normal(16000), 16000)
        write_manifest(folder / f"{split}.tsv", folder, [(name, 16000) for name in names])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Hubert(SHAPE)
        for parameter in model.encoder.layers.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.25)
    state = {"cfg": {"model": asdict(SHAPE), "task": {}}, "model": model.state_dict()}
    torch.save(state, folder / "teacher.pt")
    return folder


def given(corpus: Path, out: Path, *arguments: str) -> list[str]:
    teacher = ["--teacher", str(corpus / "teacher.pt"), "--data", str(corpus)]
    rates = ["--rates", *map(str, RATES)]
    return [*teacher, *rates, *SMALL, "--out", str(out), *arguments]


def runs(out: Path) -> dict[tuple[str, float, int], dict]:
    """What was kept, by row, rate and seed."""
    stored = json.loads((out / "results.json").read_text())
    return {
        (entry["run"]["row"], entry["run"]["rate"], entry["run"]["seed"]): entry["outcome"]
        for entry in stored["runs"]
    }


def test_every_row_at_its_best_rate_with_every_seed(
    bench: ModuleType, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = ["float", "ours_w4a4", "minmax_w4a4", "ours_w8a8"]
    assert bench.main(given(corpus, tmp_path, "--rows", *rows, "--seeds", "2")) == 0
    kept = runs(tmp_path)
    assert len(kept) == len(rows) * (len(RATES) + 1)
    table = (tmp_path / "table.md").read_text()
    order = ["float", "W8A8", "W4A4", "W4A4"]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {bits}" for bits in order]
    for row in rows:
        best = max(RATES, key=lambda rate: kept[row, rate, 1]["trained"]["valid"])
        seeds = [kept[row, best, seed] for seed in (1, 2)]
        trained = [outcome["trained"]["test"] for outcome in seeds]
        cell = f"{statistics.mean(trained):.1f} ± {statistics.stdev(trained):.1f} | {best:g} |"
        assert sum(cell in line for line in lines) >= 1
        assert trained[0] != trained[1]
    assert "Python" in table
    assert f"[{len(kept)}/{len(kept)}, 0 min left] teacher, " in capsys.readouterr().out


def test_interrupted_it_goes_on_and_ends_where_it_would_have(
    bench: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["--rows", "ours_w2a2", "minmax_w2a2", "--seeds", "2"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert bench.main(given(corpus, whole, *rows)) == 0
    measured, measure = [], bench.measure

    def interrupted(teacher, setting, run):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(run)
        return measure(teacher, setting, run)

    monkeypatch.setattr(bench, "measure", interrupted)
    assert bench.main(given(corpus, parted, *rows)) == 130
    assert len(runs(parted)) == 3
    monkeypatch.setattr(bench, "measure", lambda *all: measured.append(all) or measure(*all))
    assert bench.main(given(corpus, parted, *rows)) == 0
    assert len(measured) == len(runs(whole)) == 6

    def without_time(out: Path) -> dict:
        return {key: {**outcome, "seconds": 0} for key, outcome in runs(out).items()}

    assert without_time(parted) == without_time(whole)
    measured.clear()
    assert bench.main(given(corpus, parted, *rows, "--seeds", "3")) == 0
    assert len(measured) == 2  # one more seed of both rows


def test_training_brings_a_student_closer(bench: ModuleType, corpus: Path, tmp_path: Path) -> None:
    arguments = ["--rows", "ours_w2a2", "--seeds", "1", "--updates", "60"]
    assert bench.main(given(corpus, tmp_path, *arguments)) == 0
    outcome = runs(tmp_path)["ours_w2a2", 0.01, 1]
    assert outcome["trained"]["test"] > outcome["calibrated"]["test"] + 1


def test_what_diverges_is_told_and_never_chosen(
    bench: ModuleType, corpus: Path, tmp_path: Path
) -> None:
    rows = ["--rows", "float", "--seeds", "1"]
    assert bench.main(given(corpus, tmp_path, *rows, "--rates", "1e30", "0.001")) == 0
    assert runs(tmp_path)["float", 1e30, 1]["trained"] == {}
    assert "| 0.001 |" in (tmp_path / "table.md").read_text()
    assert bench.main(given(corpus, tmp_path, *rows, "--rates", "1e30")) == 0
    assert "| diverged | 1e+30 |" in (tmp_path / "table.md").read_text()


def test_other_libraries_are_compared_seed_by_seed(bench: ModuleType, tmp_path: Path) -> None:
    from accuracy.results import Plan, Results
    from accuracy.rows import ROWS
    from accuracy.table import differences
    from accuracy.training import Outcome, Run, Teacher

    rows = [ROWS[name] for name in ("ours_w1a1", "minmax_w1a1", "torchao_w1a1", "brevitas_w1a1")]
    plan = Plan([Teacher("a", tmp_path, tmp_path)], rows, [0.001], 3)
    results = Results(tmp_path / "results.json", {}, "")
    ratios = {"ours": (7, 9, 8), "minmax": (9, 9, 9), "torchao": (4, 6, 8), "brevitas": (1, 2, 3)}
    for row in rows:
        for seed, ratio in enumerate(ratios[row.name.partition("_")[0]], start=1):
            outcome = Outcome({}, {"valid": 0, "test": ratio}, 0.0, 0.0)
            results.add(Run("a", row.name, 0.001, seed), outcome)
    assert list(differences(results, plan)) == [
        "a, W1A1: BiT-L against torchao QAT 2.0 ± 1.7 dB"  # 3, 3 and 0
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "ours_w3a3"], "--rows ours_w3a3: choose among float, ours_w8a8"),
        (["--updates", "0"], "0 is not positive"),
        (["--rates", "fast"], "invalid float value: 'fast'"),
        (["--data", "elsewhere"], "--teacher and --data go together"),
        (["--rows", "float", "--seconds", "2"], "none of 4 files has between 32000"),
        (["--rows", "float", "--batch", "5"], "4 recordings have 0.5 s, and a batch takes 5"),
    ],
    ids=["row", "updates", "rate", "data", "seconds", "batch"],
)
def test_a_mistake_gets_one_message(
    bench: ModuleType,
    corpus: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    try:
        status = bench.main(given(corpus, tmp_path, *arguments))
    except SystemExit as refused:
        status = refused.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_missing_library_is_named_with_the_extra_that_has_it(
    bench: ModuleType,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("accuracy.rows.find_spec", lambda name: None)
    assert bench.main(given(corpus, tmp_path, "--rows", "torchao_*")) == 2
    error = capsys.readouterr().err
    assert "row torchao_w8a8 needs torchao: pip install 'fairseq-lowbit[bench]'" in error
    assert not (tmp_path / "results.json").exists()


def test_runs_of_another_setting_are_refused(
    bench: ModuleType, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = ["--rows", "float", "--seeds", "1"]
    assert bench.main(given(corpus, tmp_path, *rows)) == 0
    assert bench.main(given(corpus, tmp_path, *rows, "--updates", "5")) == 2
    assert "has runs with updates 4, not 5" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("[]")
    assert bench.main(given(corpus, tmp_path, *rows)) == 2
    assert "is no file of this script" in capsys.readouterr().err


def command(*arguments: str) -> None:
    """Runs the script with the other libraries within reach."""
    environment = {**os.environ, "PYTHONPATH": str(LIBRARIES)}
    script = [sys.executable, str(SCRIPTS / "bench_accuracy.py"), *arguments]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_other_libraries_train_at_every_width(corpus: Path, tmp_path: Path) -> None:
    rows = ["--rows", "ours_*", "torchao_*", "brevitas_*", "--seeds", "1", "--rates", "0.003"]
    command(*given(corpus, tmp_path, *rows, "--updates", "60", "--jobs", "2"))
    kept = runs(tmp_path)
    assert len(kept) == 12
    for (row, _, _), outcome in kept.items():
        before, after = outcome["calibrated"]["test"], outcome["trained"]["test"]
        assert np.isfinite([before, after]).all()
        if row.endswith(("w2a2", "w1a1")):
            assert after > before, row


@pytest.mark.full
def test_it_makes_teachers_of_voices_that_they_do_not_share(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    own = shlex.split("--minutes 0.3 --teacher-updates 2 --rows float --rates 0.001 --seeds 1")
    command(*own, *SMALL, "--out", str(tmp_path))
    for split in ("train", "valid", "test"):
        voices = [
            {line.split("/")[1] for line in path.read_text().splitlines()[1:]}
            for path in tmp_path.glob(f"corpus_*/{split}.tsv")
        ]
        assert len(voices) == 2
        assert voices[0].isdisjoint(voices[1])
    assert "corpus a: trained" in (tmp_path / "table.md").read_text()
