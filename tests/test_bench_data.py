"""scripts/bench_data.py, through the command: what it measures is another matter."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fairseq_lowbit.data.manifest import write_manifest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_data.py"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.flac", rng.uniform(-0.3, 0.3, 16000), 16000)
    write_manifest(tmp_path / "train.tsv", tmp_path, [(f"{n}.flac", 16000) for n in range(3)])
    return tmp_path


def test_rates_of_all_that_takes_audio(corpus: Path) -> None:
    out = corpus / "rates.json"
    small = [
        "--audio",
        "1.5",
        "--batch",
        "1",
        "--seconds",
        "0.5",
        "--repeats",
        "2",
        "--layer",
        "1",
        "--cores",
        "4",
    ]
    done = bench("--data", str(corpus), "--json", str(out), *small)
    assert done.returncode == 0, done.stderr
    measured = json.loads(out.read_text())
    assert measured["files"] == 2  # the first files that hold a second and a half
    assert measured["mean_seconds"] == 1
    assert list(measured["rates"]) == [
        "read",
        "MFCC labels",
        "labels of layer 1",
        "training step",
    ]
    assert all(len(rates) == 2 and min(rates) > 0 for rates in measured["rates"].values())
    assert "hours on 4 cores" in done.stdout
    assert measured["machine"] in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [(["--layer", "9"], "--layer 9: the model has layers 1 to 4"), (["--cores", "0"], "--cores 0")],
    ids=["layer", "cores"],
)
def test_a_mistake_gets_one_message(arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
