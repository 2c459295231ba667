"""Training through fairseq-hydra-train: what a run prints, writes and learns."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from omegaconf import OmegaConf

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.configurations import compose_config, config_names
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.nn import quantizers
from fairseq_lowbit.plugin import register
from fairseq_lowbit.runs.run import read_run
from tests.plugin.conftest import Trainer

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("bitl", "bitla")
PRECISIONS = ("w1a1", "w1a2", "w2a2", "w4a4", "w8a8")
CONFIGS = [f"{method}_{precision}" for method in METHODS for precision in PRECISIONS]
CONFIGS += [f"sqwq_w{bits}" for bits in (8, 4, 2, 1)]
# 6 linears with weight and input quantizers, of which q, k and v share the input's; 4 operands.
QUANTIZERS_PER_LAYER = 6 + 4 + 4
KNOBS = {
    "task": "data teacher normalize pad_audio random_crop min_sample_size max_keep_size "
    "max_sample_size max_unusable init_from health_interval compile calibration stages",
    "criterion": "final_weight layer_weight attention_weight attention mask squash_weight",
    "model": "encoder_layers encoder_embed_dim dropout attention_dropout activation_dropout "
    "dropout_input encoder_layerdrop feature_grad_mult precision",
    "optimizer": "adam_betas adam_eps weight_decay scale_lr_ratio shift_lr_ratio squashed_lr_ratio",
    "optimization": "lr max_update update_freq clip_norm",
}


def tensors(run, part: str) -> dict[str, torch.Tensor]:
    """The saved weights whose names contain ``part``."""
    return {name: value for name, value in run.state()["model"].items() if part in name}


def test_all_configs_are_here() -> None:
    assert config_names() == sorted([*CONFIGS, "asr_ctc", "fastconv_adaptation", "hubert_fastconv"])


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_compose_with_every_knob(name: str) -> None:
    config = compose_config(name, ["task.data=/data", "task.teacher=/teacher.pt"])
    values = OmegaConf.to_container(config, resolve=False)
    for section, keys in KNOBS.items():
        assert set(keys.split()) <= set(values[section]), section
    assert values["model"]["precision"]["name"] == name
    assert values["model"]["precision"]["rules"] == []
    assert values["dataset"]["required_batch_size_multiple"] == 1
    assert not OmegaConf.missing_keys(config)


def test_the_teacher_is_trained(teacher_run) -> None:
    losses = teacher_run.logged("loss_masked")
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert min(teacher_run.health()[-1]["centered_std"]) > 0.2


def test_plan_is_printed_and_written(student_run) -> None:
    assert "precision bitla_w1a1" in student_run.output
    assert "encoder.layers.{0-1}.self_attn.probabilities" in student_run.output
    plan = json.loads((student_run.checkpoints / "precision_plan.json").read_text())
    assert plan == open_model(student_run.last).model.plan.to_mapping()
    assert f"{plan['parameters']:,}" in student_run.output


def test_health_of_every_quantizer_is_recorded(student_run) -> None:
    names = [name for name, _ in quantizers(open_model(student_run.last).model)]
    assert len(names) == 2 * QUANTIZERS_PER_LAYER
    records = student_run.health()
    assert [record["update"] for record in records] == [0, 5, 10, 15, 20, 25]
    for record in records:
        assert sorted(entry["name"] for entry in record["quantizers"]) == sorted(names)
        assert len(record["centered_std"]) == 2
    assert "health at update 25" in student_run.output
    assert re.search(rf"│ +1 │[^│]+│ +{QUANTIZERS_PER_LAYER} │", student_run.output)


def test_tensorboard_files(student_run) -> None:
    writers = {path.parent.name for path in (student_run.folder / "tensorboard").rglob("events*")}
    assert {"train_inner", "valid"} <= writers


def test_distillation_learns(student_run) -> None:
    losses = student_run.logged("loss")
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(value > 0 for value in student_run.logged("loss_attention"))


def test_the_student_is_saved_without_its_teacher(student_run, teacher: Path) -> None:
    state = student_run.state()
    own = {name for name, _ in open_model(student_run.last).model.named_parameters()}
    buffers = {name for name in state["model"] if name.endswith("_quantizer.calibrated")}
    assert set(state["model"]) == own | buffers
    assert "label_embs_concat" not in state["model"]
    # Weights, two moments of Adam and its step counters; the teacher would be another third.
    saved = list(saved_tensors(state))
    assert sum(tensor.nbytes for tensor in saved) < 3.02 * nbytes(state["model"])
    assert student_run.last.stat().st_size < 3.02 * nbytes(state["model"]) + 600 * len(saved)


def saved_tensors(value: object) -> Iterator[torch.Tensor]:
    """Everything in nested dictionaries and lists; there may be nothing but plain data."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from saved_tensors(item)
    elif isinstance(value, torch.Tensor):
        yield value
    else:
        assert value is None or isinstance(value, (str, int, float)), type(value)


def nbytes(weights: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def test_the_front_end_stays_the_teachers(student_run, teacher: Path) -> None:
    weights = torch.load(teacher, weights_only=False)["model"]
    own = tensors(student_run, "feature_extractor.")
    assert len(own) == 7 + 2
    for name, value in own.items():
        assert torch.equal(value, weights[name]), name


def test_ratios_of_quantizer_rates(train: Callable, student_run, teacher: Path) -> None:
    """A ratio of 0 leaves the calibrated scales alone, while shifts and weights learn."""
    frozen = train(
        "bitla_w1a1",
        f"task.teacher={teacher}",
        "optimizer.scale_lr_ratio=0",
        "optimizer.shift_lr_ratio=0.25",
        "lr_scheduler.total_num_update=100",
        "optimization.max_update=10",
    )
    calibrated = train("bitla_w1a1", f"task.teacher={teacher}", "optimization.lr=[1e-30]")
    for name, value in tensors(frozen, "log_scale").items():
        assert torch.equal(value, calibrated.state()["model"][name]), name
        assert not torch.equal(value, student_run.state()["model"][name]), name
    for part in ("_quantizer.relative_shift", "fc1.weight"):
        learned, before = tensors(frozen, part), tensors(calibrated, part)
        assert any(not torch.equal(learned[name], before[name]) for name in learned), part

    weights, scales, shifts = frozen.state()["last_optimizer_state"]["param_groups"]
    assert len(scales["params"]) == len(tensors(frozen, "log_scale"))
    assert len(shifts["params"]) == len(tensors(frozen, "_quantizer.relative_shift"))
    assert weights["lr"] > 0
    assert scales["lr"] == 0
    assert shifts["lr"] == pytest.approx(0.25 * weights["lr"])
    assert [group["weight_decay"] for group in (weights, scales, shifts)] == [0.01, 0, 0]


def test_rules_survive_the_checkpoint(train: Callable, teacher: Path) -> None:
    rules = [
        {"match": "encoder.layers.0.*", "weight_bits": 1, "activation_bits": 4},
        {"match": "*.fc2", "method": "elastic", "weight_bits": 8, "granularity": "per_channel"},
        {"match": "post_extract_proj", "weight_bits": 3, "activation_bits": 16},
        {"match": "encoder.layers.1.self_attn.*", "method": "none"},
    ]
    text = ",".join(
        "{" + ",".join(f"{k}: '{v}'" if k == "match" else f"{k}: {v}" for k, v in r.items()) + "}"
        for r in rules
    )
    run = train("bitla_w2a2", f"task.teacher={teacher}", f"model.precision.rules=[{text}]")
    stored = run.state()["cfg"]["model"]["precision"]
    assert stored["name"] == "bitla_w2a2"
    assert [{k: v for k, v in rule.items() if v is not None} for rule in stored["rules"]] == rules
    model = open_model(run.last).model
    written = json.loads((run.checkpoints / "precision_plan.json").read_text())
    assert model.plan.to_mapping() == written
    bits = {e.module: (e.weight_bits, e.activation_bits) for e in model.plan.entries}
    assert bits["encoder.layers.0.fc1"] == (1, 4)
    # Each of two rules that match sets a field of its own.
    assert bits["encoder.layers.0.fc2"] == (8, 4)
    assert bits["encoder.layers.1.fc1"] == (2, 2)
    assert bits["encoder.layers.1.self_attn.query"] == (16, 16)
    assert bits["post_extract_proj"] == (3, 16)


def test_a_quantized_model_as_teacher(train: Callable, teacher: Path) -> None:
    stage = train("bitla_w4a4", f"task.teacher={teacher}")
    final = train("bitla_w1a1", f"task.teacher={stage.last}")
    assert open_model(final.last).model.plan.precision.name == "bitla_w1a1"
    assert all(value > 0 for value in final.logged("loss"))


def test_another_start_than_the_teacher(
    train: Callable, student_run, teacher: Path, tmp_path: Path
) -> None:
    """The student starts there, and a front-end of its own stays as it is too."""
    state = student_run.state()
    for name in ("encoder.layers.0.fc1.weight", "feature_extractor.conv_layers.3.0.weight"):
        state["model"][name] += 1.0
    torch.save(state, tmp_path / "start.pt")
    run = train("bitla_w2a2", f"task.teacher={teacher}", f"task.init_from={tmp_path}/start.pt")
    weights = run.state()["model"]
    for name, value in state["model"].items():
        if name.startswith("feature_extractor."):
            assert torch.equal(weights[name], value), name
    started = state["model"]["encoder.layers.0.fc1.weight"]
    torch.testing.assert_close(weights["encoder.layers.0.fc1.weight"], started, rtol=0, atol=0.1)


def test_masked_prediction_trains_a_quantized_student(train: Callable, teacher: Path) -> None:
    run = train(
        "hubert_fastconv",
        "quant=bitla_w2a2",
        f"task.init_from={teacher}",
        "optimization.max_update=10",
        "optimization.lr=[0.0001]",
    )
    model = open_model(run.last).model
    assert model.plan.precision.name == "bitla_w2a2"
    labels = torch.load(teacher, weights_only=False)["model"]["label_embs_concat"]
    torch.testing.assert_close(model.label_embs_concat, labels, rtol=0, atol=0.01)
    assert len(run.logged("accuracy")) == 10


def test_a_run_starts_readably(student_run) -> None:
    """No debugging of Hydra's; the configuration is in a file of its own instead of on one line."""
    assert "DEBUG" not in student_run.output
    log = (student_run.folder / "hydra_train.log").read_text()
    for line in (student_run.output + log).splitlines():
        assert len(line) < 1000, line
    assert "name: bitla_w1a1" in (student_run.folder / ".hydra" / "config.yaml").read_text()


def test_masked_distillation_of_scores(train: Callable, teacher: Path) -> None:
    run = train(
        "bitl_w2a2",
        f"task.teacher={teacher}",
        "criterion.mask=true",
        "criterion.attention=scores",
        "criterion.final_weight=0",
    )
    terms = zip(run.logged("loss_layers"), run.logged("loss_attention"), strict=True)
    sums = [layers + attention for layers, attention in terms]
    assert run.logged("loss") == pytest.approx(sums, abs=2e-4)


def test_terms_of_weight_zero_are_left_out(train: Callable, teacher: Path) -> None:
    run = train(
        "bitla_w1a1",
        f"task.teacher={teacher}",
        "criterion.layer_weight=0",
        "criterion.attention_weight=0",
    )
    assert run.logged("loss") == run.logged("loss_final")
    assert "loss_layers" not in run.output
    assert "loss_attention" not in run.output


def test_padded_batches(train: Callable, teacher: Path) -> None:
    run = train("bitla_w1a1", f"task.teacher={teacher}", "task.pad_audio=true")
    losses = run.logged("loss")
    assert len(losses) == 5
    assert all(0 < value < 100 for value in losses)


def test_a_sweep_from_a_checkout(trainer, teacher: Path, tmp_path: Path) -> None:
    """The way of fairseq's own examples, --config-dir and common.user_dir, and two jobs in one
    process, where fairseq would compare the second one with the first one's best loss."""
    run = trainer.run(
        tmp_path / "unused",
        "bitla_w1a1",
        "-m",
        "--config-dir=config",
        "common.user_dir=fairseq_lowbit",
        f"task.teacher={teacher}",
        f"hydra.sweep.dir={tmp_path}/sweep",
        "hydra.sweep.subdir=${hydra:job.num}",
        "optimization.lr=[0.005],[1e-30]",
        cwd=ROOT,
    )
    assert run.status == 0, run.output
    for job in "01":
        checkpoints = tmp_path / "sweep" / job / "checkpoints"
        assert (checkpoints / "checkpoint_best.pt").is_file()
        assert open_model(checkpoints / "checkpoint_last.pt").updates == 5


def test_relative_paths(trainer, corpus: Path, teacher: Path, tmp_path: Path) -> None:
    """They mean the folder the command is given in, although Hydra changes into the run's."""
    (tmp_path / "my_data").symlink_to(corpus)
    (tmp_path / "teacher.pt").symlink_to(teacher)
    given = ("task.data=my_data", "task.teacher=teacher.pt")
    one = trainer.fork(tmp_path / "one", "bitla_w1a1", *given)
    assert one.status == 0, one.output
    assert one.state()["cfg"]["task"]["teacher"] == str(tmp_path / "teacher.pt")
    sweep = (f"hydra.sweep.dir={tmp_path}/sweep", "hydra.sweep.subdir=${hydra:job.num}")
    two = trainer.fork(tmp_path / "unused", "bitla_w1a1", "-m", *sweep, *given, "common.seed=1,2")
    assert two.status == 0, two.output
    assert len(list((tmp_path / "sweep").rglob("checkpoint_last.pt"))) == 2


def test_one_run_from_a_checkout(trainer, teacher: Path, tmp_path: Path) -> None:
    run = trainer.run(
        tmp_path / "run",
        "bitla_w1a1",
        "--config-dir=config",
        "common.user_dir=fairseq_lowbit",
        f"task.teacher={teacher}",
        cwd=ROOT,
    )
    assert run.status == 0, run.output
    assert open_model(run.last).updates == 5


def test_a_calibrated_checkpoint_serves_fairseq_and_training(
    train, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ptq.pt"
    command = ["ptq", str(teacher), "--precision", "sqwq_w4", "--data", str(corpus)]
    assert main([*command, "--out", str(out)]) == 0
    own = open_model(out).model
    register()
    (loaded,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(out)])
    waveform = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.eval().final_output(waveform), own.final_output(waveform))
    run = train("bitla_w1a1", f"task.teacher={teacher}", f"task.init_from={out}")
    assert run.logged("loss")


def test_rules_of_several_files_are_trained_stored_and_resumed(
    trainer: Trainer, teacher: Path, tmp_path: Path
) -> None:
    given = (f"task.teacher={teacher}", "rules=[front_end_w8a8,per_channel]")
    folder = tmp_path / "run"
    for updates in (1, 2):
        run = trainer.fork(folder, "bitla_w1a1", *given, f"optimization.max_update={updates}")
        assert run.status == 0, run.output
    stored = run.state()["cfg"]["model"]["precision"]
    assert len(stored["rules"]) == 4
    assert "rule_files" not in stored
    entries = {e.module: e for e in open_model(run.last).model.plan.entries}
    assert entries["encoder.pos_conv.0"].method == "minmax"
    assert entries["encoder.layers.0.fc1"].granularity == "per_channel"
    assert read_run(folder).rules == 4
