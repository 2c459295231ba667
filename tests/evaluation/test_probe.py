"""The word probe, on features that are easy, impossible, and a model's own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.evaluation.probe import SEEDS, pooled, word_probe
from fairseq_lowbit.evaluation.utterances import layer_outputs, read_batches
from fairseq_lowbit.models import Hubert

WORDS = ("one", "two", "three")


def features(rng: np.random.Generator, count: int, apart: float) -> tuple[np.ndarray, list[str]]:
    """Two layers of 6 features around a centre per word; in the second layer all are noise."""
    words = [WORDS[index % 3] for index in range(count)]
    centres = apart * np.eye(3, 6)[[WORDS.index(word) for word in words]]
    noise = rng.standard_normal((2, count, 6))
    return noise + np.stack([centres, np.zeros_like(centres)]), words


def test_separable_words_and_noise() -> None:
    rng = np.random.default_rng(0)
    probe = word_probe(features(rng, 90, apart=12), features(rng, 60, apart=12))
    assert probe.mean[0] == 1.0
    assert probe.std[0] == 0.0
    assert probe.mean[1] < 0.55


def test_seeds_spread_where_words_overlap() -> None:
    rng = np.random.default_rng(0)
    train, test = features(rng, 30, apart=1.5), features(rng, 60, apart=1.5)
    probe = word_probe(train, test)
    assert 0.4 < probe.mean[0] < 1.0
    assert probe.std[0] > 0
    assert len(SEEDS) == 3
    assert word_probe(train, test) == probe


def test_scale_and_offset_of_features_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    (train, words), (test, answers) = features(rng, 60, apart=3), features(rng, 60, apart=3)
    stretch, offset = 10.0 ** np.arange(-3, 3), 1000 * np.arange(6)
    plain = word_probe((train, words), (test, answers))
    other = word_probe((train * stretch + offset, words), (test * stretch + offset, answers))
    assert other.mean == pytest.approx(plain.mean)


def test_pooling_leaves_padding_out(model: Hubert, data: Path) -> None:
    manifest = read_manifest(data / "words_test.tsv")
    together = list(read_batches(manifest, [4, 0, 9]))
    values, lines = pooled(model, together)
    assert values.shape == (2, 3, model.shape.encoder_embed_dim)
    assert sorted(lines) == [0, 4, 9]
    for column, line in enumerate(lines):
        (alone,) = read_batches(manifest, [line])
        outputs, valid = layer_outputs(model, alone)
        assert valid.all()
        expected = torch.stack([output[0].mean(0) for output in outputs])
        np.testing.assert_allclose(values[:, column], expected, atol=1e-4)
