"""Heads on frozen features: a softmax-weighted sum of layers and one linear map.

As SUPERB (arXiv:2105.01051) has it: the model is frozen, each hidden state has one learned weight,
and the head is small.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLANK = 0
# Frames that a head for sequences sees at once: itself and a neighbour on either side.
_CONTEXT = 3
# Adam's first learning rate, which falls to zero linearly.
_LEARNING_RATE = {True: 2e-2, False: 1e-2}
# A head for sequences has many weights and little to learn from: without decay it learns voices.
_WEIGHT_DECAY = {True: 1.0, False: 0.0}
_UPDATES = {True: 150, False: 250}


class Head(nn.Module):
    """A weighted sum of layers, the weights equal at first, and a linear map of it.

    Args:
        shape: of a frame's features, (layers, dim).
        outputs: units or labels to choose among.
        seed: of the first values.
        is_sequence: a choice for every frame, by a convolution over a few; else one for all.
    """

    def __init__(self, shape: tuple[int, int], outputs: int, seed: int, is_sequence: bool) -> None:
        super().__init__()
        layers, dim = shape
        self.is_sequence = is_sequence
        self.layer_logits = nn.Parameter(torch.zeros(layers))
        inputs = (dim, _CONTEXT) if is_sequence else (dim,)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(outputs, *inputs, generator=generator) / np.prod(inputs) ** 0.5
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(outputs))

    @property
    def layer_weights(self) -> Tensor:
        """[layers], which add up to 1."""
        return self.layer_logits.softmax(-1)

    def forward(self, states: Tensor) -> Tensor:
        """Log probabilities: [batch, layers, dim, frames] to [frames, batch, units] for sequences,
        [batch, layers, dim] to [batch, labels] otherwise."""
        x = torch.einsum("l,bl...->b...", self.layer_weights, states)
        if not self.is_sequence:
            return F.linear(x, self.weight, self.bias).log_softmax(-1)
        x = F.conv1d(x, self.weight, self.bias, padding=_CONTEXT // 2)
        return x.permute(2, 0, 1).log_softmax(-1)


def train(head: Head, losses: Iterator[Tensor]) -> None:
    """Takes a step of AdamW for each of the first of endless losses, which are computed as they
    are asked for."""
    parameters = [
        {"params": [head.layer_logits, head.bias], "weight_decay": 0.0},
        {"params": [head.weight], "weight_decay": _WEIGHT_DECAY[head.is_sequence]},
    ]
    optimizer = torch.optim.AdamW(parameters, _LEARNING_RATE[head.is_sequence])
    updates = _UPDATES[head.is_sequence]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    for loss in islice(losses, updates):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def drawn(examples: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """The numbers of the examples of each update, without end, [batch] or fewer: every one of them
    once, in a random order, then all again in another."""
    rng = np.random.default_rng(seed)
    order = np.array([], int)
    batch = min(batch, examples)
    while True:
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(examples)])
        yield order[:batch]
        order = order[batch:]
