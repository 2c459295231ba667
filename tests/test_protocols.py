"""A model that is no HuBERT goes through distillation, health, agreement and profile."""

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fairseq_lowbit.distillation import distill, same_front_end
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.agreement import agreement, valid_frames
from fairseq_lowbit.evaluation.probing.features import frozen_features
from fairseq_lowbit.evaluation.utterances import Utterances
from fairseq_lowbit.models.protocols import Frames
from fairseq_lowbit.monitoring.health import measure_health
from fairseq_lowbit.nn import Linear, SelfAttention, attach, calibrate, quantizers
from fairseq_lowbit.nn.attention import AttentionMap
from fairseq_lowbit.precision import Precision, Role, Rule
from fairseq_lowbit.profiling import Profile, profile

WINDOW, DIM, HEADS = 16, 12, 2
LENGTHS = torch.tensor([800, 320])
FRONT_END = Rule("feature_extractor", method="elastic", weight_bits=4, activation_bits=4)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = SelfAttention(DIM, HEADS), Linear(DIM, DIM)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, need: AttentionMap | None = None
    ) -> tuple[Tensor, Tensor | None]:
        values, attention = self.attention(x, padding_mask, need)
        return x + self.linear(x + values), attention


class Windows(nn.Module):
    """Two layers over windows of the waveform; no positions, norms or final projection."""

    def __init__(self, precision: str = "float", *rules: Rule) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.feature_extractor = Linear(WINDOW, DIM, role=Role.FRONT_END)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.plan = attach(self, Precision(precision, list(rules)))

    def extract(self, waveform: Tensor, lengths: Tensor | None = None) -> Frames:
        x = self.feature_extractor(waveform.unfold(1, WINDOW, WINDOW))
        if lengths is None:
            return Frames(x, None)
        return Frames(x, torch.arange(x.shape[1]) >= lengths[:, None] // WINDOW)

    def begin(self, frames: Frames, mask: Tensor | None = None) -> Tensor:
        return frames.x if mask is None else frames.x.masked_fill(mask[..., None], 0)

    def hidden_states(
        self, waveform: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        frames = self.extract(waveform, lengths)
        x, outputs = self.begin(frames, mask), []
        for layer in self.layers:
            x, _ = layer(x, frames.padding_mask)
            outputs.append(x)
        return outputs, frames.padding_mask

    def representations(
        self, waveform: Tensor, lengths: Tensor | None = None
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        outputs, padding = self.hidden_states(waveform, lengths)
        return [self.begin(self.extract(waveform, lengths)), *outputs], padding

    def project_final(self, x: Tensor) -> Tensor:
        return x


def waveforms() -> Tensor:
    return torch.randn(2, 800, generator=torch.Generator().manual_seed(1))


def quantized(*rules: Rule) -> Windows:
    model = Windows("bitla_w2a4", *rules)
    calibrate(model, [waveforms()], model.hidden_states)
    return model


def profiled(model: Windows) -> Profile:
    return profile(model.eval(), "windows", 0.05, partial(model.hidden_states, waveforms()[:1]))


def test_distillation() -> None:
    teacher, student = Windows().requires_grad_(False), quantized()
    same, frames = distill(teacher, copy.deepcopy(teacher), waveforms(), LENGTHS)
    assert [term and term.item() for term in same] == [0.0, 0.0, 0.0, None]
    assert frames == int((LENGTHS // WINDOW).sum())
    terms, _ = distill(teacher, student, waveforms(), LENGTHS)
    (terms.final + terms.layers + terms.attention).backward()
    assert min(terms.final, terms.layers, terms.attention) > 0
    assert student.layers[0].attention.q_proj.weight.grad.abs().sum() > 0


def test_front_ends() -> None:
    assert same_front_end(Windows(), quantized())
    assert not same_front_end(Windows(), quantized(FRONT_END))


def test_health() -> None:
    model = quantized(FRONT_END)
    health = measure_health(model, waveforms())
    names = [name for name, _ in quantizers(model)]
    assert sorted(entry.name for entry in health.quantizers) == sorted(names)
    assert {entry.layer for entry in health.quantizers} == {None, 0, 1}
    assert len(health.centered_std) == 2
    again = measure_health(model, waveforms(), lambda batch: model.hidden_states(batch)[0])
    assert again == health


def test_health_of_a_model_without_layers() -> None:
    model = nn.Sequential(Linear(WINDOW, DIM), nn.ReLU(), Linear(DIM, DIM))
    attach(model, Precision("bitl_w2a4"))
    batch = waveforms().unfold(1, WINDOW, WINDOW)
    calibrate(model, [batch], model)
    health = measure_health(model, batch, lambda batch: [model(batch)])
    assert len(health.quantizers) == 4
    assert len(health.centered_std) == 1
    with pytest.raises(LowbitError, match="Sequential has no hidden_states: give forward="):
        measure_health(model, batch)


def test_agreement_and_pooled_features() -> None:
    batches = [Utterances([0, 1], waveforms(), LENGTHS)]
    teacher, student = (valid_frames(model, batches) for model in (Windows(), quantized()))
    assert [len(frames) for frames in student] == [int((LENGTHS // WINDOW).sum())] * 2
    assert agreement(teacher, teacher).cosine == pytest.approx((1.0, 1.0))
    assert max(agreement(student, teacher).cosine) < 1
    # Two frames of a window each are one.
    features = frozen_features(quantized(), batches)
    assert [values.shape for values in features.values()] == [(3, DIM, 25), (3, DIM, 10)]


def test_profile_counts_what_runs() -> None:
    model, counter = Windows().eval(), FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        x = model.begin(model.extract(waveforms()[:1]))
        for layer in model.layers:
            x, _ = layer(x, None, "probabilities")  # so that attention is products torch counts
    own = profiled(model)
    assert own.flops == counter.get_total_flops()
    assert own.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_profile_of_a_quantized_model() -> None:
    model = quantized()
    own = profiled(model)
    assert own.storage_bytes == pytest.approx(model.plan.bytes)
    front_end = 2 * WINDOW * DIM * 50
    assert own.flops == front_end
    assert own.quantops == 4 * (profiled(Windows()).flops - front_end)


def test_what_is_called_twice_counts_twice_and_what_is_not_only_stored() -> None:
    model = Windows()
    once = profiled(model)
    model.layers = nn.ModuleList([model.layers[0], model.layers[0]])
    twice = {cost.module: cost for cost in profiled(model).costs}
    for cost in once.costs:
        if cost.module.startswith("layers.0."):
            assert twice[cost.module].operations == 2 * cost.operations
            assert twice[cost.module].activation_bytes == cost.activation_bytes
    idle = profile(Windows(), "windows", 0.05, lambda: None)
    assert idle.flops == 0
    assert idle.storage_bytes == once.storage_bytes


def test_a_model_that_does_not_state_its_calls_has_to_be_run() -> None:
    with pytest.raises(LowbitError, match=r"Windows does not state .*: give run"):
        profile(Windows(), "windows")
