"""Where a quantized run starts: what it is calibrated on, and that nothing planned stays float."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.interop import open_model

# Each leaves out, cuts or orders files in a way that the draw or the cuts depend on.
READING = ("task.max_keep_size=30000", "task.max_sample_size=20000", "common.seed=3")


@pytest.mark.parametrize("precision", ["bitla_w2a2", "sqwq_w4"])
def test_a_run_starts_from_what_ptq_writes(
    precision: str, train: Callable, teacher: Path, broken: Path, tmp_path: Path
) -> None:
    (broken / "audio" / "train03.flac").write_bytes(b"not audio")
    out = tmp_path / "ptq.pt"
    command = ["ptq", str(teacher), "--precision", precision, "--data", str(broken)]
    reading = ("task.calibration.batches=3", *READING)
    overrides = [f"--override={override}" for override in reading]
    assert main([*command, "--out", str(out), *overrides]) == 0
    run = train(
        precision,
        f"task.teacher={teacher}",
        f"task.data={broken}",
        "task.min_sample_size=8000",
        "optimization.max_update=1",
        "optimization.lr=[0]",
        *reading,
    )
    started, calibrated = (open_model(path).model.state_dict() for path in (run.last, out))
    assert started.keys() == calibrated.keys()
    assert any("quantizer" in name for name in started)
    for name, value in started.items():
        assert torch.equal(value, calibrated[name]), name


# A task of fairseq's own

USER_DIR = '''
"""A language model without context, of our operators, for fairseq's own task and loss."""

from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from fairseq_lowbit.nn import Linear, attach
from fairseq_lowbit.plugin import register
from fairseq_lowbit.precision import Precision, Rule

register()


@dataclass
class BigramsConfig(FairseqDataclass):
    bypass: bool = False


@register_model("bigrams", dataclass=BigramsConfig)
class Bigrams(BaseFairseqModel):
    supported_targets = {"future"}

    def __init__(self, words, bypass):
        super().__init__()
        self.embedding = nn.Embedding(words, 16)
        self.inner, self.outer = Linear(16, 32), Linear(32, words)
        self.bypass = bypass
        rule = Rule("*er", weight_bits=4, activation_bits=8, method="elastic")
        self.plan = attach(self, Precision("float", [rule]))

    @classmethod
    def build_model(cls, cfg, task):
        return cls(len(task.source_dictionary), cfg.bypass)

    def forward(self, src_tokens, src_lengths):
        x = F.linear(self.embedding(src_tokens), self.inner.weight)
        return (self.outer(x if self.bypass else self.inner(self.embedding(src_tokens))),)

    def get_normalized_probs(self, output, log_probs, sample=None):
        return F.log_softmax(output[0], -1)

    def get_targets(self, sample, output):
        return sample["target"]

    def max_positions(self):
        return 64
'''


@pytest.fixture
def train_bigrams(trainer, tmp_path: Path) -> Callable:
    """``train_bigrams(*overrides)``: fairseq's language modelling, as its users configure it."""
    data = tmp_path / "text"
    data.mkdir()
    words = [f"w{index % 7}" for index in range(400)]
    for split in ("train", "valid"):
        lines = [" ".join(words[start : start + 20]) for start in range(0, 400, 20)]
        (data / split).write_text("\n".join(lines) + "\n")
    (data / "dict.txt").write_text("".join(f"w{index} 1\n" for index in range(7)))
    (tmp_path / "bigrams").mkdir()
    (tmp_path / "bigrams" / "__init__.py").write_text(USER_DIR)

    def run(*overrides: str):
        arguments = (
            f"--config-dir={tmp_path}",
            "--config-name=lm",
            f"hydra.run.dir={tmp_path}/run",
            f"common.user_dir={tmp_path}/bigrams",
            f"task.data={data}",
            *overrides,
        )
        return trainer.fork_arguments(tmp_path / "run", list(arguments))

    (tmp_path / "lm.yaml").write_text(
        """# @package _global_
common: {tensorboard_logdir: null, log_format: simple, log_interval: 1, user_dir: null}
task: {_name: language_modeling, data: null, tokens_per_sample: 16}
model: {_name: bigrams, bypass: false}
criterion: cross_entropy
dataset: {batch_size: 4, num_workers: 0, dataset_impl: raw, required_batch_size_multiple: 1}
optimizer: {_name: lowbit_adam}
lr_scheduler: fixed
optimization: {lr: [0.01], max_update: 10}
checkpoint: {save_dir: checkpoints, no_epoch_checkpoints: true}
hydra:
  job: {chdir: true}
  callbacks: {fairseq_lowbit: {_target_: fairseq_lowbit.plugin.callback.FairseqJob}}
"""
    )
    return run


def test_a_task_of_fairseq_trains_a_quantized_model(train_bigrams: Callable) -> None:
    run = train_bigrams()
    assert run.status == 0, run.output
    assert "calibrating on 7 batches" in run.output
    plan = json.loads((run.checkpoints / "precision_plan.json").read_text())
    assert [entry["module"] for entry in plan["entries"]] == ["inner", "outer"]
    (record,) = run.health()
    assert {entry["name"] for entry in record["quantizers"]} == {
        f"{module}.{side}_quantizer"
        for module in ("inner", "outer")
        for side in ("weight", "input")
    }
    assert all(entry["sqnr_db"] > 10 for entry in record["quantizers"])
    losses = run.logged("loss")
    assert losses[-1] < losses[0]
    resumed = train_bigrams("optimization.max_update=12")
    assert resumed.status == 0, resumed.output
    assert "calibrating" not in resumed.output
    assert len(resumed.logged("loss")) == 2


def test_a_module_that_is_not_called_is_refused(train_bigrams: Callable) -> None:
    message = train_bigrams("model.bypass=true").message()
    for part in ("never calls", "inner.input_quantizer", "method none"):
        assert part in message
    assert "outer" not in message
