"""``fairseq-lowbit import-teacher``: a model from elsewhere as a file of this package."""

import argparse
from pathlib import Path

from fairseq_lowbit.interop import SOURCES, LoadedModel, open_model
from fairseq_lowbit.interop.exporting import FORMATS

HELP = (
    "read a HuBERT, wav2vec 2.0 or WavLM of fairseq or Hugging Face, and write it as one file of "
    "this package; training, ptq, profile, evaluate and report also take SOURCE itself"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=SOURCES)
    parser.add_argument("out", type=Path, help="file to write, *.safetensors")


def run(args: argparse.Namespace) -> int:
    loaded = open_model(args.source)
    FORMATS["safetensors"].export(loaded, args.out)
    print(description(loaded))
    print(f"wrote {args.out}")
    return 0


def description(loaded: LoadedModel) -> str:
    """What was read, in a few lines."""
    model, shape = loaded.model, loaded.model.shape
    parameters = sum(parameter.numel() for parameter in model.parameters())
    norm = "pre-norm" if shape.layer_norm_first else "post-norm"
    lines = [
        f"{loaded.source}: {parameters:,} parameters, {shape.encoder_layers} {norm} layers of "
        f"{shape.encoder_embed_dim} features, {len(model.conv_layers)} convolutions, "
        f"{model.plan.precision.name}",
        f"task.normalize={str(loaded.normalize).lower()}: what it was trained on",
    ]
    if not loaded.has_final_projection:
        lines.append("no final projection: distillation leaves its term out")
    lines += [f"left out: {part}" for part in loaded.left_out]
    return "\n".join(lines)
