"""Squashed, stretched and plain methods through fairseq-hydra-train."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fairseq_lowbit.interop import open_model
from fairseq_lowbit.nn import float_state, is_calibrated, quantizers, squashed_weights
from fairseq_lowbit.quantization import SquashedQuantizer, squash_penalty

UPDATES = 20
OPTIONS = (
    f"optimization.max_update={UPDATES}",
    "optimization.lr=[0.002]",
    "optimizer.squashed_lr_ratio=5",
    "optimizer.scale_lr_ratio=0.5",
)


# So that the last checkpoint has a rate to compare.
END = 0.001
OPTIONS_TO_END = (*OPTIONS, f"+lr_scheduler.end_learning_rate={END}")


@pytest.fixture(scope="module")
def squashed_run(trainer, teacher: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("squashed") / "run"
    run = trainer.fork(folder, "sqwq_w2", f"task.teacher={teacher}", *OPTIONS_TO_END)
    assert run.status == 0, run.output
    return run


def test_squashed_weights_train(squashed_run) -> None:
    losses = squashed_run.logged("loss")
    assert len(losses) == UPDATES
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_regulariser_is_a_part_of_the_loss(squashed_run) -> None:
    squash = squashed_run.logged("loss_squash")
    assert len(squash) == UPDATES
    assert squash[0] < 0.01  # the fit starts at the target
    terms = [squashed_run.logged(f"loss_{name}") for name in ("final", "layers", "attention")]
    sums = [sum(values) for values in zip(squash, *terms, strict=True)]
    assert squashed_run.logged("loss") == pytest.approx(sums, abs=3e-4)
    model = open_model(squashed_run.last).model
    assert squash_penalty(squashed_weights(model)).item() < 0.05


def test_the_share_that_squashing_clips_is_logged(squashed_run) -> None:
    found = re.search(
        r"squashed the weights of 12 modules, clipping ([\d.]+)%", squashed_run.output
    )
    assert 0 < float(found[1]) < 10


def test_a_squashed_student_comes_back(squashed_run) -> None:
    model = open_model(squashed_run.last).model
    assert is_calibrated(model)
    assert model.plan.precision.name == "sqwq_w2"
    kinds = {type(q) for name, q in quantizers(model) if name.endswith("weight_quantizer")}
    assert kinds == {SquashedQuantizer}
    assert len(squashed_weights(model)) == 12
    health = squashed_run.health()
    assert [record["update"] for record in health] == [0, 5, 10, 15]
    names = sorted(name for name, _ in quantizers(model))
    assert sorted(entry["name"] for entry in health[-1]["quantizers"]) == names


def test_squashed_weights_have_their_own_rate_and_no_decay(squashed_run) -> None:
    weights, scales, squashed = squashed_run.state()["last_optimizer_state"]["param_groups"]
    assert len(squashed["params"]) == len(scales["params"]) == 12
    rates = [group["lr"] for group in (weights, scales, squashed)]
    assert rates == pytest.approx([END, 0.5 * END, 5 * END])
    assert [group["weight_decay"] for group in (weights, scales, squashed)] == [0.01, 0, 0]


def test_a_killed_run_ends_as_if_nothing_had_happened(
    trainer, teacher: Path, squashed_run, tmp_path: Path
) -> None:
    """Squashing a second time would ruin the weights."""
    command = (tmp_path / "run", "sqwq_w2", f"task.teacher={teacher}", *OPTIONS_TO_END)
    killed = trainer.fork(*command, accident=("kill_in_update", 13))
    assert killed.status == -signal.SIGKILL, killed.output
    run = trainer.fork(*command)
    assert run.status == 0, run.output
    assert "squashed the weights" not in run.output
    own, expected = run.state(), squashed_run.state()
    for name, value in expected["model"].items():
        assert torch.equal(own["model"][name], value), name
    moments = own["last_optimizer_state"]["state"]
    for index, state in expected["last_optimizer_state"]["state"].items():
        assert all(torch.equal(moments[index][key], value) for key, value in state.items())
    assert run.health() == squashed_run.health()


def test_a_schedule_of_widths(train: Callable, teacher: Path) -> None:
    """The second stage stands still: it ends with the weights it took over."""
    stages = "task.stages=[{precision: w4, updates: 8}, {precision: w1, updates: 2, lr: 1e-30}]"
    run = train("sqwq_w1", f"task.teacher={teacher}", *OPTIONS, stages)
    told = re.findall(r"num_updates=(\d+)", run.output)
    assert list(map(int, told)) == [*range(1, 9), 1, 2]
    assert run.output.count("squashed the weights of 12 modules") == 2
    first, last = (
        open_model(path).model
        for path in (run.checkpoints / "stage1_sqwq_w4" / "checkpoint_last.pt", run.last)
    )
    assert last.plan.precision.name == "sqwq_w1"
    before = torch.load(teacher, weights_only=False)["model"]
    state, handed_on = float_state(last), float_state(first)
    for layer in ("0.fc1", "1.self_attn.out_proj"):
        name = f"encoder.layers.{layer}.weight"
        error = (state[name] - handed_on[name]).abs().median()
        assert error < 1e-6 < (handed_on[name] - before[name]).abs().median()


def test_masked_prediction_trains_squashed_weights_in_bf16(train: Callable, teacher: Path) -> None:
    run = train(
        "hubert_fastconv",
        "quant=sqwq_w4",
        f"task.init_from={teacher}",
        "common.bf16=true",
        "criterion.squash_weight=2.0",
        "optimization.lr=[0.0005]",
        f"+lr_scheduler.end_learning_rate={END / 10}",
    )
    squash = run.logged("loss_squash")
    assert len(squash) == 5
    sums = [
        sum(values)
        for values in zip(
            squash,
            *(run.logged(f"loss_{name}") for name in ("masked", "unmasked", "features")),
            strict=True,
        )
    ]
    assert run.logged("loss") == pytest.approx(sums, abs=3e-4)
    # What is saved is not what the model computes with, but the fp32 weights the optimizer moves.
    state = run.state()
    squashed, gain = (
        state["model"][f"encoder.layers.0.fc1.weight{name}"] for name in ("", "_quantizer.log_gain")
    )
    assert not torch.equal(squashed, squashed.bfloat16().float())
    assert not torch.equal(gain, gain.bfloat16().float())
    assert squashed.std().item() == pytest.approx(0.5, abs=0.05)  # its squash_std
    groups = state["last_optimizer_state"]["param_groups"]
    assert [len(group["params"]) for group in groups[1:]] == [12, 12]
    assert [group["lr"] for group in groups] == pytest.approx([END / 10, END / 10, 3 * END / 10])


def test_rules_quantize_what_the_names_leave_float(train: Callable, teacher: Path) -> None:
    rules = [
        {"match": "feature_extractor.*", "weight_bits": 8, "activation_bits": 8},
        {"match": "encoder.pos_conv.0", "method": "squashed", "weight_bits": 4},
        {"match": "post_extract_proj", "method": "minmax", "weight_bits": 8, "activation_bits": 8},
        {"match": "final_proj", "weight_bits": 4, "activation_bits": 8},
        {"match": "*.fc1", "method": "stretched", "granularity": "per_group", "group_size": 16},
        {"match": "*.fc2", "method": "absmax", "granularity": "per_channel"},
    ]
    run = train(
        "bitla_w2a2",
        f"task.teacher={teacher}",
        f"model.precision.rules=[{','.join(as_override(rule) for rule in rules)}]",
        "task.calibration.criterion=percentile",
        "task.calibration.percentile=99",
        "optimization.max_update=10",
        "optimization.lr=[0.002]",
    )
    losses = run.logged("loss")
    assert sum(losses[-3:]) < sum(losses[:3])
    model = open_model(run.last).model
    stored = [vars(rule) for rule in model.plan.precision.rules]
    assert [{k: v for k, v in rule.items() if v is not None} for rule in stored] == rules
    plan = json.loads((run.checkpoints / "precision_plan.json").read_text())
    assert model.plan.to_mapping() == plan
    methods = {e.module: (e.method, e.weight_bits, e.activation_bits) for e in model.plan.entries}
    assert methods["feature_extractor.conv_layers.0.0"] == ("elastic", 8, 8)
    assert methods["encoder.pos_conv.0"] == ("squashed", 4, 8)
    assert methods["final_proj"] == ("elastic", 4, 8)
    assert methods["encoder.layers.1.fc1"] == ("stretched", 2, 2)
    fc1 = model.encoder.layers[0].fc1
    assert fc1.weight_quantizer.log_scale.shape == (fc1.weight.numel() // 16, 1)
    before = torch.load(teacher, weights_only=False)["model"]
    for name in ("feature_extractor.conv_layers.3.0.weight", "final_proj.weight"):
        assert not torch.equal(model.state_dict()[name], before[name]), name
    measured = {entry["name"] for entry in run.health()[-1]["quantizers"]}
    assert measured == {name for name, _ in quantizers(model)}


def as_override(rule: dict) -> str:
    values = (f"{key}: '{v}'" if key == "match" else f"{key}: {v}" for key, v in rule.items())
    return "{" + ",".join(values) + "}"


def test_an_unknown_calibration_criterion_gets_one_message(
    trainer, teacher: Path, tmp_path: Path
) -> None:
    options = (f"task.teacher={teacher}", "task.calibration.criterion=max")
    message = trainer.fork(tmp_path / "run", "sqwq_w2", *options).message()
    assert "criterion 'max'; allowed are mse, absmax, percentile" in message
