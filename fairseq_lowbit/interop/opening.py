"""Opening a model from wherever it is: the one seam behind every command that takes a model."""

from pathlib import Path

from fairseq_lowbit.interop import fairseq_checkpoint, huggingface_directory
from fairseq_lowbit.interop.checkpoint import read_checkpoint
from fairseq_lowbit.interop.source import Source
from fairseq_lowbit.models import Hubert, LoadedModel, WithoutWeights

# For the help of commands.
SOURCES = "a checkpoint (.pt), a .safetensors of this package, or a folder or id of Hugging Face"


def open_model(source: str | Path, device: str = "cpu") -> LoadedModel:
    """A model at its own shape and precision, in eval mode.

    Args:
        source: a checkpoint of fairseq or of this package (``.pt``), this package's own
            ``.safetensors``, a folder in the form of Hugging Face, or the id of such a model on its
            hub.
        device: to put it on.

    Raises:
        LowbitError: there is no such thing; it is damaged, of another kind or holds more than plain
            data; a family or shape that is not supported; weights that do not fit its
            configuration.
    """
    found = read_source(source)
    model = found.build()
    model.load_state_dict(found.fitting_weights(model, source))
    return LoadedModel(
        model.eval().to(device),
        str(source),
        found.updates,
        found.has_final_projection,
        found.normalize,
        found.is_calibrated_only,
        found.left_out,
        found.units,
    )


def open_without_weights(source: str | Path) -> Hubert:
    """The model of ``source`` on the meta device, for who wants its shape, plan and cost only.

    Raises:
        LowbitError: see :func:`open_model`.
    """
    found = read_source(source, with_weights=False)
    with WithoutWeights():
        model = found.build()
    found.fitting_weights(model, source)
    return model


def read_source(source: str | Path, with_weights: bool = True) -> Source:
    """What is known of a model before it is built.

    Args:
        with_weights: False leaves tensors on disk where the format allows it.

    Raises:
        LowbitError: see :func:`open_model`.
    """
    folder = huggingface_directory.find(source)
    if folder is not None:
        return huggingface_directory.read(folder)
    state = read_checkpoint(source, mmap=not with_weights)
    return fairseq_checkpoint.read(state, source)
