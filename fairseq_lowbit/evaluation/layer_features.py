"""The output of one layer of a model as frame features, for the labels of HuBERT's next
iteration."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_lowbit.data.audio import SAMPLE_RATE
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert, LoadedModel
from fairseq_lowbit.models.extractor import receptive_field

# Longer recordings are cut, so that attention does not take all memory.
_LONGEST_SECONDS = 60


@dataclass(frozen=True)
class LayerFeatures:
    """Features for ``fairseq_lowbit.data.labels``; see its ``FrameFeatures``.

    Utterances run one by one: a batch would have other rounding, and labels should not depend on
    how a corpus was divided. The model is loaded when first needed, once per process.

    Args:
        source: where the model is, for example a checkpoint.
        open_model: loads it onto a device; a function that another process can import.
        layer: 1 for the output of the first layer; 0 for the input of it.
        device: that the model runs on.

    Raises:
        LowbitError: from any method: a source that cannot be read, a layer that the model lacks, a
            model whose frames are no whole number per second.
    """

    source: str
    layer: int
    open_model: Callable[[str, str], LoadedModel]
    device: str = "cpu"
    standardize: bool = False
    is_threaded: bool = False

    @property
    def rate(self) -> int:
        return frame_rate(self._loaded().model)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        loaded = self._loaded()
        waveform = torch.from_numpy(samples).to(self.device)
        if loaded.normalize:
            waveform = F.layer_norm(waveform, waveform.shape)
        return layer_output(loaded.model, waveform, self.layer).float().cpu().numpy()

    def digest(self) -> str:
        return f"{_weights_digest(self._loaded())} layer {self.layer}"

    def limit_threads(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def _loaded(self) -> LoadedModel:
        loaded = _load(self.source, self.open_model, self.device)
        layers = len(loaded.model.layers)
        if not 0 <= self.layer <= layers:
            raise LowbitError(
                f"--layer {self.layer}: {self.source} has layers 1 to {layers}, and 0 is the input "
                "of the first"
            )
        return loaded


def frame_rate(model: Hubert) -> int:
    """Frames per second; raises LowbitError if that is no whole number."""
    if SAMPLE_RATE % model.samples_per_frame:
        raise LowbitError(
            f"a model with a frame every {model.samples_per_frame} samples has no whole number of "
            f"frames in a second of {SAMPLE_RATE}: no labels can be made of it"
        )
    return SAMPLE_RATE // model.samples_per_frame


@torch.inference_mode()
def layer_output(
    model: Hubert, waveform: Tensor, layer: int, longest_seconds: float = _LONGEST_SECONDS
) -> Tensor:
    """Output of one layer, [frames, dim], as many frames as ``model.frame_lengths`` tells.

    Args:
        waveform: [samples] at 16 kHz, on the device of the model.
        layer: from 0, the input of the first layer, to the number of layers.
        longest_seconds: what is longer runs in pieces of that length, none of which sees the
            others.
    """
    frames = int(model.frame_lengths(torch.tensor(len(waveform))))
    hop, field = model.samples_per_frame, receptive_field(model.conv_layers)
    piece = max(1, int(longest_seconds * SAMPLE_RATE) // hop)
    outputs = [waveform.new_empty(0, model.features)]
    for first in range(0, frames, piece):
        last = first + piece - 1
        # The last piece keeps what is less than a frame: group norm sees it too.
        end = len(waveform) if last + 1 >= frames else last * hop + field
        outputs.append(_layer_of_piece(model, waveform[first * hop : end], layer))
    return torch.cat(outputs)


def _layer_of_piece(model: Hubert, waveform: Tensor, layer: int) -> Tensor:
    """[frames, dim]; the layers above are not run."""
    x = model.begin(model.extract(waveform[None]))
    for module in model.layers[:layer]:
        x = module(x).x
    return (model.encoder.end(x) if layer == len(model.layers) else x)[0]


@lru_cache(maxsize=1)
def _load(source: str, open_model: Callable[[str, str], LoadedModel], device: str) -> LoadedModel:
    return open_model(source, device)


@lru_cache(maxsize=1)
def _weights_digest(loaded: LoadedModel) -> str:
    digest = hashlib.sha256(str((loaded.model.shape, loaded.normalize)).encode())
    for name, tensor in loaded.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
