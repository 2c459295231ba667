"""Masked-frame accuracy, with models whose answers are known."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.data.label_file import LabelFile
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.evaluation.masked import masked_accuracy
from fairseq_lowbit.evaluation.utterances import Utterances
from fairseq_lowbit.models import Hubert
from fairseq_lowbit.models.extractor import output_lengths


@pytest.fixture
def labels(data: Path) -> LabelFile:
    return LabelFile(data / "test.km", data / "dict.km.txt")


class Oracle(Hubert):
    """Answers with the embedding of a frame's label, or of another one."""

    def __init__(self, teacher: Hubert, batch: Utterances, labels: LabelFile, wrong: bool) -> None:
        super().__init__(teacher.shape)
        self.final_proj = nn.Identity()
        self.masks: list[Tensor] = []
        frames = int(output_lengths(batch.lengths, self.conv_layers).max())
        self.answers = torch.zeros(len(batch.lines), frames, teacher.shape.final_dim)
        for row, line in zip(self.answers, batch.lines, strict=True):
            numbers = torch.from_numpy(labels[line])
            row[: len(numbers)] = teacher.label_embs_concat[numbers - int(wrong)]

    def hidden_states(
        self, waveform: Tensor, lengths: Tensor, mask: Tensor
    ) -> tuple[list[Tensor], None]:
        self.masks.append(mask)
        return [self.answers], None


def test_an_oracle_is_always_right(
    model: Hubert, batches: list[Utterances], labels: LabelFile
) -> None:
    oracle = Oracle(model, batches[0], labels, wrong=False)
    assert masked_accuracy(oracle, model, batches, labels).accuracy == 1.0
    liar = Oracle(model, batches[0], labels, wrong=True)
    assert masked_accuracy(liar, model, batches, labels).accuracy == 0.0


def test_a_model_with_label_embeddings_answers_with_its_own(
    model: Hubert, batches: list[Utterances], labels: LabelFile
) -> None:
    oracle = Oracle(model, batches[0], labels, wrong=False)
    oracle.label_embs_concat = nn.Parameter(-model.label_embs_concat)
    assert masked_accuracy(oracle, model, batches, labels).accuracy < 0.5
    # Those of other labels than the teacher's answer nothing.
    oracle.label_embs_concat = nn.Parameter(-model.label_embs_concat[:-1])
    assert masked_accuracy(oracle, model, batches, labels).accuracy == 1.0


def test_every_model_sees_the_same_masks(
    model: Hubert, batches: list[Utterances], labels: LabelFile
) -> None:
    oracle = Oracle(model, batches[0], labels, wrong=False)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        masked_accuracy(oracle, model, batches, labels)
        assert torch.equal(torch.get_rng_state(), before)
    first, second = oracle.masks
    assert torch.equal(first, second)
    valid = output_lengths(batches[0].lengths, model.conv_layers)
    share = first.sum(1) / valid
    assert ((share > 0.3) & (share < 0.95)).all()


def test_chance_is_the_most_frequent_label(
    model: Hubert, batches: list[Utterances], labels: LabelFile
) -> None:
    result = masked_accuracy(model, model, batches, labels)
    assert 1 / 3 <= result.chance < 0.6
    assert 0 <= result.accuracy < 0.8
    labels.path.write_text(labels.path.read_text().replace("1", "0").replace("2", "0"))
    same = LabelFile(labels.path, labels.path.with_name("dict.km.txt"))
    assert masked_accuracy(model, model, batches, same).chance == 1.0


def test_labels_that_end_early(model: Hubert, batches: list[Utterances], labels: LabelFile) -> None:
    """Features of another front-end may have one frame less; a file may have no labels at all."""
    lines = labels.path.read_text().splitlines()
    lines = [" ".join(line.split()[:-2]) for line in lines[:-1]] + [""]
    labels.path.write_text("\n".join(lines) + "\n")
    shorter = LabelFile(labels.path, labels.path.with_name("dict.km.txt"))
    oracle = Oracle(model, batches[0], shorter, wrong=False)
    assert masked_accuracy(oracle, model, batches, shorter).accuracy == 1.0


def test_labels_that_go_on(model: Hubert, batches: list[Utterances], labels: LabelFile) -> None:
    oracle = Oracle(model, batches[0], labels, wrong=False)
    lines = labels.path.read_text().splitlines()
    labels.path.write_text("".join(f"{line} 0 0 0\n" for line in lines))
    longer = LabelFile(labels.path, labels.path.with_name("dict.km.txt"))
    assert masked_accuracy(oracle, model, batches, longer).accuracy == 1.0


def test_no_labels_at_all(model: Hubert, batches: list[Utterances], labels: LabelFile) -> None:
    labels.path.write_text("\n" * len(labels))
    empty = LabelFile(labels.path, labels.path.with_name("dict.km.txt"))
    with pytest.raises(LowbitError, match=r"test\.km has no label"):
        masked_accuracy(model, model, batches, empty)
