"""Span masks for masked prediction (HuBERT, arXiv 2106.07447, section II-C; static spans)."""

import torch
from torch import Tensor


def span_mask(lengths: Tensor, frames: int, share: float, span: int) -> Tensor:
    """Random spans of ``span`` frames that start at about share/span of the valid frames.

    Spans may overlap; every utterance has at least one. Drawn from torch's global CPU generator,
    so a resumed run draws what the interrupted one would have drawn.

    Args:
        lengths: [batch] valid frames, on the CPU.
        frames: padded length.

    Returns:
        [batch, frames] bool, True at masked valid frames.
    """
    mask = torch.zeros(len(lengths), frames, dtype=torch.bool)
    for row, length in zip(mask, lengths.tolist(), strict=True):
        width = min(span, max(length - 1, 1))
        count = max(1, int(share * length / span + float(torch.rand(()))))
        candidates = max(length - width + 1, 1)
        starts = torch.randperm(candidates)[:count]
        row[(starts[:, None] + torch.arange(width)).reshape(-1)] = True
        row[length:] = False
    return mask
