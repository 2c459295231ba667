"""Models taken apart on held-out audio, beside their teachers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from torch import Tensor

from fairseq_lowbit.data.audio import SAMPLE_RATE
from fairseq_lowbit.data.manifest import read_manifest
from fairseq_lowbit.errors import LowbitError, describe
from fairseq_lowbit.evaluation.utterances import read_usable
from fairseq_lowbit.interop import open_model
from fairseq_lowbit.models import LoadedModel
from fairseq_lowbit.report.drawing import Drawing, slug
from fairseq_lowbit.report.inside.anatomy import Anatomy, dissect
from fairseq_lowbit.report.inside.attention import attention_drawing
from fairseq_lowbit.report.inside.quantizer_maps import quantizer_drawings
from fairseq_lowbit.report.inside.weights import weights_drawing
from fairseq_lowbit.report.style import styled
from fairseq_lowbit.report.subjects import Subject

SECONDS = 4.0
_SPLITS = ("test", "valid")


@dataclass(frozen=True)
class Dissected:
    """The drawings of one model.

    Attributes:
        note: on what audio and beside which teacher; or, without drawings, why there are none.
    """

    subject: Subject
    note: str
    drawings: Sequence[Drawing] = ()

    @property
    def has_failed(self) -> bool:
        return not self.drawings


def dissect_all(
    subjects: Sequence[Subject], device: str, progress: Callable[[Subject], None]
) -> Iterator[Dissected]:
    """Takes models apart one by one, each beside the teacher of its run if that is there.

    Args:
        subjects: each with a checkpoint.
        device: that models run on.
        progress: called with each before it is loaded.
    """
    # Runs often share a teacher.
    open_teacher = lru_cache(maxsize=None)(partial(open_model, device=device))
    for subject in subjects:
        progress(subject)
        try:
            yield _dissected(subject, device, open_teacher)
        except Exception as error:  # one broken checkpoint must not prevent the page
            yield Dissected(subject, describe(error))


def _dissected(
    subject: Subject, device: str, open_teacher: Callable[[Path], LoadedModel]
) -> Dissected:
    data, teacher_path = subject.record["data"], subject.record["teacher"]
    if data is None:
        raise LowbitError("its configuration names no data to run it on: give --data")
    teacher, missing = None, "its run names no teacher"
    if teacher_path is not None:
        try:
            teacher = open_teacher(teacher_path)
        except Exception as error:
            missing = describe(error)
    student = open_model(subject.checkpoint, device)
    waveform, name = held_out_utterance(data, (teacher or student).normalize)
    drawings = anatomy_drawings(subject.name, dissect(student, teacher, waveform))
    if not drawings:
        raise LowbitError(f"a float model shows only how it differs from a teacher, but {missing}")
    beside = f"beside its teacher {teacher_path}" if teacher else f"without a teacher: {missing}"
    seconds = waveform.shape[1] / SAMPLE_RATE
    return Dissected(subject, f"On {seconds:.1f} s of held-out audio ({name}), {beside}.", drawings)


@styled()
def anatomy_drawings(name: str, anatomy: Anatomy) -> list[Drawing]:
    """Every figure that applies to a model: of a float one its attention alone.

    Args:
        name: of the model, for titles; a slug of it starts the drawings' names.
    """
    drawings = quantizer_drawings(anatomy.quantizers) if anatomy.quantizers else []
    if anatomy.weights:
        drawings.append(weights_drawing(anatomy.weights))
    if anatomy.attention:
        drawings.append(attention_drawing(anatomy.attention, anatomy.frame_seconds))
    return [
        replace(drawing, name=f"{slug(name)}_{drawing.name}", title=f"{name}: {drawing.title}")
        for drawing in drawings
    ]


def held_out_utterance(data: Path, normalize: bool) -> tuple[Tensor, str]:
    """The utterance of a data folder's test set, or else validation set, that is nearest to
    ``SECONDS``, and no more of it than that, [1, samples], and its file name.

    Raises:
        LowbitError: neither is there, or no file is usable.
    """
    paths = [data / f"{split}.tsv" for split in _SPLITS]
    manifest = read_manifest(next((path for path in paths if path.is_file()), paths[0]))
    for line in np.argsort(np.abs(manifest.sizes - SECONDS * SAMPLE_RATE), kind="stable"):
        audio = read_usable(manifest, [int(line)], normalize)
        if audio:
            waveform = audio[int(line)][: int(SECONDS * SAMPLE_RATE)]
            return waveform.unsqueeze(0), manifest.names[int(line)]
    raise LowbitError(f"{manifest.path}: none of the files is usable")
