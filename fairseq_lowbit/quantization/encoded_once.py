"""Weights that stay as they are for several forwards are encoded in the first of them only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_lowbit.quantization.codes import Codes, byte_type
from fairseq_lowbit.quantization.quantizer import Quantizer


@dataclass(frozen=True)
class _Entry:
    """Codes and the parameters that they were computed from, as these were then."""

    codes: Codes
    parameters: tuple[Tensor, ...]
    state: tuple[tuple[int, int], ...]


_entries: dict[Quantizer, _Entry] | None = None


@contextmanager
def weights_encoded_once() -> Iterator[None]:
    """Around the forwards and backwards of one update, in which no weight changes: every quantized
    weight is encoded once, and its codes, a byte each, are kept until the end of the block.

    A change that torch counts, by ``load_state_dict`` or another operation in place, is noticed
    inside of the block too. One that it does not count, by a fused optimizer or by
    ``parameter.data`` as in fairseq, is not: it belongs behind the block, or last in it.
    """
    global _entries
    before, _entries = _entries, {}
    try:
        yield
    finally:
        _entries = before


def find(quantizer: Quantizer, weight: Tensor, parameters: Sequence[Tensor]) -> Codes | None:
    """The codes of ``weight`` inside of :func:`weights_encoded_once`; None outside.

    Args:
        parameters: what ``weight`` is computed from.
    """
    # A compiler fuses the encoding with what follows; it shall not even look at the entries.
    if torch.compiler.is_compiling() or _entries is None:
        return None
    parameters = (*parameters, *quantizer.parameters())
    state = tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
    entry = _entries.get(quantizer)
    if entry is None or entry.state != state or not _are_same(entry.parameters, parameters):
        codes = quantizer.codes(weight, integer_type=byte_type(quantizer.levels))
        entry = _entries[quantizer] = _Entry(codes, parameters, state)
    return entry.codes


def _are_same(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(own is other for own, other in zip(tensors, others, strict=True))
