import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.distillation import attention_error, distill, feature_error, same_front_end
from fairseq_lowbit.models import Architecture, Hubert
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision, Rule
from tests.shapes import TINY

SHAPE = replace(
    TINY,
    conv_feature_layers="[(8,10,5),(12,2,2)]",
    encoder_layers=3,
    dropout=0.0,
    attention_dropout=0.0,
)
LENGTHS = [300, 217, 100]
QUANTIZED_FRONT_END = Rule("feature_extractor.*", weight_bits=4, activation_bits=4)


def waveforms() -> Tensor:
    return torch.randn(3, 300, generator=torch.Generator().manual_seed(0))


def build(seed: int = 0, shape: Architecture = SHAPE) -> Hubert:
    torch.manual_seed(seed)
    model = Hubert(shape)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "pos_conv" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def student_of(teacher: Hubert, *rules: Rule) -> Hubert:
    student = Hubert(teacher.shape, precision=Precision("bitla_w2a2", list(rules)))
    student.load_state_dict(teacher.state_dict(), strict=False)
    calibrate(student, [waveforms()], lambda x: student.hidden_states(x))
    return student.train()


@pytest.mark.parametrize("attention", ["probabilities", "scores"])
def test_identical_models_differ_in_nothing(attention: str) -> None:
    teacher = build()
    terms, frames = distill(
        teacher,
        copy.deepcopy(teacher),
        waveforms(),
        torch.tensor(LENGTHS),
        attention=attention,
        front_end=True,
    )
    assert [term.item() for term in terms] == [0.0, 0.0, 0.0, 0.0]
    assert frames.item() == sum((n - 15) // 10 + 1 for n in LENGTHS)


@pytest.mark.parametrize("shape", ["post_norm", "pre_norm"])
def test_terms_are_those_of_two_separate_forwards(shape: str) -> None:
    shape = Architecture(**{**SHAPE.__dict__, "layer_norm_first": shape == "pre_norm"})
    teacher, student = build(0, shape), build(1, shape)
    student.feature_extractor.load_state_dict(teacher.feature_extractor.state_dict())
    lengths = torch.tensor(LENGTHS)
    terms, _ = distill(teacher, student, waveforms(), lengths)
    mask = teacher.extract(waveforms(), lengths).padding_mask
    outputs, maps, finals = [], [], []
    for model in (student, teacher):
        frames = model.project(model.extract(waveforms(), lengths))
        final, layers = model.encoder(frames.x, frames.padding_mask)
        finals.append(model.final_proj(final))
        outputs.append(layers)
        begin = model.encoder.begin(frames.x, frames.padding_mask)
        inputs = [begin, *layers[:-1]]
        maps.append(
            [
                layer(x, mask, "probabilities").attention
                for layer, x in zip(model.encoder.layers, inputs)
            ]
        )
    torch.testing.assert_close(terms.final, feature_error(*finals, ~mask))
    by_layer = [feature_error(own, other, ~mask) for own, other in zip(*outputs)]
    torch.testing.assert_close(terms.layers, torch.stack(by_layer).mean())
    by_map = [attention_error(own, other, ~mask) for own, other in zip(*maps)]
    torch.testing.assert_close(terms.attention, torch.stack(by_map).mean())


@pytest.mark.parametrize("attention", ["probabilities", "scores"])
def test_padded_batch_is_the_mean_over_valid_frames_of_its_utterances(attention: str) -> None:
    teacher, student = build(0), build(1)
    student.feature_extractor.load_state_dict(teacher.feature_extractor.state_dict())
    waveform = waveforms()
    with torch.no_grad():
        terms, count = distill(
            teacher, student, waveform, torch.tensor(LENGTHS), attention=attention, front_end=True
        )
        alone = [
            distill(
                teacher,
                student,
                waveform[row : row + 1, :samples],
                attention=attention,
                front_end=True,
            )
            for row, samples in enumerate(LENGTHS)
        ]
    assert count == sum(frames for _, frames in alone)
    for index, term in enumerate(terms):
        mean = sum(own[index] * frames for own, frames in alone) / count
        torch.testing.assert_close(term, mean, rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_student_and_never_the_teacher() -> None:
    teacher = build()
    student = student_of(teacher)
    lengths = torch.tensor(LENGTHS)
    terms, _ = distill(teacher, student, waveforms(), lengths, shared_front_end=True)
    computed = [term for term in terms if term is not None]
    assert len(computed) == 3
    assert all(term > 0 for term in computed)
    sum(computed).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    missing = {name for name, p in student.named_parameters() if p.grad is None}
    front_end = {n for n, _ in student.named_parameters() if n.startswith("feature_extractor.")}
    assert missing == {"mask_emb"} | front_end


def test_the_front_end_term_reaches_the_front_end_alone() -> None:
    teacher, student = build(0), build(1)
    terms, _ = distill(teacher, student, waveforms(), torch.tensor(LENGTHS), front_end=True)
    terms.front_end.backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None}
    assert {name for name in reached if name.startswith("feature_extractor.")}
    assert not {name for name in reached if name.startswith("encoder.layers.")}


def test_each_term_has_a_gradient_of_its_own() -> None:
    teacher = build()
    student = student_of(teacher)
    for name in ("final", "layers", "attention"):
        student.zero_grad()
        terms, _ = distill(teacher, student, waveforms())
        getattr(terms, name).backward()
        assert student.encoder.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0, name


def test_maps_that_nobody_compares_are_not_computed() -> None:
    teacher = build()
    student = student_of(teacher).eval()
    whole, frames = distill(teacher, student, waveforms(), torch.tensor(LENGTHS))
    maps: list[Tensor | None] = []
    for layer in (*teacher.encoder.layers, *student.encoder.layers):
        layer.register_forward_hook(lambda *io: maps.append(io[2].attention))
    terms, own_frames = distill(
        teacher, student, waveforms(), torch.tensor(LENGTHS), attention=None
    )
    assert maps == [None] * 6
    assert terms.attention is None
    assert own_frames == frames
    # The teacher's attention is fused now, which rounds otherwise.
    torch.testing.assert_close(terms[:2], whole[:2], rtol=1e-3, atol=1e-6)


def test_without_layers_the_other_terms_stay_as_they_are() -> None:
    teacher = build()
    student = student_of(teacher).eval()
    whole, _ = distill(teacher, student, waveforms())
    terms, _ = distill(teacher, student, waveforms(), layers=False)
    assert terms.layers is None
    assert torch.equal(terms.final, whole.final)
    assert torch.equal(terms.attention, whole.attention)
    terms.final.backward()
    assert {n for n, p in student.named_parameters() if p.grad is None} == {"mask_emb"}


@pytest.mark.parametrize("rules, calls", [([], (1, 0)), ([QUANTIZED_FRONT_END], (1, 1))])
def test_front_end_runs_once_when_it_is_the_same(rules: list, calls: tuple) -> None:
    teacher = build()
    student = student_of(teacher, *rules)
    seen: list[Hubert] = []
    for model in (teacher, student):
        model.feature_extractor.register_forward_hook(lambda *_, model=model: seen.append(model))
    shared = same_front_end(teacher, student)
    terms, _ = distill(teacher, student, waveforms(), shared_front_end=shared)
    assert (seen.count(teacher), seen.count(student)) == calls
    sum(term for term in terms if term is not None).backward()
    trained = student.feature_extractor.conv_layers[0]["0"].weight.grad is not None
    assert trained == bool(rules)


def test_front_ends_of_other_weights_are_not_shared() -> None:
    teacher = build()
    student = student_of(teacher)
    assert same_front_end(teacher, student)
    with torch.no_grad():
        student.feature_extractor.conv_layers[0]["0"].weight.mul_(2)
    assert not same_front_end(teacher, student)


def test_a_quantized_teachers_front_end_is_not_shared() -> None:
    teacher = student_of(build(), QUANTIZED_FRONT_END)
    assert not same_front_end(teacher, student_of(teacher))


def test_mask_is_shared_by_both() -> None:
    teacher = build()
    twin = copy.deepcopy(teacher)
    mask = torch.zeros(3, 29, dtype=torch.bool)
    mask[:, 5:15] = True
    lengths = torch.tensor(LENGTHS)
    assert distill(teacher, twin, waveforms(), lengths, mask)[0].layers == 0
    nn.init.zeros_(twin.mask_emb)
    assert distill(teacher, twin, waveforms(), lengths)[0].layers == 0
    assert distill(teacher, twin, waveforms(), lengths, mask)[0].layers > 0


def test_depths_must_agree() -> None:
    shallow = build(shape=Architecture(**{**SHAPE.__dict__, "encoder_layers": 2}))
    with pytest.raises(ValueError, match="zip"):
        distill(build(), shallow, waveforms())


def test_one_layer_of_teacher_maps_is_alive_at_a_time() -> None:
    teacher = build()
    student = student_of(teacher)
    maps: list[weakref.ref] = []
    alive: list[int] = []

    def count(*_) -> None:
        gc.collect()
        alive.append(sum(ref() is not None for ref in maps))

    for layer, own in zip(teacher.encoder.layers, student.encoder.layers, strict=True):
        layer.register_forward_hook(lambda *io: maps.append(weakref.ref(io[2].attention)))
        own.register_forward_hook(count)
    distill(teacher, student, waveforms())
    assert alive == [1, 1, 1]
