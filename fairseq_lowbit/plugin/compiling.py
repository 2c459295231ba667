"""Layers of an encoder compiled by ``torch.compile``, where there is a compiler."""

import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)

# Graphs of one layer: with and without padding, in training and evaluation, of a single utterance
# or several, with and without attention maps. torch gives up after 8.
_GRAPHS = 64


def compile_layers(*models: nn.Module) -> bool:
    """Has the ``layers`` of models run as compiled code, from their next call on. State, names and
    hooks of the layers themselves stay; inner modules and their hooks are no longer called, except
    inside of :func:`fairseq_lowbit.nn.eagerly`.

    Returns:
        False, after a warning, where the compiler does not work: everything stays eager.
    """
    device = next(models[0].parameters()).device
    try:
        torch.compile(_probe)(torch.ones(2, device=device))
    except Exception as error:  # of torch, of a C++ compiler or of Triton: whatever is missing
        reason = str(error).strip().splitlines()[0]
        logger.warning(
            f"task.compile=true, but torch.compile does not work here ({reason}): training goes on "
            "without it"
        )
        return False
    torch._dynamo.config.recompile_limit = _GRAPHS
    for model in models:
        for layer in model.layers:
            layer.compile()
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x + 1
