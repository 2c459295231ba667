"""Training heads on the frozen features of one model, and counting their errors."""

from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fairseq_lowbit.evaluation.probing.data import ProbeData, TaskData
from fairseq_lowbit.evaluation.probing.features import (
    Features,
    Standard,
    Upstream,
    frozen_features,
    joined,
)
from fairseq_lowbit.evaluation.probing.heads import BLANK, Head, drawn, train
from fairseq_lowbit.evaluation.probing.result import Probe
from fairseq_lowbit.evaluation.probing.tasks import LETTERS, Task

SEEDS = 3
# Recordings in a batch.
_BATCH_SEQUENCES, _BATCH_LABELS = 48, 64
# Updates before CTC, and frames at either end that are silent in them, 0.1 s.
_EVEN_UPDATES, _SILENT_FRAMES = 25, 2
_IGNORED = -100


def measure_probes(model: Upstream, data: ProbeData, seeds: int = SEEDS) -> dict[str, Probe]:
    """The error rates of heads on a frozen model, by the key of their measure.

    Equal arguments give equal results on a CPU.

    Args:
        seeds: heads for each task, with other first values and another order of the recordings.
    """
    # Commands measure in inference mode, whose tensors cannot be trained on.
    with torch.inference_mode(False):
        features = frozen_features(model, data.batches)
        with torch.enable_grad():
            return {
                key: probe
                for task in data.tasks
                for key, probe in _measure_task(task, features, seeds).items()
            }


def _measure_task(data: TaskData, features: Features, seeds: int) -> dict[str, Probe]:
    fit = _fit_sequences if data.task.is_sequence else _fit_labels
    fitted = [fit(data, features, seed) for seed in range(seeds)]
    layer_weights = np.mean([weights for weights, _ in fitted], axis=0)
    groups = tuple(example.group for example in data.test)
    probes = {}
    for measure, split in zip(data.task.measures, _scored(data.task), strict=True):
        targets = [split(example.target) for example in data.test]
        sizes = tuple(map(len, targets))
        errors = np.array(
            [
                [Levenshtein.distance(split(a), t) for a, t in zip(answers, targets, strict=True)]
                for _, answers in fitted
            ]
        )
        probes[measure.key] = Probe(
            errors=tuple(errors.mean(0).tolist()),
            sizes=sizes,
            groups=groups,
            seed_rates=tuple((errors.sum(1) / sum(sizes)).tolist()),
            layer_weights=tuple(layer_weights.tolist()),
        )
    return probes


def _units_of(task: Task) -> Callable[[str], list[str]]:
    """From a target to the units that a head tells."""
    if task == LETTERS:
        return list
    return str.split if task.is_sequence else lambda label: [label]


def _scored(task: Task) -> list[Callable[[str], list[str]]]:
    """From a target to what errors are counted among, for each measure."""
    return [_units_of(task), str.split] if task == LETTERS else [_units_of(task)]


def _fit_sequences(data: TaskData, features: Features, seed: int) -> tuple[list[float], list[str]]:
    """The layer weights and what the head says of each test recording."""
    units_of = _units_of(data.task)
    standard = Standard.of(torch.cat([features[e.recording] for e in data.train], -1))
    names = ["", *sorted({unit for example in data.train for unit in units_of(example.target)})]
    number = {name: index for index, name in enumerate(names)}
    rows = [standard(features[example.recording]) for example in data.train]
    targets = [
        torch.tensor([number[unit] for unit in units_of(example.target)]) for example in data.train
    ]
    head = Head(standard.mean.shape[:2], len(names), seed, is_sequence=True)
    head.to(standard.mean.device)

    def losses() -> Iterator[Tensor]:
        for update, chosen in enumerate(drawn(len(rows), _BATCH_SEQUENCES, seed)):
            loss = _even_loss if update < _EVEN_UPDATES else _ctc_loss
            scores = head(joined([rows[index] for index in chosen]))[:, 0]
            frames = [rows[index].shape[-1] for index in chosen]
            each = scores.split([count + 1 for count in frames])
            yield loss(pad_sequence(each), frames, [targets[index] for index in chosen])

    train(head, losses())
    joint = " " if units_of is str.split else ""
    answers = []
    with torch.no_grad():
        for example in data.test:
            states = standard(features[example.recording])[None]
            best = head(states)[:, 0].argmax(-1).tolist()
            answers.append(joint.join(names[unit] for unit, _ in groupby(best) if unit != BLANK))
    return head.layer_weights.tolist(), answers


def _even_loss(scores: Tensor, frames: list[int], targets: list[Tensor]) -> Tensor:
    """Cross entropy of a frame, if the units of a recording took equal shares of it, with silence
    at either end.

    CTC from a random start ends in another local optimum with every seed; behind this, they differ
    less.

    Args:
        scores: log probabilities, [frames, recordings, units].
        frames: valid ones of each recording.
    """
    labels = torch.full(scores.shape[:2], _IGNORED)
    for column, count, target in zip(labels.T, frames, targets, strict=True):
        edge = min(_SILENT_FRAMES, max(0, count - len(target)) // 2)
        shares = torch.arange(count - 2 * edge) * len(target) // (count - 2 * edge)
        column[:count] = F.pad(target[shares], (edge, edge), value=BLANK)
    return F.nll_loss(
        scores.flatten(0, 1), labels.flatten().to(scores.device), ignore_index=_IGNORED
    )


def _ctc_loss(scores: Tensor, frames: list[int], targets: list[Tensor]) -> Tensor:
    """CTC's loss for a unit; a target that is too long for its frames counts nothing."""
    sizes = torch.tensor([len(target) for target in targets])
    units = torch.cat(targets).to(scores.device)
    loss = F.ctc_loss(scores, units, torch.tensor(frames), sizes, BLANK, "sum", zero_infinity=True)
    return loss / len(units)


def _fit_labels(data: TaskData, features: Features, seed: int) -> tuple[list[float], list[str]]:
    """The layer weights and the label that the head gives to each test recording."""
    known, unseen = (
        torch.stack([features[example.recording].mean(-1) for example in examples], -1)
        for examples in (data.train, data.test)
    )
    names = sorted({example.target for example in data.train})
    labels = torch.tensor([names.index(example.target) for example in data.train])
    standard = Standard.of(known)
    states = standard(known).movedim(-1, 0)
    labels = labels.to(states.device)
    head = Head(known.shape[:2], len(names), seed, is_sequence=False).to(states.device)
    train(
        head,
        (
            F.nll_loss(head(states[chosen]), labels[chosen])
            for chosen in drawn(len(states), _BATCH_LABELS, seed)
        ),
    )
    with torch.no_grad():
        best = head(standard(unseen).movedim(-1, 0)).argmax(-1).tolist()
    return head.layer_weights.tolist(), [names[label] for label in best]
