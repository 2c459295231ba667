"""Teachers of one's own: corpora of different synthesized voices, and a float model of each."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accuracy.training import SPLITS, TRAIN, Teacher
from fairseq_lowbit.cli.main import main as lowbit
from fairseq_lowbit.data.manifest import read_manifest, write_manifest
from fairseq_lowbit.data.synthetic.speech import synthesize_corpus
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_model

# A corpus has every other voice of each split, so two of them have none in common.
CORPORA = ("a", "b")
_LABELS = ("--clusters", "50")
_HYDRA_TRAIN = "from fairseq_cli.hydra_train import cli_main; cli_main()"


def own_teachers(folder: Path, minutes: float, updates: int, jobs: int) -> list[Teacher]:
    """What is missing under ``folder`` is made: two corpora of ``minutes`` of training speech each,
    and a teacher of so many updates on each, ``jobs`` at once.

    Raises:
        LowbitError: without eSpeak NG; labelling or training failed.
    """
    teachers = [_teacher(folder, name, minutes, updates) for name in CORPORA]
    for place, teacher in enumerate(teachers):
        _prepare(teacher.data, place, minutes)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda teacher: _train(teacher, updates), teachers))
    return teachers


def _teacher(folder: Path, name: str, minutes: float, updates: int) -> Teacher:
    """Of other options, in other folders."""
    data = folder / f"corpus_{name}_{minutes:g}min"
    run = folder / f"teacher_{name}_{minutes:g}min_{updates}"
    return Teacher(f"corpus {name}", run / "checkpoints" / "checkpoint_last.pt", data)


def _prepare(data: Path, place: int, minutes: float) -> None:
    if not (data / f"{TRAIN}.tsv").exists():
        _make_corpus(data, place, minutes)
    if not (data / "dict.km.txt").exists() and lowbit(["labels", str(data), *_LABELS]):
        raise LowbitError(f"labelling {data} failed, see above")


def _make_corpus(out: Path, place: int, minutes: float) -> None:
    """Manifests of a corpus of other sentences for every ``place``, said by every other voice."""
    speech = out.with_name(out.name.replace("corpus", "speech"))
    print(f"{out}: synthesizing {minutes:g} minutes", flush=True)
    # All voices together say as much as all corpora together.
    synthesize_corpus(speech, minutes=len(CORPORA) * minutes, seed=place)
    out.mkdir(exist_ok=True)
    for split in reversed(SPLITS):  # what tells that all is there comes last
        _keep_voices(speech, out, split, place)


def _keep_voices(speech: Path, out: Path, split: str, place: int) -> None:
    """Writes the manifest of every other voice of a split, from the one in ``place`` on."""
    manifest = read_manifest(speech / f"{split}.tsv")
    speakers = (speech / f"{split}.spk").read_text(encoding="utf-8").split("\n")[: len(manifest)]
    kept = set(sorted(set(speakers))[place :: len(CORPORA)])
    items = zip(manifest.names, manifest.sizes.tolist(), speakers)
    own = [(name, size) for name, size, speaker in items if speaker in kept]
    write_manifest(out / f"{split}.tsv", manifest.root, own)


def _train(teacher: Teacher, updates: int) -> None:
    """Pre-trains on labels, as recipes/demo.sh does; interrupted, it goes on."""
    run = teacher.checkpoint.parents[1]
    if teacher.checkpoint.exists() and open_model(teacher.checkpoint).updates >= updates:
        return
    log = run.with_suffix(".log")
    print(f"teacher of {teacher.name}: {updates:,} updates; its log is {log}", flush=True)
    settings = [
        "run=demo_pretraining",
        f"task.data={teacher.data}",
        f"optimization.max_update={updates}",
        f"lr_scheduler.warmup_updates={updates // 10 + 1}",
        f"hydra.run.dir={run}",
    ]
    command = [sys.executable, "-c", _HYDRA_TRAIN, "--config-name", "hubert_fastconv", *settings]
    # A model of this size gains little from a second thread.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(log, "a", encoding="utf-8") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode:
        raise LowbitError(f"training the teacher of {teacher.name} failed; its log is {log}")
