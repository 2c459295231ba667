"""A corpus, a model and runs small enough that a run costs little more than its start."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from fairseq_lowbit.data.manifest import write_manifest

RATE = 16000
SPLITS = {"train": 16, "valid": 4, "test": 4}
KINDS = 6
FRONT_END = "[(8,10,5)]+[(8,3,2)]*4+[(8,2,2)]*2"
# What makes any configuration small; 16 files are 5 updates per epoch.
SMALL = (
    f"model.conv_feature_layers='{FRONT_END}'",
    "model.encoder_layers=2",
    "model.encoder_embed_dim=32",
    "model.encoder_ffn_embed_dim=64",
    "model.encoder_attention_heads=2",
    "model.conv_pos=16",
    "model.conv_pos_groups=4",
    "model.final_dim=16",
    "task.min_sample_size=4000",
    "task.health_interval=5",
    "task.calibration.batches=2",
    "dataset.num_workers=0",
    "dataset.max_tokens=96000",
    "dataset.validate_interval_updates=5",
    "checkpoint.save_interval_updates=5",
    "lr_scheduler.warmup_updates=2",
    "optimization.max_update=5",
    "optimization.update_freq=[1]",
    "optimization.lr=[0.005]",
    "common.log_interval=1",
)
TEACHER = (
    "optimization.max_update=100",
    "optimization.lr=[0.01]",
    "checkpoint.save_interval_updates=50",
    "dataset.validate_interval_updates=50",
    "criterion.unmasked_weight=0.5",
    "criterion.feature_penalty=0",
    "model.mask_length=5",
    "model.feature_grad_mult=1",
    "model.dropout=0",
    "model.attention_dropout=0",
    "model.dropout_input=0",
    "model.encoder_layerdrop=0",
)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore::UserWarning,ignore::FutureWarning",
}


def syllables(rng: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of 0.1 s, each a tone with a band of noise, and the kind of each piece."""
    kinds = rng.integers(0, KINDS, samples // 1600 + 1)
    time = np.arange(1600) / RATE
    pieces = []
    for kind in kinds:
        tone = np.sin(2 * np.pi * 200 * 2 ** (kind / 1.5) * time + rng.uniform(0, 6))
        noise = np.convolve(rng.standard_normal(1600), np.hanning(4 + 4 * kind), "same")
        pieces.append(0.2 * tone + 0.05 * noise / noise.std())
    return np.concatenate(pieces)[:samples].astype(np.float32), kinds


def make_corpus(folder: Path) -> Path:
    """Manifests, audio and labels of every split; the same bytes every time."""
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir(parents=True)
    for split, count in SPLITS.items():
        items, lines = [], []
        for index in range(count):
            samples = int(rng.integers(RATE, 2 * RATE))
            audio, kinds = syllables(rng, samples)
            name = f"audio/{split}{index:02d}.flac"
            soundfile.write(folder / name, audio, RATE)
            items.append((name, samples))
            lines.append(" ".join(str(kinds[t // 5]) for t in range((samples - 80) // 320)))
        write_manifest(folder / f"{split}.tsv", folder, items)
        (folder / f"{split}.km").write_text("\n".join(lines) + "\n")
    (folder / "dict.km.txt").write_text("".join(f"{kind} 1\n" for kind in range(KINDS)))
    return folder


@dataclass
class Run:
    """What a run printed and left behind."""

    status: int
    output: str
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / "checkpoint_last.pt"

    def state(self) -> dict[str, Any]:
        return torch.load(self.last, map_location="cpu", weights_only=False)

    def health(self) -> list[dict[str, Any]]:
        return self._records("health.jsonl")

    def progress(self) -> list[dict[str, Any]]:
        """Without what the machine decides, which differs from run to run."""
        measured = ("wall_seconds", "updates_per_second", "peak_memory_bytes")
        return [
            {key: value for key, value in record.items() if key not in measured}
            for record in self._records("progress.jsonl")
        ]

    def _records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.checkpoints / name).read_text().splitlines()]

    def logged(self, key: str) -> list[float]:
        """Values of ``key`` in the log lines of the training updates, as they were printed."""
        lines = [line for line in self.output.splitlines() if "[train_inner]" in line]
        return [float(re.search(rf"\b{key}=([^,\s]+)", line)[1]) for line in lines]

    def message(self) -> str:
        """What a refused run tells its user, which has to be one message and nothing else."""
        assert self.status == 2, self.output
        assert "Traceback" not in self.output
        # Before a job begins, Hydra's own format.
        begin = re.compile(r"^\[[^]]+\](?:\[[^]]+\]\[ERROR\] -|\[HYDRA\]) ", re.MULTILINE)
        _, *messages = begin.split(self.output)
        assert len(messages) == 1, self.output
        return messages[0].strip()


@dataclass(frozen=True)
class Trainer:
    """Runs ``fairseq-hydra-train``."""

    data: Path

    def command(self, folder: Path, config: str, *overrides: object) -> list[str]:
        return [
            str(Path(sys.executable).with_name("fairseq-hydra-train")),
            *self.arguments(folder, config, *overrides),
        ]

    def arguments(self, folder: Path, config: str, *overrides: object) -> list[str]:
        small = (f"task.data={self.data}", *SMALL, f"hydra.run.dir={folder}")
        options = [str(o) for o in overrides if str(o).startswith("-")]
        given = [str(o) for o in overrides if not str(o).startswith("-")]
        return ["--config-name", config, *options, *small, *given]

    def run(self, folder: Path, config: str, *overrides: object, cwd: Path | None = None) -> Run:
        """The real command in a fresh process, started in a folder that has nothing to do with us;
        without PYTHONPATH, as a user's."""
        started = subprocess.run(
            self.command(folder, config, *overrides),
            cwd=cwd or folder.parent,
            env=user_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Run(started.returncode, started.stdout, folder)

    def fork(
        self, folder: Path, config: str, *overrides: object, accident: tuple | None = None
    ) -> Run:
        """The same in a process forked from one that has imported fairseq, see ``run_job.py``."""
        return self.fork_arguments(folder, self.arguments(folder, config, *overrides), accident)

    def fork_arguments(
        self, folder: Path, arguments: list[str], accident: tuple | None = None
    ) -> Run:
        return _finish(*_start(folder, arguments, accident))

    def fork_ranks(
        self,
        folder: Path,
        config: str,
        *overrides: object,
        accidents: tuple[tuple | None, ...] = (None, None),
        each: tuple[tuple[object, ...], ...] = ((), ()),
    ) -> list[Run]:
        """Processes of one run, as torchrun starts them: by their environment.

        Args:
            accidents: one for each process, or None.
            each: more overrides for each.
        """
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        size = {"WORLD_SIZE": str(len(accidents))}
        started = [
            _start(
                folder,
                self.arguments(folder, config, *overrides, *own),
                accident,
                {**address, **size, "RANK": str(rank)},
            )
            for rank, (accident, own) in enumerate(zip(accidents, each, strict=True))
        ]
        return [_finish(*process) for process in started]


def _start(
    folder: Path,
    arguments: list[str],
    accident: tuple | None,
    environment: dict[str, str] | None = None,
) -> tuple[Any, Path, Path]:
    environment = environment or {}
    log = folder.with_name(f"{folder.name}{environment.get('RANK', '')}.log")
    log.unlink(missing_ok=True)
    if not any("tensorboard_logdir" in argument for argument in arguments):
        arguments = [*arguments, "common.tensorboard_logdir=null"]  # it only costs time
    job = {
        "arguments": arguments,
        "folder": str(folder.parent),
        "log": str(log),
        "accident": accident,
        "environment": environment,
    }
    script = str(Path(__file__).with_name("run_job.py"))
    process = _context().Process(target=runpy.run_path, args=(script, {"JOB": job}))
    process.start()
    return process, log, folder


def _finish(process: Any, log: Path, folder: Path) -> Run:
    process.join()
    return Run(process.exitcode, log.read_text(), folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def user_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | _ENVIRONMENT


def _context() -> multiprocessing.context.BaseContext:
    os.environ |= _ENVIRONMENT
    context = multiprocessing.get_context("forkserver")
    # The optimizer would import torch._dynamo in every run, for a third of its time.
    modules = ["fairseq_cli.hydra_train", "hydra._internal.hydra", "torch._dynamo"]
    context.set_forkserver_preload(modules)
    return context


@pytest.fixture
def environment() -> dict[str, str]:
    """A user's environment: our tests' PYTHONPATH is not in it."""
    return user_environment()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture
def broken(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus to break."""
    folder = tmp_path / "broken"
    shutil.copytree(corpus, folder)
    for manifest in folder.glob("*.tsv"):
        manifest.write_text(manifest.read_text().replace(f"{corpus}\n", f"{folder}\n"))
    return folder


@pytest.fixture(scope="session")
def trainer(corpus: Path) -> Trainer:
    return Trainer(corpus)


@pytest.fixture(scope="session")
def teacher_run(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = trainer.run(
        tmp_path_factory.mktemp("teacher") / "run",
        "hubert_fastconv",
        *TEACHER,
        "dataset.num_workers=1",
    )
    assert run.status == 0, run.output
    return run


@pytest.fixture(scope="session")
def teacher(teacher_run: Run) -> Path:
    """A checkpoint of a float teacher."""
    return teacher_run.last


@pytest.fixture(scope="session")
def student_run(trainer: Trainer, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """30 updates of 1-bit distillation."""
    run = trainer.run(
        tmp_path_factory.mktemp("student") / "run",
        "bitla_w1a1",
        f"task.teacher={teacher}",
        "optimization.max_update=30",
    )
    assert run.status == 0, run.output
    return run


@pytest.fixture
def train(trainer: Trainer, tmp_path: Path) -> Callable[..., Run]:
    """``train(config, *overrides)``: a quick run that must succeed, in a folder of its own."""

    def run(config: str, *overrides: object) -> Run:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        done = trainer.fork(folder, config, *overrides)
        assert done.status == 0, done.output
        return done

    return run
