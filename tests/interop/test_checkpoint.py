import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_model, read_checkpoint, write_model
from fairseq_lowbit.models import Architecture, Hubert, LoadedModel, check_same_shapes, start_from
from fairseq_lowbit.nn import calibrate, is_calibrated, quantizers
from fairseq_lowbit.precision import Precision, Rule
from fairseq_lowbit.quantization import SquashedQuantizer
from tests.shapes import TINY

VERSION_0_1 = Path(__file__).resolve().parents[1] / "compatibility" / "v0_1"
SHAPE = replace(TINY, conv_feature_layers="[(8,10,5),(12,2,2)]", encoder_layers=1)


def build(
    precision: str | Precision = "float",
    classes: int = 5,
    seed: int = 0,
    shape: Architecture = SHAPE,
) -> Hubert:
    torch.manual_seed(seed)
    precision = precision if isinstance(precision, Precision) else Precision(precision)
    model = Hubert(shape, classes, precision)
    generator = torch.Generator().manual_seed(seed)
    calibrate(model, [torch.randn(2, 600, generator=generator)], model.final_output)
    return model


def state_of(model: Hubert, **changes: Any) -> dict[str, Any]:
    config = {**asdict(model.shape), "_name": "lowbit_hubert"}
    if any(True for _ in quantizers(model)):
        config["precision"] = model.plan.precision.to_mapping()
    state = {
        "args": None,
        "cfg": {"model": config, "task": {"normalize": True}},
        "model": model.state_dict(),
        "optimizer_history": [{"num_updates": 3}, {"num_updates": 70}],
    }
    return {**state, **changes}


def save(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def loaded(model: Hubert) -> LoadedModel:
    return LoadedModel(model, "teacher.pt", 0, True, False)


@pytest.mark.parametrize("precision", ["float", "bitla_w1a1", "sqwq_w2", "absmax_w4a8"])
def test_model_comes_back_at_its_own_shape_and_precision(tmp_path: Path, precision: str) -> None:
    model = build(precision)
    back = open_model(save(tmp_path / "c.pt", state_of(model)))
    assert back.model.shape == model.shape
    assert back.model.plan == model.plan
    assert (back.updates, back.has_final_projection, back.normalize) == (70, True, True)
    assert is_calibrated(back.model)
    assert not back.model.training
    waveform = torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    expected = model.eval().hidden_states(waveform)[0][-1]
    assert torch.equal(back.model.hidden_states(waveform)[0][-1], expected)


def test_checkpoint_without_final_projection_loads_and_says_so(tmp_path: Path) -> None:
    state = state_of(build(classes=0))
    for key in ("final_proj.weight", "final_proj.bias"):
        del state["model"][key]
    back = open_model(save(tmp_path / "c.pt", state))
    assert not back.has_final_projection
    assert not hasattr(back.model, "label_embs_concat")


def test_namespaces_of_old_checkpoints_are_plain_data(tmp_path: Path) -> None:
    state = state_of(build(), args=argparse.Namespace(arch="hubert"))
    assert read_checkpoint(save(tmp_path / "c.pt", state))["args"].arch == "hubert"


def test_a_model_without_training_is_told_apart(tmp_path: Path) -> None:
    source = open_model(save(tmp_path / "teacher.pt", state_of(build())))
    write_model(tmp_path / "ptq.pt", build("bitl_w2a2"), source, tmp_path)
    assert not source.is_calibrated_only
    assert open_model(tmp_path / "ptq.pt").is_calibrated_only
    # By a field of its own: whatever fairseq, or a converter, says of optimizers.
    state = torch.load(tmp_path / "ptq.pt", weights_only=True)
    for history in ([{"optimizer_name": "FairseqNAG"}], []):
        state["optimizer_history"] = history
        assert open_model(save(tmp_path / "ptq.pt", state)).is_calibrated_only
    unnamed = state_of(build(), optimizer_history=[{"optimizer_name": None, "num_updates": 3}])
    assert not open_model(save(tmp_path / "c.pt", unnamed)).is_calibrated_only


def test_a_teacher_of_a_hub_stays_an_id(tmp_path: Path) -> None:
    source = replace(loaded(build()), source="someone/hubert")
    write_model(tmp_path / "ptq.pt", build("bitl_w2a2"), source, tmp_path)
    assert read_checkpoint(tmp_path / "ptq.pt")["cfg"]["task"]["teacher"] == "someone/hubert"


def test_version_0_1_left_the_optimizers_name_empty() -> None:
    assert open_model(VERSION_0_1 / "calibrated.pt").is_calibrated_only
    assert not open_model(VERSION_0_1 / "hubert.pt").is_calibrated_only


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"nowhere\.pt does not exist"):
        read_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.99])
def test_truncated_file_is_named(tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "c.pt"
    torch.save(state_of(build()), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(LowbitError, match=r"c\.pt"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize(
    "content",
    [b"hello world\n", b"RIFF$\x00\x00\x00WAVEfmt ", b'{"model": 1}', b"PK\x03\x04", b"\x80\x02c"],
)
def test_other_kinds_of_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(LowbitError, match=r"c\.pt"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "state",
    [
        torch.zeros(3),
        [1, 2],
        {"state_dict": {}},
        {"model": {}, "cfg": None, "args": None},
        {"model": {}, "cfg": {"task": {}}},
        {"model": None, "cfg": {"model": {}}},
    ],
    ids=str,
)
def test_plain_data_that_is_no_checkpoint_is_refused(tmp_path: Path, state: object) -> None:
    with pytest.raises(LowbitError, match="not a fairseq checkpoint with cfg and model"):
        read_checkpoint(save(tmp_path / "c.pt", state))


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_and_never_run(tmp_path: Path, zipped: bool) -> None:
    target, path = tmp_path / "made", tmp_path / "c.pt"
    state = state_of(build(), extra=Malicious(target))
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(LowbitError, match=r"c\.pt cannot be read safely.*mkdir"):
        read_checkpoint(path)
    assert not target.exists()


def test_weights_of_another_shape_name_the_first_tensors(tmp_path: Path) -> None:
    state = state_of(build())
    state["model"]["encoder.layers.0.fc1.weight"] = torch.zeros(3, 16)
    del state["model"]["layer_norm.weight"]
    state["model"]["layer_norm.gain"] = torch.zeros(12)
    with pytest.raises(LowbitError, match=r"c\.pt holds weights of another shape") as error:
        open_model(save(tmp_path / "c.pt", state))
    message = str(error.value)
    assert "encoder.layers.0.fc1.weight is (3, 16) where (24, 16) is wanted" in message
    assert "layer_norm.weight is missing" in message
    assert "layer_norm.gain is unknown to the model" in message
    assert "model=" not in message  # nobody can give a checkpoint another architecture


def test_other_models_are_told_by_their_name(tmp_path: Path) -> None:
    state = {"cfg": {"model": {"_name": "transformer_lm", "activation_fn": "relu"}}, "model": {}}
    with pytest.raises(LowbitError, match="c.pt holds a transformer_lm, not a HuBERT"):
        open_model(save(tmp_path / "c.pt", state))


def test_a_folder_is_not_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"is a folder .*checkpoints/checkpoint_best\.pt"):
        read_checkpoint(tmp_path)


def test_long_lists_of_differences_are_cut() -> None:
    wide = build(shape=replace(SHAPE, encoder_ffn_embed_dim=32, final_dim=10))
    with pytest.raises(LowbitError) as error:
        check_same_shapes(build(), wide.state_dict(), "c.pt")
    # fc1 weight and bias, fc2 weight, final_proj weight and bias, label embeddings
    assert str(error.value).count(" is wanted") == 3
    assert "(and 3 more)" in str(error.value)


def test_starting_copies_weights_and_labels() -> None:
    source, model = build(seed=1), build(seed=2)
    start_from(model, loaded(source))
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_starting_leaves_quantizers_to_calibration() -> None:
    source = build("bitla_w8a8", seed=1)
    model = Hubert(SHAPE, 5, Precision("bitla_w1a1"))
    start_from(model, loaded(source))
    assert torch.equal(model.encoder.layers[0].fc1.weight, source.encoder.layers[0].fc1.weight)
    for name, quantizer in quantizers(model):
        assert not quantizer.is_calibrated, name
        assert (quantizer.log_scale == 0).all(), name


def test_starting_from_squashed_weights_takes_the_float_weights_they_stand_for() -> None:
    source = build("sqwq_w2", seed=1)
    plain = build(seed=1)
    model = Hubert(SHAPE, 5)
    start_from(model, loaded(source))
    for name, value in plain.state_dict().items():
        own = model.state_dict()[name]
        if ".fc" in name or "_proj.weight" in name:
            # Equal but for what squashing clipped: far from P, whose standard deviation is .84.
            assert (own - value).abs().median() < 1e-6, name
            assert own.std() < 0.4, name
        else:
            assert torch.equal(own, value), name
    operator, target = source.encoder.layers[0].fc1, model.encoder.layers[0].fc1.weight
    torch.testing.assert_close(target.detach(), operator.weight_quantizer.target(operator.weight))


def test_squashed_weights_go_on_at_another_width() -> None:
    """From the float weights they stand for: from decoded ones a wider step could not tell those
    on one level apart."""
    source, model = build("sqwq_w4", seed=1), Hubert(SHAPE, 5, Precision("sqwq_w2"))
    trained = source.encoder.layers[0].fc1
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        trained.weight.add_(0.3 * torch.randn(trained.weight.shape, generator=generator))
        trained.weight_quantizer.log_gain.add_(0.1)
    start_from(model, loaded(source))
    calibrate(model, [torch.randn(2, 600, generator=generator)], model.final_output)
    own = model.encoder.layers[0].fc1
    stood_for = trained.weight_quantizer.target(trained.weight)
    decoded = trained.weight_quantizer(trained.weight).detach()
    error = (own.weight_quantizer.target(own.weight) - stood_for).abs()
    assert error.median() < 1e-6 < 0.01 * (decoded - stood_for).abs().median()
    # The spread of every channel is the target again, which training had left.
    off = [(p.weight.std(1, correction=0) - 0.84).abs().max() for p in (own, trained)]
    assert off[0] < 1e-3 < 0.1 < off[1]


@pytest.mark.parametrize("precision", ["sqwq_w2", "sqwq_w8", "bitl_w2a2"])
def test_starting_makes_calibration_necessary_again(precision: str) -> None:
    """Scales belong to other weights, and squashed ones would be read as if they were squashed."""
    source, model = build(seed=1), build(precision, seed=2)
    assert is_calibrated(model)
    start_from(model, loaded(source))
    assert not is_calibrated(model)
    fresh = Hubert(SHAPE, 5, Precision(precision))
    start_from(fresh, loaded(source))
    batch = torch.randn(2, 600, generator=torch.Generator().manual_seed(3))
    for own in (model, fresh):
        calibrate(own, [batch], own.final_output)
    for name, value in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_squashed_weights_and_groups_come_back(tmp_path: Path) -> None:
    rules = [
        Rule("*.fc1", granularity="per_group", method="stretched", group_size=4),
        Rule("encoder.pos_conv.0", method="squashed", weight_bits=4),
        Rule("final_proj", method="minmax", weight_bits=8, activation_bits=8),
    ]
    model = build(Precision("sqwq_w2", rules))
    back = open_model(save(tmp_path / "c.pt", state_of(model))).model
    assert back.plan == model.plan
    assert back.plan.precision.rules == rules
    assert is_calibrated(back)
    assert isinstance(back.encoder.pos_conv[0].weight_quantizer, SquashedQuantizer)
    assert back.encoder.layers[0].fc1.weight_quantizer.log_scale.shape == (24 * 16 // 4, 1)
    waveform = torch.randn(1, 600, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back.final_output(waveform), model.eval().final_output(waveform))


def test_starting_takes_precisions_that_differ_in_either_direction() -> None:
    for source, model in (
        (build(), build("bitl_w1a1", seed=1)),
        (build("bitl_w1a1"), build(seed=1)),
    ):
        start_from(model, loaded(source))
        assert torch.equal(model.final_proj.weight, source.final_proj.weight)


@pytest.mark.parametrize("classes", [0, 7])
def test_labels_of_another_number_stay_the_models_own(classes: int) -> None:
    source, model = build(seed=1), build(classes=classes, seed=2)
    own = {n: p.clone() for n, p in model.named_parameters() if n == "label_embs_concat"}
    start_from(model, loaded(source))
    for value in own.values():
        assert torch.equal(model.label_embs_concat, value)
    assert torch.equal(model.final_proj.weight, source.final_proj.weight)


def test_source_without_labels_leaves_them_alone() -> None:
    model = build(seed=2)
    own = model.label_embs_concat.clone()
    start_from(model, loaded(build(classes=0, seed=1)))
    assert torch.equal(model.label_embs_concat, own)


def test_starting_from_another_shape_names_role_and_tensors() -> None:
    model = build(shape=replace(SHAPE, encoder_layers=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LowbitError, match=r"^teacher teacher\.pt is of another shape") as error:
        start_from(model, loaded(build(seed=1)), role="teacher")
    assert "encoder.layers.1.self_attn.k_proj.weight is missing" in str(error.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_starting_shares_no_memory_with_the_source() -> None:
    source, model = build(seed=1), build(seed=2)
    start_from(model, loaded(source))
    nn.init.zeros_(source.final_proj.weight)
    assert model.final_proj.weight.abs().sum() > 0
