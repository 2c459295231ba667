"""What recipes/quantize.sh says at its start of the model that will come out.

    python quantize_outlook.py SRC PRECISION FORMATS [OVERRIDE ...]

It writes into FORMATS the names of the exports that are possible, one per line. Of the overrides of
the training, those of the precision count.
"""

import shutil
import sys
from pathlib import Path

from fairseq_lowbit.configurations import compose_config, read_model_config
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import Source, read_source
from fairseq_lowbit.interop.exporting import FORMATS
from fairseq_lowbit.models import Hubert, WithoutWeights
from fairseq_lowbit.nn.attach import quantizers
from fairseq_lowbit.quantization.quantizer import LearnedQuantizer

# Weights and two moments in each of four checkpoints, of which one is being written; the teacher,
# calibration alone and three exports.
_COPIES = 4 * 3 + 5
_OF_PRECISION = ("rules=", "form=", "model.precision.")


def outlook(name: str, precision: str, work: Path, overrides: list[str]) -> list[str]:
    """Prints how large the student will be and what it cannot be exported to.

    Args:
        work: the folder where everything will go.

    Returns:
        the formats that it can be exported to.

    Raises:
        LowbitError: the source cannot be read; there is no such precision, or not for its shape;
            the disk is too small.
    """
    source = read_source(name, with_weights=False)
    with WithoutWeights():
        teacher = source.build()
        student = _student(source, precision, overrides)
    _check_space(work, teacher)
    sizes = [f"{model.plan.bytes / 1e6:.4g} MB" for model in (student, teacher)]
    print(f"{precision} of {name}: {sizes[0]} instead of {sizes[1]}, counted as if packed;")
    print("  a packed file and a runtime are not part of this version")
    obstacles = {
        to: form.obstacle(student) or form.missing_package() for to, form in FORMATS.items()
    }
    for to, reason in obstacles.items():
        if reason:
            print(f"  there will be no export to {to}: {reason}")
    return [to for to, reason in obstacles.items() if not reason]


def _student(source: Source, precision: str, overrides: list[str]) -> Hubert:
    given = [text for text in overrides if text.startswith(_OF_PRECISION)]
    config = compose_config("hubert_fastconv", [f"model.precision.name={precision}", *given])
    student = Hubert(source.shape, precision=read_model_config(config.model).precision)
    for _, quantizer in quantizers(student):
        if isinstance(quantizer, LearnedQuantizer):
            quantizer.mark_calibrated(True)  # as it will be
    return student


def _check_space(work: Path, teacher: Hubert) -> None:
    needed = _COPIES * 4 * sum(parameter.numel() for parameter in teacher.parameters())
    free = shutil.disk_usage(work).free
    if free < needed:
        raise LowbitError(
            f"{work} has {free / 1e9:.1f} GB free, and checkpoints and exports need about "
            f"{needed / 1e9:.1f} GB: name another folder with --work"
        )


if __name__ == "__main__":
    source_name, precision_name, formats_file, *given_overrides = sys.argv[1:]
    try:
        formats = outlook(source_name, precision_name, Path(formats_file).parent, given_overrides)
    except LowbitError as error:
        sys.exit(f"error: {error}")
    Path(formats_file).write_text("".join(f"{to}\n" for to in formats))
