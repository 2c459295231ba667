import copy
from dataclasses import asdict, fields

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lowbit.models import Architecture, Hubert
from fairseq_lowbit.models.extractor import output_lengths
from fairseq_lowbit.models.model import cosine_logits
from fairseq_lowbit.nn import calibrate, quantizers
from fairseq_lowbit.precision import Precision, Rule
from tests.shapes import TINY

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

POST_NORM = TINY
PRE_NORM = Architecture(
    **{
        **asdict(POST_NORM),
        "layer_norm_first": True,
        "extractor_mode": "layer_norm",
        "conv_bias": True,
        "conv_pos": 7,
        "final_dim": 0,
    }
)
SHAPES = pytest.mark.parametrize("shape", [POST_NORM, PRE_NORM], ids=["post_norm", "pre_norm"])
LENGTHS = [900, 641, 300]
CLASSES = 11
ALL_BITS = [
    Rule(match, weight_bits=2, activation_bits=2)
    for match in ("feature_extractor.*", "post_extract_proj", "encoder.pos_conv.0", "final_proj")
]


def waveforms() -> Tensor:
    return torch.randn(3, 900, generator=torch.Generator().manual_seed(0)) + 0.3


def build(shape: Architecture, precision: str = "float", classes: int = CLASSES) -> Hubert:
    torch.manual_seed(0)
    rules = [] if precision == "float" else ALL_BITS
    model = Hubert(shape, classes, Precision(precision, rules))
    for name, parameter in model.named_parameters():
        if "_quantizer." not in name:  # larger and less regular than a new model's
            nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    return model.eval()


def fairseq_twin(model: Hubert) -> nn.Module:
    from fairseq.data import Dictionary
    from fairseq.models.hubert.hubert import HubertConfig, HubertModel
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig

    known = {f.name for f in fields(HubertConfig)}
    values = {key: value for key, value in asdict(model.shape).items() if key in known}
    # fairseq pads odd lengths inside the encoder unless it is told not to.
    config = HubertConfig(**values, label_rate=50, required_seq_len_multiple=1)
    labels = Dictionary.__new__(Dictionary)
    labels.symbols = [str(i) for i in range(CLASSES)]
    twin = HubertModel(config, HubertPretrainingConfig(sample_rate=16_000), [labels])
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.eval()


@SHAPES
def test_equals_fairseqs_model_from_the_same_state(shape: Architecture) -> None:
    model = build(shape)
    twin = fairseq_twin(model)
    assert set(model.state_dict()) == set(twin.state_dict())
    assert {"mask_emb", "label_embs_concat"} < set(model.state_dict())
    waveform = waveforms()
    with torch.no_grad():
        expected, _ = twin.extract_features(waveform)
        frames = model.project(model.extract(waveform))
        actual, outputs = model.encoder(frames.x, frames.padding_mask)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        for layer, output in enumerate(outputs, 1):
            theirs, _ = twin.extract_features(waveform, output_layer=layer)
            torch.testing.assert_close(output, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            model.final_proj(actual), twin.final_proj(expected), rtol=1e-4, atol=1e-4
        )


@SHAPES
def test_padding_fairseq_equals_fairseqs_model_on_a_padded_batch(shape: Architecture) -> None:
    model = build(Architecture(**{**asdict(shape), "padding": "fairseq"}))
    twin = fairseq_twin(model)
    waveform, samples = waveforms(), torch.tensor(LENGTHS)
    padded = torch.arange(900) >= samples[:, None]
    waveform = waveform.masked_fill(padded, 0.0)
    with torch.no_grad():
        frames = model.project(model.extract(waveform, samples))
        actual, _ = model.encoder(frames.x, frames.padding_mask)
        # fairseq counts a frame with any valid sample; here both go by the convolutions.
        mask = frames.padding_mask
        twin.forward_padding_mask = lambda *_: mask
        expected, _ = twin.extract_features(waveform, padding_mask=padded)
    torch.testing.assert_close(actual[~mask], expected[~mask], rtol=1e-4, atol=1e-4)


def test_label_loss_equals_fairseqs_contrastive_loss() -> None:
    model = build(POST_NORM)
    twin = fairseq_twin(model)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    target = torch.arange(20) % CLASSES
    projected = twin.final_proj(x)
    embeddings = twin.label_embs_concat
    negatives = embeddings.unsqueeze(1).expand(-1, len(x), -1)
    theirs = twin.compute_nce(projected, embeddings[target], negatives)
    expected = F.cross_entropy(theirs, torch.zeros(20, dtype=torch.long))
    actual = F.cross_entropy(model.label_logits(x), target)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_logits_are_cosines_over_the_temperature_in_fp32() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, -2.0]]).bfloat16()
    logits = cosine_logits(x, torch.tensor([[5.0, 0.0], [1.0, 1.0]]), 0.1)
    root = 10 / 2**0.5
    torch.testing.assert_close(logits, torch.tensor([[10.0, root], [0.0, -root]]))


@SHAPES
@pytest.mark.parametrize("precision", ["float", "bitla_w2a2"])
def test_shapes_along_the_way(shape: Architecture, precision: str) -> None:
    model = build(shape, precision)
    calibrate(model, [waveforms()], model.final_output)
    outputs, mask = model.hidden_states(waveforms(), torch.tensor(LENGTHS))
    frames = output_lengths(torch.tensor(LENGTHS), model.conv_layers)
    assert [tuple(output.shape) for output in outputs] == [(3, int(frames.max()), 16)] * 2
    assert (~mask).sum(1).tolist() == frames.tolist()
    assert model.final_proj(outputs[-1]).shape[-1] == (shape.final_dim or 16)
    assert model.label_logits(outputs[-1]).shape[-1] == CLASSES


@SHAPES
def test_float_model_gives_the_same_alone_and_in_a_padded_batch(shape: Architecture) -> None:
    model, waveform = build(shape), waveforms()
    with torch.no_grad():
        outputs, mask = model.hidden_states(waveform, torch.tensor(LENGTHS))
        for row, samples in enumerate(LENGTHS):
            alone, _ = model.hidden_states(waveform[row : row + 1, :samples])
            for own, batch in zip(alone, outputs, strict=True):
                valid = batch[row][~mask[row]]
                torch.testing.assert_close(valid, own[0], rtol=1e-5, atol=1e-5)


def test_codes_of_the_front_end_are_the_same_alone_and_in_a_padded_batch() -> None:
    model, waveform = build(POST_NORM, "bitla_w2a2"), waveforms()
    calibrate(model, [waveform], model.final_output)
    for _, quantizer in quantizers(model):
        if quantizer.relative_shift is not None:  # thresholds as they may look after training
            nn.init.normal_(quantizer.relative_shift, std=0.1)
    quantizer = model.post_extract_proj.input_quantizer
    batch = model.extract(waveform, torch.tensor(LENGTHS))
    for row, samples in enumerate(LENGTHS):
        alone = model.layer_norm(model.extract(waveform[row : row + 1, :samples]).x)[0]
        together = model.layer_norm(batch.x)[row][~batch.padding_mask[row]]
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        assert torch.equal(quantizer.codes(together).integers, quantizer.codes(alone).integers)


@pytest.mark.parametrize("precision", ["bitla_w8a8", "sqwq_w8", "absmax_w8a8", "minmax_w8a8"])
def test_quantized_model_gives_the_same_alone_and_in_a_padded_batch(precision: str) -> None:
    # Many levels: a rounding that crosses a threshold moves the output by a small step only.
    model, waveform = build(POST_NORM, precision), waveforms()
    calibrate(model, [waveform], model.final_output)
    for _, quantizer in quantizers(model):
        if getattr(quantizer, "relative_shift", None) is not None:
            nn.init.constant_(quantizer.relative_shift, -0.02)
    with torch.no_grad():
        outputs, mask = model.hidden_states(waveform, torch.tensor(LENGTHS))
        for row, samples in enumerate(LENGTHS):
            alone, _ = model.hidden_states(waveform[row : row + 1, :samples])
            difference = (outputs[-1][row][~mask[row]] - alone[-1][0]).abs()
            assert difference.median() < 1e-5
            assert difference.max() < 0.1


def test_mask_embedding_replaces_masked_frames_only() -> None:
    model = build(POST_NORM)
    frames = model.extract(waveforms())
    mask = torch.zeros(frames.x.shape[:2], dtype=torch.bool)
    mask[0, 3:6] = True
    plain, masked = model.project(frames).x, model.project(frames, mask).x
    assert torch.equal(masked[mask], model.mask_emb.expand(3, -1))
    assert torch.equal(masked[~mask], plain[~mask])


@pytest.mark.parametrize("precision", ["float", "bitla_w1a1", "sqwq_w2"])
def test_deep_copy_is_independent_and_equal(precision: str) -> None:
    model = build(POST_NORM, precision)
    calibrate(model, [waveforms()], model.final_output)
    twin = copy.deepcopy(model)
    before = model.hidden_states(waveforms())[0][-1]
    assert torch.equal(twin.hidden_states(waveforms())[0][-1], before)
    nn.init.zeros_(twin.encoder.layers[0].fc1.weight)
    assert torch.equal(model.hidden_states(waveforms())[0][-1], before)


def test_quantizers_add_keys_below_their_operator() -> None:
    plain = set(build(POST_NORM).state_dict())
    quantized = set(build(POST_NORM, "bitla_w1a1").state_dict())
    assert plain < quantized
    assert all("_quantizer." in key for key in quantized - plain)


def test_one_bit_model_trains() -> None:
    model = build(POST_NORM, "bitla_w1a1").train()
    calibrate(model, [waveforms()], model.final_output)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    target = torch.randn(16, generator=torch.Generator().manual_seed(1))
    losses = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.encoder.layerdrop = 0.0
    for _ in range(15):
        loss = (model.hidden_states(waveforms())[0][-1] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_layerdrop_skips_layers_in_training_only() -> None:
    model = build(Architecture(**{**asdict(POST_NORM), "encoder_layerdrop": 0.5}))
    assert len(model.hidden_states(waveforms())[0]) == 2
    model.train()
    torch.manual_seed(0)
    assert {len(model.hidden_states(waveforms())[0]) for _ in range(20)} == {0, 1, 2}


def test_steps_of_the_encoder_are_its_forward() -> None:
    for shape in (POST_NORM, PRE_NORM):
        model = build(shape)
        frames = model.project(model.extract(waveforms(), torch.tensor(LENGTHS)))
        x = model.encoder.begin(frames.x, frames.padding_mask)
        for layer in model.encoder.layers:
            x = layer(x, frames.padding_mask).x
        expected, outputs = model.encoder(frames.x, frames.padding_mask)
        assert torch.equal(model.encoder.end(x), expected)
        assert torch.equal(outputs[-1], x)


def test_new_linears_are_drawn_as_hubert_draws_them() -> None:
    torch.manual_seed(0)
    model = Hubert(Architecture(encoder_layers=1))
    for module in (model.encoder.layers[0].fc1, model.encoder.layers[0].self_attn.q_proj):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert (module.bias == 0).all()
