"""Models in fairseq's checkpoints: this package's own, and HuBERT, wav2vec 2.0 and WavLM of others,
pre-trained or fine-tuned."""

import argparse
from pathlib import Path
from typing import Any

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop.checkpoint import is_calibrated_only, updates_of
from fairseq_lowbit.interop.source import KeyMap, LeaveOut, Move, Source, translate
from fairseq_lowbit.models import Architecture
from fairseq_lowbit.precision import Precision

# By the name of the model (or, in old checkpoints, of its architecture). A converted checkpoint may
# have none.
_OWN = ("hubert_fastconv", "lowbit_hubert")
_PRETRAINED = ("hubert", "wav2vec2", "wavlm", None)
_FINE_TUNED = ("hubert_ctc", "hubert_seq2seq", "wav2vec_ctc", "wav2vec_seq2seq")
# Architectures of fairseq's own command line, that are one model at several sizes.
_FAMILIES = {"hubert_base": "hubert", "wav2vec2_base": "wav2vec2", "wav2vec2_large": "wav2vec2"}

# fairseq's default of an option whose default differs here.
_DEFAULTS = {"conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"}

_KEYS: KeyMap = (
    # torch's two ways of writing a weight norm.
    Move(r"(encoder\.pos_conv\.0)\.parametrizations\.weight\.original0", r"\1.weight_g"),
    Move(r"(encoder\.pos_conv\.0)\.parametrizations\.weight\.original1", r"\1.weight_v"),
    # What only wav2vec 2.0's contrastive loss needs.
    LeaveOut(r"quantizer\..*", "quantizer of wav2vec 2.0's loss"),
    LeaveOut(r"project_q\..*", "projection of wav2vec 2.0's targets"),
    Move(r"(mask_emb|label_embs_concat)", r"\1"),
    Move(r"((feature_extractor|layer_norm|post_extract_proj|encoder|final_proj)\..*)", r"\1"),
)
_FINE_TUNED_KEYS: KeyMap = (
    Move(r"w2v_encoder\.w2v_model\.(.*)", r"\1"),
    LeaveOut(r"w2v_encoder\.proj\..*", "head of the fine-tuned model"),
    LeaveOut(r"decoder\..*", "decoder of the fine-tuned model"),
)


def read(state: dict[str, Any], path: str | Path) -> Source:
    """The model of a checkpoint.

    Args:
        state: what :func:`fairseq_lowbit.interop.checkpoint.read_checkpoint` read from ``path``.

    Raises:
        LowbitError: another kind of model, a variant that is not built here, or weights of unknown
            names.
    """
    config, task, weights = state["cfg"]["model"], state["cfg"].get("task"), state["model"]
    name, left_out = _family(config), ()
    if name in _FINE_TUNED:
        found = translate(weights, _FINE_TUNED_KEYS, f"checkpoint {path}")
        weights, left_out = found.weights, tuple(found.left_out)
        config, task = _pretrained_config(config, task, path)
        name = _family(config)
    if name not in (*_OWN, *_PRETRAINED):
        raise LowbitError(
            f"checkpoint {path} holds a {name}, not a HuBERT, wav2vec 2.0 or WavLM of fairseq"
        )
    # What was converted from a checkpoint of this package may have lost its name.
    is_own = name in _OWN or "precision" in config
    # First the shape: a variant that is not built is known better by its setting than its weights.
    shape = _shape(config if is_own else {**_DEFAULTS, **config}, path)
    if not is_own:
        found = translate(weights, _KEYS, f"checkpoint {path}")
        weights, left_out = found.weights, (*left_out, *found.left_out)
    precision = config.get("precision") if is_own else None
    return Source(
        shape,
        weights,
        normalize=bool((task or {}).get("normalize", False)),
        precision=_precision(precision, path) if precision else None,
        updates=updates_of(state),
        is_calibrated_only=is_calibrated_only(state),
        left_out=left_out,
        units=_units(state) if is_own else (),
    )


def _units(state: dict[str, Any]) -> tuple[str, ...]:
    """The vocabulary of a CTC head, which its task keeps in the checkpoint."""
    return tuple((state.get("task_state") or {}).get("units", ()))


def _shape(config: dict[str, Any], path: str | Path) -> Architecture:
    try:
        return Architecture.from_mapping(config)
    except LowbitError as error:  # of a setting that could be the student's as well
        raise LowbitError(f"checkpoint {path}: {error}") from error


def _precision(stored: dict[str, Any], path: str | Path) -> Precision:
    try:
        return Precision.from_mapping(stored)
    except LowbitError as error:
        raise LowbitError(f"checkpoint {path}: {error}") from error


def _family(config: dict[str, Any]) -> str | None:
    name = config.get("_name")
    return _FAMILIES.get(name, name)


def _pretrained_config(
    config: dict[str, Any], task: dict[str, Any] | None, path: str | Path
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Model and task of what was fine-tuned, which the fine-tuned model keeps in ``w2v_args``."""
    kept = config.get("w2v_args")
    if isinstance(kept, argparse.Namespace):
        kept = {"model": {"_name": kept.arch, **vars(kept)}, "task": vars(kept)}
    if not isinstance(kept, dict) or not isinstance(kept.get("model"), dict):
        raise LowbitError(
            f"checkpoint {path} holds a fine-tuned model without the configuration of the model "
            "that was fine-tuned (w2v_args): name the checkpoint it was made from"
        )
    return kept["model"], task or kept.get("task")
