"""What recipes/quantize.sh says at its start: what the teacher is, and what its student will be.

    python quantize_describe.py SRC PRECISION FORMATS [OVERRIDE ...]

It writes into FORMATS the names of the exports that this student can have, one per line. Of the
overrides of the training, those that change the precision count.
"""

import sys
from importlib import import_module
from pathlib import Path

from fairseq_lowbit.configurations import compose_config, read_model_config
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import Source, read_source
from fairseq_lowbit.models import Hubert, WithoutWeights

RATE = 16000
# Names of `fairseq-lowbit export --to`, and the modules that say what they cannot write.
FORMATS = {
    "safetensors": None,
    "hf": "fairseq_lowbit.interop.huggingface_writer",
    "onnx": "fairseq_lowbit.interop.onnx",
}
_OF_PRECISION = ("rules=", "model.precision.")


def describe(name: str, precision: str, overrides: list[str]) -> list[str]:
    """Prints what there is to know.

    Returns:
        the formats that the student can be exported to.

    Raises:
        LowbitError: the source cannot be read; there is no such precision, or not for its shape.
    """
    source = read_source(name, with_weights=False)
    with WithoutWeights():
        teacher = source.build()
        student = _student(source, precision, overrides)
    print(f"teacher {name}: {in_words(teacher)}")
    print(f"  audio {'' if source.normalize else 'not '}normalized to zero mean and variance 1")
    for part in source.left_out:
        print(f"  left out: {part}")
    print(
        f"student {student.plan.precision.name}: {student.plan.bytes / 1e6:.4g} MB where the teacher "
        f"has {teacher.plan.bytes / 1e6:.4g} MB; this version has no packed file of that size yet"
    )
    obstacles = {to: _obstacle(module, student) for to, module in FORMATS.items()}
    for to, reason in obstacles.items():
        if reason:
            print(f"  no export to {to}: {reason}")
    return [to for to, reason in obstacles.items() if not reason]


def _student(source: Source, precision: str, overrides: list[str]) -> Hubert:
    given = [text for text in overrides if text.startswith(_OF_PRECISION)]
    config = compose_config("hubert_fastconv", [f"model.precision.name={precision}", *given])
    return Hubert(source.shape, precision=read_model_config(config.model).precision)


def in_words(model: Hubert) -> str:
    """Size and shape of a model."""
    shape = model.shape
    parameters = sum(parameter.numel() for parameter in model.parameters())
    norm = "pre-norm" if shape.layer_norm_first else "post-norm"
    return (
        f"{parameters / 1e6:.4g} M parameters, {shape.encoder_layers} {norm} layers of "
        f"{shape.encoder_embed_dim} features, {len(model.conv_layers)} convolutions before them, "
        f"{RATE / model.samples_per_frame:g} frames a second"
    )


def _obstacle(module: str | None, student: Hubert) -> str:
    return import_module(module).obstacle(student) if module else ""


if __name__ == "__main__":
    source_name, precision_name, formats_file, *given_overrides = sys.argv[1:]
    try:
        formats = describe(source_name, precision_name, given_overrides)
    except LowbitError as error:
        sys.exit(f"error: {error}")
    Path(formats_file).write_text("".join(f"{to}\n" for to in formats))
