"""Quantizing any torch model in place."""

import copy
import logging
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fairseq_lowbit
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.nn import is_calibrated, quantizers, squashed_weights
from fairseq_lowbit.nn.operators import Conv1d, Linear, Operator, WeightNormConv1d
from fairseq_lowbit.nn.swap import register_operator
from fairseq_lowbit.precision import Precision, Role, Rule
from tests.shapes import TINY


class Tagger(nn.Module):
    """Words to labels, with every kind of module that has a weight and a quantized form."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2, padding_mode="reflect")
        self.old_norm = nn.utils.weight_norm(nn.Conv1d(8, 8, 3, padding=1), dim=2)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1), dim=2)
        self.hidden = nn.Linear(8, 12)
        self.head = nn.Linear(12, 3, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words).transpose(1, 2)
        x = self.norm(self.old_norm(self.conv(x)))
        return self.head(self.hidden(x.transpose(1, 2)).relu())


EVERYTHING = [
    {"match": "*", "weight_bits": 8, "activation_bits": 8},
    {"match": "embed", "weight_bits": 8},
]

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@pytest.fixture
def model() -> Tagger:
    torch.manual_seed(0)
    return Tagger().eval()


def words() -> Tensor:
    return torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))


def test_keys_parameters_and_outputs_stay(model: Tagger) -> None:
    names = list(model.state_dict())
    parameters = dict(model.named_parameters())
    before = model(words())
    model.conv.train()
    model.hidden.register_forward_hook(lambda module, args, output: output + 1)
    hooked = model(words())
    assert not torch.equal(hooked, before)

    assert fairseq_lowbit.quantize(model, "float") is model
    assert list(model.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.conv.training
    assert not model.hidden.training
    torch.testing.assert_close(model(words()), hooked, rtol=0, atol=1e-5)
    assert isinstance(model.hidden, nn.Linear)


def test_a_name_reaches_every_linear_and_rules_the_rest(model: Tagger) -> None:
    fairseq_lowbit.quantize(model, "bitl_w4a4")
    assert [e.module for e in model.plan.entries if e.is_quantized] == ["hidden", "head"]
    fairseq_lowbit.quantize(model, "bitl_w4a4", EVERYTHING)
    bits = {e.module: (e.weight_bits, e.activation_bits) for e in model.plan.entries}
    assert bits.pop("embed") == (8, 16)
    assert set(bits) == {"conv", "old_norm", "norm", "hidden", "head"}
    assert set(bits.values()) == {(8, 8)}
    parameters = sum(p.numel() for n, p in model.named_parameters() if "_quantizer." not in n)
    assert model.plan.parameters == parameters


def test_every_planned_quantizer_is_called_and_eight_bits_are_close(model: Tagger) -> None:
    before = model(words())
    fairseq_lowbit.quantize(model, "float", EVERYTHING)
    fairseq_lowbit.calibrate(model, [words()])
    calls = calls_of_quantizers(model, lambda: model(words()))
    planned = sum((e.weight_bits < 16) + (e.activation_bits < 16) for e in model.plan.entries)
    assert len(calls) == planned == 11
    assert set(calls.values()) == {1}
    error = (model(words()) - before).square().mean() / before.square().mean()
    assert 0 < error < 1e-2


def calls_of_quantizers(model: nn.Module, run) -> Counter[str]:
    calls: Counter[str] = Counter()
    handles = [
        quantizer.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, quantizer in quantizers(model)
    ]
    run()
    for handle in handles:
        handle.remove()
    assert set(calls) == {name for name, _ in quantizers(model)}
    return calls


def test_gradients_reach_every_parameter(model: Tagger) -> None:
    fairseq_lowbit.quantize(model.train(), "float", EVERYTHING)
    fairseq_lowbit.calibrate(model, [words()])
    model(words()).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_copies_and_state_dicts_carry_everything(model: Tagger) -> None:
    fairseq_lowbit.quantize(model, "sqwq_w4", EVERYTHING)
    fairseq_lowbit.calibrate(model, [words()])
    expected = model(words())
    assert torch.equal(copy.deepcopy(model)(words()), expected)
    fresh = fairseq_lowbit.quantize(Tagger().eval(), "sqwq_w4", EVERYTHING)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(words()), expected)


def test_codes_of_a_swapped_operator_decode_to_the_weight_it_uses(model: Tagger) -> None:
    fairseq_lowbit.quantize(model, "float", EVERYTHING)
    fairseq_lowbit.calibrate(model, [words()])
    operators = [module for module in model.modules() if isinstance(module, Operator)]
    assert len(operators) == 6
    for operator in operators:
        weight = operator.stored_weight()
        codes = operator.weight_quantizer.codes(weight)
        assert torch.equal(codes.decode(), operator.weight_quantizer(weight))


def test_calibration_takes_keywords_and_a_forward_of_ones_own(model: Tagger) -> None:
    for batch, forward in (
        (words(), None),
        ({"words": words()}, None),
        ([words()], lambda b: model(*b)),
    ):
        fairseq_lowbit.quantize(model, "bitl_w4a4")
        fairseq_lowbit.calibrate(model, [batch], forward)
        model(words())


def test_zero_frames_stay_zero_before_a_weight_normed_convolution(model: Tagger) -> None:
    fairseq_lowbit.quantize(
        model, "float", [{"match": "norm", "weight_bits": 4, "activation_bits": 4}]
    )
    assert isinstance(model.norm, WeightNormConv1d)
    model.norm.weight_quantizer.set_scale(torch.tensor(0.1))
    model.norm.input_quantizer.set_scale(torch.tensor(0.5), torch.tensor(0.4))
    x = torch.randn(1, 8, 6)
    padded = torch.cat((x, torch.zeros(1, 8, 3)), -1)
    torch.testing.assert_close(model.norm(padded)[..., :6], model.norm(x))


def test_the_model_may_be_one_operator_itself() -> None:
    linear = fairseq_lowbit.quantize(nn.Linear(4, 4), "bitl_w4a4")
    assert type(linear) is Linear
    assert linear.weight_quantizer is not None


def test_quantizing_again_gives_what_a_fresh_model_gets(model: Tagger) -> None:
    again = fairseq_lowbit.quantize(model, "bitl_w4a4", EVERYTHING)
    again = fairseq_lowbit.quantize(again, "absmax_w8a8")
    fresh = fairseq_lowbit.quantize(Tagger(), "absmax_w8a8")
    assert again.plan == fresh.plan
    assert repr(again) == repr(fresh)
    assert list(again.state_dict()) == list(fresh.state_dict())


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(indices)))


def test_a_tied_weight_reached_by_one_of_its_names_is_refused() -> None:
    model = TiedModel()
    with pytest.raises(LowbitError, match="embed and head share one weight"):
        fairseq_lowbit.quantize(model, "bitl_w4a4")
    assert_untouched(model)
    fairseq_lowbit.quantize(model, "bitl_w4a4", [Rule("head", method="none")])
    assert [e.module for e in model.plan.entries if e.is_quantized] == ["hidden"]


def test_a_tied_weight_stays_tied_and_has_one_quantizer() -> None:
    model = TiedModel()
    rules = [Rule("embed", weight_bits=4), Rule("head", weight_bits=4, activation_bits=4)]
    fairseq_lowbit.quantize(model, "bitl_w4a4", rules)
    assert model.head.weight is model.embed.weight
    assert model.head.weight_quantizer is model.embed.weight_quantizer
    fairseq_lowbit.calibrate(model, [words()])
    model(words())
    parameters = sum(p.numel() for n, p in model.named_parameters() if "_quantizer." not in n)
    assert model.plan.parameters == parameters
    table, _, head = model.plan.entries
    assert table.bytes == 11 * 8 * 4 / 8 + 4
    assert head.bytes == 4 + 4  # its input's scale and shift
    copied = copy.deepcopy(model)
    assert copied.head.weight is copied.embed.weight
    assert copied.head.weight_quantizer is copied.embed.weight_quantizer


def test_a_weight_that_an_unknown_module_uses_too_is_refused() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "other": nn.Bilinear(4, 4, 4)})
    model["other"].weight = model["linear"].weight
    with pytest.raises(
        LowbitError, match="the weight of linear is other.weight too, in a Bilinear"
    ):
        fairseq_lowbit.quantize(model, "bitl_w4a4")
    assert_untouched(model)


def assert_untouched(model: nn.Module) -> None:
    assert not any(isinstance(module, Operator) for module in model.modules())
    assert not any("quantizer" in name for m in model.modules() for name in vars(m))
    assert not hasattr(model, "plan")


def mixed() -> nn.Module:
    return nn.ModuleDict(
        {"linear": nn.Linear(4, 4), "image": nn.Conv2d(1, 1, 3), "cell": nn.LSTM(4, 4)}
    )


@pytest.mark.parametrize(
    "make, precision, rules, message",
    [
        (lambda: nn.Conv2d(1, 1, 3), "bitl_w4a4", [], "Conv2d has nothing to quantize: .* Linear"),
        (
            lambda: nn.Sequential(nn.Conv1d(1, 1, 3)),
            "bitl_w4a4",
            [],
            "'bitl_w4a4' reaches no encoder linear: this model has none",
        ),
        (mixed, "bitl_w4a4", [Rule("image", "elastic", 4, 4)], r"reaches image.*\(Conv2d\)"),
        (
            mixed,
            "bitl_w4a4",
            [Rule("c*", "elastic", 4, 4)],
            r"reaches cell.*\(LSTM\).*Linear, Conv1d",
        ),
        (mixed, "bitl_w4a4", [Rule("nothing")], "'nothing' matches no module"),
        (mixed, "bitl_w4a4", [{"match": "linear", "bits": 4}], "unexpected keyword .*'bits'"),
        (mixed, "bitl_w4a4", "linear", "rules is a list of rules"),
        (mixed, "w4", [], "unknown precision 'w4'"),
        (mixed, "bitl_w4a4", [Rule("linear", "none")], r"quantizes nothing.*image \(Conv2d\)"),
        (Tagger, "float", [Rule("embed", activation_bits=4)], "gives no weight_bits for embed"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(make, precision, rules, message) -> None:
    model = make()
    with pytest.raises(LowbitError, match=message):
        fairseq_lowbit.quantize(model, precision, rules)
    assert_untouched(model)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(LowbitError, match="takes a torch module, not a dict"):
        fairseq_lowbit.quantize({}, "bitl_w4a4")


def test_a_refusal_keeps_an_old_weight_norm_working() -> None:
    model = Tagger().eval()
    before = model(words())
    with pytest.raises(LowbitError, match="matches no module"):
        fairseq_lowbit.quantize(model, "bitl_w4a4", [Rule("nothing")])
    with torch.no_grad():
        model.old_norm.weight_g.mul_(2)
    assert not torch.equal(model(words()), before)


def test_unknown_weights_stay_float_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = fairseq_lowbit.quantize(mixed(), "bitl_w4a4")
    assert "image (Conv2d), cell (LSTM)" in caplog.text
    assert type(model["image"]) is nn.Conv2d
    # A broad rule may except them.
    rules = [
        Rule("*", weight_bits=4, activation_bits=4),
        Rule("image", "none"),
        Rule("cell", "none"),
    ]
    fairseq_lowbit.quantize(mixed(), "float", rules)


def test_a_replaced_forward_or_weight_is_not_bypassed() -> None:
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    pruned = prune.identity(nn.Linear(4, 4), "weight")
    model = nn.ModuleDict({"patched": patched, "pruned": pruned, "plain": nn.Linear(4, 4)})
    for name, message in (("patched", "replaced the forward"), ("pruned", "computed, by pruning")):
        with pytest.raises(LowbitError, match=message):
            fairseq_lowbit.quantize(model, "bitl_w4a4", [Rule(name, "elastic", 4, 4)])
    fairseq_lowbit.quantize(model, "bitl_w4a4")
    assert [entry.module for entry in model.plan.entries] == ["plain"]


@pytest.mark.parametrize("is_padded", [False, True])
def test_fused_layers_of_torch_call_their_quantizers(is_padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    mask = torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]]) if is_padded else None

    def run() -> Tensor:
        with torch.no_grad():
            return model(x, src_key_padding_mask=mask)[:, :3]

    before = run()
    fairseq_lowbit.quantize(model, "float")
    torch.testing.assert_close(run(), before, rtol=0, atol=1e-5)
    fairseq_lowbit.quantize(model, "bitl_w8a8")
    # Its attention does not call its projections.
    assert [e.module.split(".")[-1] for e in model.plan.entries] == ["linear1", "linear2"] * 2
    fairseq_lowbit.calibrate(model, [x])
    assert not torch.equal(run(), before)
    calls_of_quantizers(model, run)


def test_other_types_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from fairseq_lowbit.nn import swap

    class Smoothing(nn.Conv1d):
        pass

    monkeypatch.setattr(swap, "_DEFAULT_PLACES", dict(swap._DEFAULT_PLACES))
    register_operator(Smoothing, Conv1d, Role.CONVOLUTION)
    model = fairseq_lowbit.quantize(
        nn.Sequential(Smoothing(1, 1, 3)),
        "float",
        [Rule("0", weight_bits=4, activation_bits=4)],
    )
    assert isinstance(model[0], Conv1d)


def test_quantizers_follow_the_device_and_keep_fp32() -> None:
    model = fairseq_lowbit.quantize(
        nn.Linear(4, 4, device="meta", dtype=torch.bfloat16), "bitl_w4a4"
    )
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {q.scale.dtype for _, q in quantizers(model)} == {torch.float32}


def test_a_model_in_half_precision_keeps_the_codes_of_its_fp32_weights(model: Tagger) -> None:
    fairseq_lowbit.quantize(model, "float", EVERYTHING)
    fairseq_lowbit.calibrate(model, [words()])
    operators = [module for module in model.modules() if isinstance(module, Operator)]
    stored = [o.weight_quantizer.codes(o.stored_weight()).integers for o in operators]
    model.bfloat16()
    assert model(words()).dtype == torch.bfloat16
    for operator, integers in zip(operators, stored, strict=True):
        assert torch.equal(
            operator.weight_quantizer.codes(operator.stored_weight()).integers, integers
        )


def test_handles_of_hooks_work_after_a_refusal(model: Tagger) -> None:
    handle = model.old_norm.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(LowbitError, match="matches no module"):
        fairseq_lowbit.quantize(model, "bitl_w4a4", [Rule("nothing")])
    handle.remove()
    assert len(model.old_norm._forward_pre_hooks) == 1  # its weight_norm
    assert list(model.embed.buffers()) == []


def test_a_hubert_of_ours_becomes_what_it_is_when_built_so() -> None:
    model = fairseq_lowbit.quantize(Hubert(TINY, precision=Precision("sqwq_w2")), "bitla_w4a4")
    built = Hubert(TINY, precision=Precision("bitla_w4a4"))
    assert model.plan == built.plan
    assert list(model.state_dict()) == list(built.state_dict())


def test_a_tied_squashed_weight_counts_once_and_comes_back_as_float() -> None:
    model = TiedModel()
    before = model.head.weight.detach().clone()
    fairseq_lowbit.quantize(model, "sqwq_w8", [Rule("embed", weight_bits=8)])
    fairseq_lowbit.calibrate(model, [words()])
    assert len(squashed_weights(model)) == 2  # hidden and the table
    fairseq_lowbit.quantize(model, "float")
    assert (model.head.weight - before).abs().mean() < 2e-2 * before.abs().mean()


class ReadsWeights(nn.Module):
    """Uses the weight of a module that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.called(x), self.read.weight)


@pytest.mark.parametrize("precision", ["bitl_w4a4", "bitl_w4a16", "absmax_w4a4", "sqwq_w4"])
def test_a_quantizer_that_is_never_called_is_found(precision: str) -> None:
    model = fairseq_lowbit.quantize(ReadsWeights(), precision)
    with pytest.raises(LowbitError, match=r"ReadsWeights never calls read\..*method none"):
        fairseq_lowbit.calibrate(model, [torch.randn(2, 4)])


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "no batch to calibrate on"),
        (torch.randn(2, 4), "a list of batches"),
        ({"input": torch.randn(2, 4)}, "a list of batches"),
    ],
)
def test_what_is_no_list_of_batches_is_refused(batches: object, message: str) -> None:
    model = fairseq_lowbit.quantize(nn.Sequential(nn.Linear(4, 4)), "bitl_w4a4")
    with pytest.raises(LowbitError, match=message):
        fairseq_lowbit.calibrate(model, batches)
    assert not is_calibrated(model)


def test_a_loader_that_yields_tuples_will_do() -> None:
    model = fairseq_lowbit.quantize(nn.Sequential(nn.Linear(4, 4)), "bitl_w4a4")
    fairseq_lowbit.calibrate(model, [(torch.randn(2, 4),)])
    assert is_calibrated(model)


@pytest.mark.parametrize("rules", ["per_channel", ["per_channel"], {"match": "0"}])
def test_rules_that_are_no_list_of_rules_are_refused(rules: object) -> None:
    with pytest.raises(LowbitError, match="rules is a list of rules, each a Rule or a mapping"):
        fairseq_lowbit.quantize(nn.Sequential(nn.Linear(4, 4)), "bitl_w4a4", rules)


@pytest.mark.parametrize("precision", ["bitl_w2a2", "sqwq_w2", "absmax_w4a4"])
def test_gradient_checkpointing(precision: str) -> None:
    """Which lets a saved tensor be read only once."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    fairseq_lowbit.quantize(model, precision)
    x = torch.randn(3, 6)
    fairseq_lowbit.calibrate(model, [x])
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    output = checkpoint(model, x, use_reentrant=False)
    found = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    for gradient, other in zip(found, expected, strict=True):
        assert torch.equal(gradient, other)
