"""Writing a model as a Hugging Face directory, without transformers.

It holds the float model, or of a quantized one its view with decoded weights: quantizers of
activations have no place there.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

import fairseq_lowbit
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.files import atomic_folder
from fairseq_lowbit.interop.huggingface_directory import (
    CONFIG,
    PREPROCESSOR,
    SAFETENSORS,
    is_model_directory,
    read_json,
)
from fairseq_lowbit.interop.huggingface_format import configuration, to_theirs
from fairseq_lowbit.interop.source import translate
from fairseq_lowbit.models import Hubert, LoadedModel
from fairseq_lowbit.models.architecture import SAMPLE_RATE
from fairseq_lowbit.nn import decoded_state, is_calibrated, is_quantized

CARD = "README.md"
_MARK = "exported_by"  # in config.json, of what export wrote


def obstacle(model: Hubert) -> str:
    """Why ``model`` cannot be written as a Hugging Face directory; empty when it can."""
    if model.shape.relative_position_embedding and not model.shape.gru_rel_pos:
        return "Hugging Face has no model with relative positions that are not gated"
    if not is_calibrated(model):
        return "its quantizers were never calibrated, so that it has no quantized weights"
    return ""


def export(loaded: LoadedModel, out: Path) -> None:
    """Writes the model with decoded weights and float activations to the folder ``out``, whole or
    not at all. An earlier export there is replaced.

    Args:
        loaded: without an :func:`obstacle`.

    Raises:
        LowbitError: ``out`` cannot be written or holds anything else.
    """
    made_by = f"fairseq_lowbit {fairseq_lowbit.__version__}"
    config = {**configuration(loaded.model.shape), _MARK: made_by}
    _check_replaceable(out)
    with atomic_folder(out) as folder:
        weights = save(_their_weights(loaded.model), {"format": "pt"})
        (folder / SAFETENSORS).write_bytes(weights)
        _write_json(folder / CONFIG, config)
        _write_json(folder / PREPROCESSOR, _preprocessor(loaded.normalize))
        (folder / CARD).write_text(_card(loaded, config["architectures"][0]), encoding="utf-8")


def _their_weights(model: Hubert) -> dict[str, Tensor]:
    state = decoded_state(model)
    without_place = ("final_proj.", "label_embs_concat", "ctc_proj.")
    weights = {k: v for k, v in state.items() if not k.startswith(without_place)}
    if model.post_extract_proj is None:  # theirs always has one
        dim = model.features
        weights["post_extract_proj.weight"] = torch.eye(dim)
        weights["post_extract_proj.bias"] = torch.zeros(dim)
    gain, direction = "encoder.pos_conv.0.weight_g", "encoder.pos_conv.0.weight_v"
    # A tap whose weights are all zero has no direction: any will do.
    weights[direction] = weights[direction].where(weights[gain] != 0, 1.0)
    moved = translate(weights, to_theirs(model.shape.extractor_mode), "the model").weights
    return {name: tensor.float().contiguous().cpu().clone() for name, tensor in moved.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _preprocessor(normalize: bool) -> dict[str, Any]:
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_side": "right",
        "padding_value": 0.0,
        "do_normalize": normalize,
        "return_attention_mask": True,
    }


def _check_replaceable(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_model_directory(out) or _MARK not in read_json(out / CONFIG):
        raise LowbitError(f"{out} exists and is no earlier export: name a new folder")


_CARD_TEXT = """\
---
library_name: transformers
pipeline_tag: feature-extraction
tags: [speech, {tag}]
---

# {family} at {precision}

{what}

| | |
|---|---|
| made from | {source} |
| precision | {precision} |
| parameters | {parameters:,} |
| size in that precision | {megabytes:,.2f} MB |
| input | mono audio at {rate} Hz{normalized} |
| output | one frame of {features} values per {samples} samples, of each of {layers} layers |

```python
from transformers import {architecture}

model = {architecture}.from_pretrained("PATH")  # this folder
```

In a padded batch pass the attention mask.
{padding}

Written by fairseq_lowbit {version}.
"""
_FLOAT = "The float model, as it was trained."
_QUANTIZED = """\
The weight-quantized view of a quantized model: its weights are the decoded values of its codes, as
floating-point numbers, and its activations are not quantized. It is not the deployed model, whose
activations are quantized too where its precision says so, and whose weights are stored as codes.\
"""
_GROUP_NORM = """\
The first convolution's group norm sees the padding all the same, so that an utterance does not give
quite the same as alone.\
"""
_LAYER_NORM = "An utterance then gives the same as alone."


def _card(loaded: LoadedModel, architecture: str) -> str:
    model, shape = loaded.model, loaded.model.shape
    family = architecture.removesuffix("Model")
    rules = model.plan.precision.rules
    return _CARD_TEXT.format(
        tag=family.lower(),
        family=family,
        source=Path(loaded.source).name,
        what=_QUANTIZED if is_quantized(model) else _FLOAT,
        precision=model.plan.precision.name + (f" with {len(rules)} rules" if rules else ""),
        parameters=model.plan.parameters,
        megabytes=model.plan.bytes / 1e6,
        rate=f"{SAMPLE_RATE:,}",
        normalized=", each utterance of zero mean and unit variance" if loaded.normalize else "",
        features=model.features,
        samples=model.samples_per_frame,
        layers=shape.encoder_layers,
        architecture=architecture,
        padding=_GROUP_NORM if shape.extractor_mode == "default" else _LAYER_NORM,
        version=fairseq_lowbit.__version__,
    )
