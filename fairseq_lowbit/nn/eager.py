"""Compiled layers for once as they were written."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def eagerly() -> AbstractContextManager[object]:
    """Around forwards in which hooks of inner modules have to be called: what was compiled runs
    eagerly."""
    # Without it nothing is compiled, and loading it takes seconds.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
