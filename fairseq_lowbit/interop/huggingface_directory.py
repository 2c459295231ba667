"""Reading a Hugging Face directory, config.json and weights, without transformers."""

import importlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop.checkpoint import load_pickled
from fairseq_lowbit.interop.huggingface_format import architecture, to_ours, to_theirs
from fairseq_lowbit.interop.source import Source, translate
from fairseq_lowbit.models import Architecture, Hubert, WithoutWeights
from fairseq_lowbit.models.architecture import SAMPLE_RATE

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_PROCESSOR = "processor_config.json"  # of preprocessor and tokenizer together
SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_MASK = "mask_emb"
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name, and no ../name
_CHECKPOINTS = (".pt", ".pth", ".bin", ".safetensors")
_NAMED = 3

logger = logging.getLogger(__name__)


def is_model_directory(path: str | Path) -> bool:
    """Whether ``path`` is a folder with a config.json."""
    return (Path(path) / CONFIG).is_file()


def find(source: str | Path) -> Path | None:
    """The folder of the model that ``source`` names, a path or an id of the hub; None if it names
    something else.

    Raises:
        LowbitError: see :func:`download`.
    """
    if is_model_directory(source):
        return Path(source)
    return download(str(source)) if is_hub_id(source) else None


def is_hub_id(source: str | Path, folder: str | Path = ".") -> bool:
    """Whether ``source`` can only be an id of the hub: it looks like one and not like a checkpoint
    that is missing, and ``folder``, where paths start, holds nothing of this name."""
    is_id = _ID.fullmatch(str(source)) and Path(source).suffix not in _CHECKPOINTS
    return bool(is_id) and not Path(folder, source).exists()


def download(name: str) -> Path:
    """The folder of the model with this id on the Hugging Face hub, fetched if it is not cached.

    Raises:
        LowbitError: it cannot be fetched, and why; or its settings ask for a model that is not
            built here, before its weights are fetched.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise LowbitError(
            f"{name} is no file or folder. If it is an id of the Hugging Face hub, install "
            "huggingface_hub (pip install 'fairseq-lowbit[hf]') to fetch it"
        ) from error
    try:
        settings = [CONFIG, PREPROCESSOR, _PROCESSOR]
        folder = Path(hub.snapshot_download(name, allow_patterns=settings))
        architecture(read_json(folder / CONFIG), folder / CONFIG)
        hub.snapshot_download(name, allow_patterns=["model*.safetensors*"])
        if weight_file(folder) is None:
            hub.snapshot_download(name, allow_patterns=["pytorch_model*.bin*"])
    except LowbitError:
        raise
    except Exception as error:  # the hub's own kinds, and those of whatever carries it
        raise LowbitError(
            f"{name} is no file or folder, and cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {_first_line(error)}). Give a path that exists, or where "
            "there is a network an id such as facebook/hubert-base-ls960"
        ) from error
    return folder


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def read(directory: Path) -> Source:
    """A directory's model: the base model, whatever head stands on it. Weights are mapped, and read
    when they are used.

    Raises:
        LowbitError: settings that cannot be read or ask for a model that is not built here; weights
            that cannot be read, that have no place in the model, or that are missing.
    """
    config = read_json(directory / CONFIG)
    shape = architecture(config, directory / CONFIG)
    normalize = _normalize(directory, shape)
    keys = to_ours(config["model_type"], shape.extractor_mode)
    stored = _stored_weights(directory)
    _check_types(stored, directory)
    translation = translate(stored, keys, directory)
    weights = {name: tensor.float() for name, tensor in translation.weights.items()}
    if _MASK not in weights:
        logger.warning("%s has no masked_spec_embed: masked frames start as zeros", directory)
        weights[_MASK] = torch.zeros(shape.encoder_embed_dim)
    _check_complete(shape, weights, directory)
    return Source(shape, weights, normalize, left_out=tuple(translation.left_out))


def _check_types(weights: dict[str, Tensor], directory: Path) -> None:
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise LowbitError(
                f"{directory}: the weight {name} is of type {tensor.dtype}; wanted are floating-"
                "point numbers"
            )


def _check_complete(shape: Architecture, weights: dict[str, Tensor], directory: Path) -> None:
    with WithoutWeights():
        expected = [n for n in Hubert(shape).state_dict() if not n.startswith("final_proj.")]
    missing = {name: torch.empty(0) for name in expected if name not in weights}
    if missing:
        names = list(translate(missing, to_theirs(shape.extractor_mode), directory).weights)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        named = ", ".join(names[:_NAMED])
        raise LowbitError(f"{directory} lacks weights that its {CONFIG} asks for: {named}{more}")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        LowbitError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LowbitError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise LowbitError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def _normalize(directory: Path, shape: Architecture) -> bool:
    """Whether the model reads utterances of zero mean and unit variance."""
    settings: dict[str, Any] = {}
    if (directory / PREPROCESSOR).is_file():
        settings = read_json(directory / PREPROCESSOR)
    elif (directory / _PROCESSOR).is_file():
        settings = read_json(directory / _PROCESSOR).get("feature_extractor", {})
    rate = settings.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise LowbitError(f"{directory} is of a model for {rate} Hz; only {SAMPLE_RATE} Hz is read")
    # Without the file: what the two published kinds of models were trained on.
    return bool(settings.get("do_normalize", shape.extractor_mode == "layer_norm"))


def weight_file(directory: Path) -> Path | None:
    """The file with the weights, or the index of several."""
    names = (f"{name}{index}" for name in (SAFETENSORS, _PICKLED) for index in ("", ".index.json"))
    return next((directory / name for name in names if (directory / name).is_file()), None)


def _stored_weights(directory: Path) -> dict[str, Tensor]:
    path = weight_file(directory)
    if path is None:
        raise LowbitError(
            f"{directory} holds no weights: wanted is {SAFETENSORS}, {_PICKLED}, or the "
            ".index.json of one of them with its parts"
        )
    if path.suffix != ".json":
        return _tensors(path)
    parts = read_json(path).get("weight_map")
    if not isinstance(parts, dict):
        raise LowbitError(f"{path} has no weight_map, which names the part that holds a tensor")
    weights: dict[str, Tensor] = {}
    for part in sorted(set(parts.values())):
        weights |= _tensors(directory / part)
    return weights


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise LowbitError(f"{path}, a part of the weights, does not exist")
    if path.suffix != ".safetensors":
        return _table(load_pickled(path, mmap=True), path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LowbitError(f"{path} is truncated or no safetensors file: {error}") from error


def _table(content: object, path: Path) -> dict[str, Tensor]:
    is_table = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )
    if not is_table:
        raise LowbitError(f"{path} holds no table of weights but a {type(content).__name__}")
    return content
