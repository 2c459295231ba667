"""A frozen-feature word probe: how well a linear classifier reads words off one layer."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fairseq_lowbit.evaluation.utterances import Utterances, layer_outputs
from fairseq_lowbit.models.protocols import HiddenStates

SEEDS = (0, 1, 2)
_SHARE = 0.7


@dataclass(frozen=True)
class Probe:
    """Accuracy per layer 1..L on unseen voices: mean and standard deviation over the seeds, each of
    which trains on another random 70 % of the training words."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def pooled(model: HiddenStates, batches: Iterable[Utterances]) -> tuple[np.ndarray, list[int]]:
    """Mean over valid frames, [layers, utterances, dim], and the manifest lines."""
    rows: list[torch.Tensor] = []
    lines: list[int] = []
    for batch in batches:
        outputs, valid = layer_outputs(model, batch)
        weight = valid[..., None] / valid.sum(1)[:, None, None]
        rows.append(torch.stack([(output * weight).sum(1) for output in outputs]))
        lines += batch.lines
    return torch.cat(rows, 1).numpy(), lines


def word_probe(train: tuple[np.ndarray, list[str]], test: tuple[np.ndarray, list[str]]) -> Probe:
    """A ridge classifier on standardised features [layers, utterances, dim] and their words."""
    scores = np.array(
        [
            [_accuracy(x, np.array(train[1]), y, test[1], seed) for seed in SEEDS]
            for x, y in zip(train[0], test[0], strict=True)
        ]
    )
    return Probe(tuple(scores.mean(1).tolist()), tuple(scores.std(1).tolist()))


def _accuracy(
    features: np.ndarray, words: np.ndarray, unseen: np.ndarray, answers: list[str], seed: int
) -> float:
    count = int(_SHARE * len(words))
    chosen = np.random.default_rng(seed).permutation(len(words))[:count]
    classifier = make_pipeline(StandardScaler(), RidgeClassifier(alpha=10.0))
    classifier.fit(features[chosen], words[chosen])
    return float(classifier.score(unseen, answers))
