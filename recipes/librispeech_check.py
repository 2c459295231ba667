"""What recipes/librispeech960.sh asks the package before its first stage.

    python librispeech_check.py teacher SRC RUN
    python librispeech_check.py formats NAME ...

``teacher``: whether the encoder of SRC fits the FastConv front-end of the group run=RUN.
``formats``: whether these exports have their packages.
"""

import sys

from fairseq_lowbit.configurations import meta_model, model_config
from fairseq_lowbit.distillation import refuse_other_frames
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import open_without_weights
from fairseq_lowbit.interop.exporting import FORMATS
from fairseq_lowbit.models import LoadedModel, start_from


def teacher(source: str, run: str) -> None:
    """Raises LowbitError for a teacher that stage 5 would refuse, without reading its weights."""
    student = meta_model(model_config("fastconv_adaptation", [f"run={run}"]))
    found = LoadedModel(open_without_weights(source), source, 0, True, False)
    refuse_other_frames(student, found)
    start_from(student, found, role="teacher", front_end=False)


def formats(*names: str) -> None:
    """Raises LowbitError for an export of which a package is missing."""
    for name in names:
        if missing := FORMATS[name].missing_package():
            raise LowbitError(f"stage 8 exports to {name}, and {missing}")


if __name__ == "__main__":
    check, *arguments = sys.argv[1:]
    try:
        {"teacher": teacher, "formats": formats}[check](*arguments)
    except LowbitError as error:
        sys.exit(f"error: {error}")
