from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.nn import Linear, attach, calibrate, is_calibrated, quantizers, sites
from fairseq_lowbit.precision import Precision, Rule
from fairseq_lowbit.quantization import ElasticQuantizer, signed
from fairseq_lowbit.quantization.calibration import fit_scale
from tests.shapes import TINY

OUTSIDE = ("feature_extractor.*", "post_extract_proj", "encoder.pos_conv.0", "final_proj")
EVERYTHING = [Rule(match, weight_bits=2, activation_bits=2) for match in OUTSIDE]


def build(*rules: Rule, name: str = "bitla_w2a2") -> Hubert:
    torch.manual_seed(0)
    model = Hubert(TINY, precision=Precision(name, [*EVERYTHING, *rules]))
    for parameter in (p for p in model.parameters() if p.dim() == 2):
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def waveform(batch: int = 2, samples: int = 700) -> Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(1))


def run(model: Hubert) -> Tensor:
    frames = model.project(model.extract(waveform()))
    x, _ = model.encoder(frames.x, frames.padding_mask)
    return model.final_proj(x)


@pytest.fixture(scope="module")
def calibrated() -> Hubert:
    model = build()
    calibrate(model, [waveform()], lambda x: run(model))
    return model


def planned_sides() -> list[tuple[str, str]]:
    with torch.device("meta"):
        places = sites(Hubert(TINY))
    weights = [(site.name, "weight_bits") for site in places if site.kind != "operand"]
    return weights + [(site.name, "activation_bits") for site in places]


def test_sites_are_all_weighted_operators_and_operands() -> None:
    names = [name for name, side in planned_sides() if side == "activation_bits"]
    layer = ["self_attn.query", "self_attn.key", "self_attn.value", "self_attn.probabilities"]
    layer += [f"self_attn.{p}_proj" for p in "kvq"] + ["self_attn.out_proj", "fc1", "fc2"]
    expected = [f"feature_extractor.conv_layers.{i}.0" for i in range(3)]
    expected += ["post_extract_proj", "encoder.pos_conv.0"]
    expected += [f"encoder.layers.{i}.{part}" for i in range(2) for part in layer] + ["final_proj"]
    assert names == expected


def test_no_parameter_is_missed_by_the_plan() -> None:
    model = build()
    own = sum(p.numel() for n, p in model.named_parameters() if "_quantizer." not in n)
    assert model.plan.parameters == own


def test_every_quantizer_is_called_once_per_forward(calibrated: Hubert) -> None:
    calls: Counter[str] = Counter()
    handles = [
        quantizer.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, quantizer in quantizers(calibrated)
    ]
    run(calibrated)
    for handle in handles:
        handle.remove()
    # 5 weighted modules outside the layers; per layer 6 weights, 4 inputs and 4 operands.
    assert len(calls) == 2 * 6 + 2 * (6 + 4 + 4)
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("module, side", planned_sides())
def test_changing_the_bits_of_one_site_changes_the_output(
    module: str, side: str, calibrated: Hubert
) -> None:
    changed = build(Rule(module, **{"weight_bits": 2, "activation_bits": 2, side: 4}))
    changed.load_state_dict(calibrated.state_dict(), strict=False)
    for _, quantizer in quantizers(changed):
        if not quantizer.is_calibrated:  # q, k, v no longer share their input's quantizer
            quantizer.set_scale(torch.tensor(0.5))
    bits = Counter(q.levels.bits for _, q in quantizers(changed))
    assert bits[4] == 1
    assert not torch.equal(run(changed), run(calibrated))


def test_same_bits_give_the_same_output(calibrated: Hubert) -> None:
    again = build(Rule("*.fc1", weight_bits=2, activation_bits=2))
    again.load_state_dict(calibrated.state_dict())
    assert torch.equal(run(again), run(calibrated))


def test_level_sets_follow_the_contract() -> None:
    model = build()
    sets = {name: q.levels.name for name, q in quantizers(model)}
    non_negative = {name for name, kind in sets.items() if kind == "non_negative"}
    expected = {f"feature_extractor.conv_layers.{i}.0.input_quantizer" for i in (1, 2)}
    for i in range(2):
        expected |= {f"encoder.layers.{i}.fc2.input_quantizer"}
        expected |= {f"encoder.layers.{i}.self_attn.probabilities_quantizer"}
    assert non_negative == expected
    assert {kind for name, kind in sets.items() if name not in non_negative} == {"signed"}
    with_origin = {name for name, q in quantizers(model) if q.levels.origin}
    assert with_origin == {name for name in non_negative if "probabilities" not in name}
    one_bit = {q.levels.name for _, q in quantizers(Hubert(TINY, precision=Precision("bitl_w1a1")))}
    assert one_bit == {"sign", "non_negative"}


def test_scales_per_frame_reach_the_quantizers_that_the_rule_names() -> None:
    rules = [
        Rule("encoder.layers.*_proj", activation_granularity="per_frame"),
        Rule("encoder.layers.1.fc1", activation_granularity="per_frame"),
    ]
    model = build(*rules, name="bitla_w1a1")
    found = {name for name, q in quantizers(model) if getattr(q, "is_per_frame", False)}
    expected = {f"encoder.layers.{n}.self_attn.input_quantizer" for n in range(2)}
    expected |= {f"encoder.layers.{n}.self_attn.out_proj.input_quantizer" for n in range(2)}
    assert found == expected | {"encoder.layers.1.fc1.input_quantizer"}
    calibrate(model, [waveform()], lambda x: run(model))
    assert run(model).isfinite().all()


def test_scales_shifts_and_gradient_values_follow_the_contract() -> None:
    model = build(Rule("*.fc1", granularity="per_channel"), name="bitla_w2a2")
    found = dict(quantizers(model))
    dim, inner, heads, reference = 16, 24, 2, 500
    layer = "encoder.layers.0"
    wanted = {
        f"{layer}.fc1.weight_quantizer": ((inner, 1), None, dim),
        f"{layer}.fc2.weight_quantizer": ((), None, inner * dim),
        f"{layer}.fc2.input_quantizer": ((), (), inner),
        f"{layer}.self_attn.input_quantizer": ((), (), dim),
        f"{layer}.self_attn.query_quantizer": ((), (dim,), dim),
        f"{layer}.self_attn.probabilities_quantizer": ((), (), heads * reference),
        "feature_extractor.conv_layers.0.0.input_quantizer": ((), (), 1),
        "feature_extractor.conv_layers.1.0.input_quantizer": ((), (), 8),
        "feature_extractor.conv_layers.1.0.weight_quantizer": ((), None, 8 * 8 * 3),
        "encoder.pos_conv.0.input_quantizer": ((), (), dim),
        "encoder.pos_conv.0.weight_quantizer": ((), None, dim * dim // 4 * 6),
    }
    for name, (scale, shift, values) in wanted.items():
        quantizer = found[name]
        assert tuple(quantizer.log_scale.shape) == scale, name
        assert (None if quantizer.shift is None else tuple(quantizer.shift.shape)) == shift, name
        expected = 1 / (values * quantizer.levels.gradient_divisor) ** 0.5
        assert quantizer.gradient_scale == pytest.approx(expected), name


def test_projections_share_one_input_quantizer_when_their_bits_agree() -> None:
    for attention in (layer.self_attn for layer in build().encoder.layers):
        assert attention.input_quantizer is not None
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert projection.input_quantizer is None
    apart = build(Rule("*.0.self_attn.v_proj", weight_bits=2, activation_bits=3)).encoder.layers
    assert apart[0].self_attn.input_quantizer is None
    assert [
        getattr(apart[0].self_attn, f"{p}_proj").input_quantizer.levels.bits for p in "qkv"
    ] == [2, 2, 3]
    assert apart[1].self_attn.input_quantizer is not None


def test_float_model_gets_no_quantizer_and_bit_identical_output() -> None:
    torch.manual_seed(0)
    model = Hubert(TINY).eval()
    before = run(model)
    assert list(quantizers(model)) == []
    assert is_calibrated(model)
    attach(model, Precision("float"))
    assert torch.equal(run(model), before)


def test_calibration_fits_weights_and_inputs() -> None:
    model = build()
    assert not is_calibrated(model)
    calibrate(model, [waveform(), waveform(3)], model_forward(model))
    assert is_calibrated(model)
    for name, quantizer in quantizers(model):
        assert quantizer.scale.item() != 1.0, name
    weight, quantizer = model.final_proj.weight, model.final_proj.weight_quantizer
    fitted = fit_scale(weight.flatten()[None], quantizer.levels)[0].item()
    assert quantizer.scale.item() == pytest.approx(fitted)


def model_forward(model: Hubert):
    def forward(x: Tensor) -> Tensor:
        return model.final_proj(model.hidden_states(x)[0][-1])

    return forward


def test_calibration_repeats_itself_exactly() -> None:
    states = []
    for _ in range(2):
        model = build()
        calibrate(model, [waveform(), waveform(3)], model_forward(model))
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_later_quantizers_are_calibrated_on_quantized_inputs() -> None:
    model = nn.ModuleDict({"a": Linear(4, 4), "b": Linear(4, 4)})
    for operator in model.values():
        operator.input_quantizer = ElasticQuantizer(signed(1), 4, shift_shape=())
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    calibrate(model, [x], lambda x: model["b"](model["a"](x)))
    behind = model["a"](x)
    expected = behind.abs().mean().item()
    assert model["b"].input_quantizer.scale.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_calibration_runs_in_eval_mode_and_restores_the_mode(training: bool) -> None:
    model = build().train(training)
    seen = []

    def forward(x: Tensor) -> None:
        seen.append(any(m.training for m in model.modules()))
        run(model)

    calibrate(model, [waveform()], forward)
    assert seen == [False]
    assert all(m.training == training for m in model.modules())


def test_calibration_restores_the_mode_after_a_failure() -> None:
    model = build().train()

    def fail(x: Tensor) -> None:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        calibrate(model, [waveform()], fail)
    assert model.training
    assert not is_calibrated(model)


def test_calibration_names_a_quantizer_it_never_reached() -> None:
    model = build()
    calibrate(model, [waveform()], lambda x: run(model))
    # Neither a fresh nor an earlier calibration hides what this one missed.
    for _ in range(2):
        with pytest.raises(LowbitError, match=r"never calls final_proj.*_quantizer"):
            calibrate(model, [waveform()], model.hidden_states)


def test_calibration_builds_no_graph_and_leaves_weights_alone() -> None:
    model = build()
    before = {n: p.clone() for n, p in model.named_parameters() if "_quantizer." not in n}
    calibrate(model, [waveform()], lambda x: run(model))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        if name in before:
            assert torch.equal(parameter, before[name])


def test_training_step_reaches_every_parameter_of_every_quantizer(calibrated: Hubert) -> None:
    model = build()
    model.load_state_dict(calibrated.state_dict())
    run(model).square().sum().backward()
    for name, quantizer in quantizers(model):
        for parameter in quantizer.parameters():
            assert parameter.grad.abs().sum() > 0, name
    for name, parameter in model.named_parameters():
        if name != "mask_emb":
            assert torch.isfinite(parameter.grad).all(), name


def test_whole_forward_and_backward_never_wait_for_the_device() -> None:
    with FakeTensorMode():
        model = Hubert(TINY, precision=Precision("bitla_w1a1", EVERYTHING)).eval()
        for _, quantizer in quantizers(model):
            quantizer.set_scale(torch.tensor(0.5))
        frames = model.project(model.extract(torch.randn(2, 700), torch.tensor([700, 500])))
        x, _ = model.encoder(frames.x, frames.padding_mask)
        model.final_proj(x).square().sum().backward()
        assert model.final_proj.weight.grad.shape == (8, 16)


@pytest.mark.parametrize(
    "name, rules",
    [
        ("bitla_w1a1", ()),
        ("bitl_w2a2", (Rule("*.fc1", granularity="per_channel"),)),
        ("sqwq_w4", ()),
        # Three projections of one attention, of which one reads other bits than the others.
        ("bitla_w1a1", (Rule("*.0.self_attn.k_proj", activation_bits=4),)),
        ("bitla_w1a1", (Rule("*.0.self_attn.v_proj", method="stretched", weight_bits=2),)),
        ("bitl_w2a2", (Rule("*.self_attn.q_proj", method="absmax"),)),
    ],
)
def test_the_plan_stores_what_the_state_dict_holds(name: str, rules: tuple[Rule, ...]) -> None:
    model = Hubert(TINY, classes=5, precision=Precision(name, list(rules)))
    bits = {f"{entry.module}.weight": entry.weight_bits for entry in model.plan.entries}
    total = 0.0
    for key, tensor in model.state_dict().items():
        if key == "label_embs_concat" or key.endswith((".calibrated", ".origin")):
            continue
        is_scalar = "_quantizer." in key and tensor.numel() == 1
        total += tensor.numel() * (32 if is_scalar else bits.get(key, 16)) / 8
    if rules and rules[0].method == "absmax":
        total += 4 * TINY.encoder_layers  # a scale computed from the weight
    assert model.plan.bytes == total


def test_label_embeddings_are_no_part_of_the_stored_model() -> None:
    own, labelled = (Hubert(TINY, classes, Precision("bitl_w1a1")).plan for classes in (0, 500))
    assert (own.bytes, own.parameters) == (labelled.bytes, labelled.parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bitla_w8a8", "bitl_w1a1", "sqwq_w8", "absmax_w4a4"])
def test_codes_of_a_half_precision_model_are_those_of_its_stored_weights(
    name: str, dtype: torch.dtype
) -> None:
    """What is trained in bf16 is what the checkpoint, which holds fp32 weights, stands for."""
    rule = Rule("encoder.pos_conv.0", method="elastic", weight_bits=8, activation_bits=8)
    model = Hubert(TINY, precision=Precision(name, [rule])).eval()
    calibrate(model, [torch.randn(1, 800)], model.final_output)
    operators = {n: m for n, m in model.named_modules() if getattr(m, "weight_quantizer", None)}
    stored = {n: m.weight_quantizer.codes(m.stored_weight()) for n, m in operators.items()}
    model.to(dtype)
    seen = {}
    for n, module in operators.items():
        module.weight_quantizer.register_forward_hook(
            lambda quantizer, inputs, output, n=n: seen.update(
                {n: (quantizer.codes(inputs[0]), output)}
            )
        )
    model.final_output(torch.randn(1, 800, dtype=dtype))
    assert sorted(seen) == sorted(operators)
    for n, (codes, decoded) in seen.items():
        assert torch.equal(codes.integers, stored[n].integers), n
        assert torch.equal(decoded, codes.decode().to(dtype)), n
        assert decoded.dtype == dtype


def test_a_model_attached_again_is_what_a_new_one_would_be() -> None:
    """Also where a site goes back to float, and where q, k and v share a quantizer no more."""
    rules = [Rule("encoder.layers.0.fc1", method="none"), Rule("*.q_proj", activation_bits=2)]
    model = Hubert(TINY, precision=Precision("bitla_w4a4"))
    new = Precision("bitla_w8a8", rules)
    model.plan = attach(model, new)
    fresh = Hubert(TINY, precision=new)
    assert model.plan == fresh.plan
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert str(model) == str(fresh)
    attach(model, Precision())
    assert not list(quantizers(model))


def test_attaching_again_gives_the_float_weights_of_squashed_ones_back() -> None:
    model = build(name="sqwq_w8")
    before = model.encoder.layers[0].fc1.weight.detach().clone()
    calibrate(model, [waveform()], model_forward(model))
    squashed = model.encoder.layers[0].fc1.weight
    assert not torch.allclose(squashed, before, atol=0.1)
    attach(model, Precision("float"))
    weight = model.encoder.layers[0].fc1.weight
    assert weight is squashed
    # What squashing clipped is gone.
    assert (weight - before).abs().mean() < 1e-2 * before.abs().mean()
    assert not hasattr(weight, "param_group")


def test_a_refused_precision_changes_nothing() -> None:
    model = build()
    before = repr(model)
    with pytest.raises(LowbitError, match="1 bit of the waveform"):
        attach(model, Precision("float", [Rule("*.0.0", "absmax", 4, 1)]))
    assert repr(model) == before
