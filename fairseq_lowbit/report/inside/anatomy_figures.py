"""The figures of an anatomy: what its numbers look like, to be read without this code at hand."""

from fairseq_lowbit.report.drawing import Drawing, slug
from fairseq_lowbit.report.inside.anatomy import Anatomy
from fairseq_lowbit.report.inside.attention_figures import attention_drawing
from fairseq_lowbit.report.inside.quantizer_figures import (
    levels_drawing,
    noise_drawing,
    ranges_drawing,
)
from fairseq_lowbit.report.inside.weight_figures import weights_drawing
from fairseq_lowbit.report.style import styled


@styled()
def anatomy_drawings(name: str, anatomy: Anatomy) -> list[Drawing]:
    """Every figure that applies to a model: of a float one its attention alone.

    Args:
        name: of the model, for titles; a slug of it starts the drawings' names.
    """
    drawings = []
    if anatomy.quantizers:
        drawings += [noise_drawing(anatomy), levels_drawing(anatomy)]
    if any(not quantizer.is_weight for quantizer in anatomy.quantizers):
        drawings.append(ranges_drawing(anatomy))
    if anatomy.weights:
        drawings.append(weights_drawing(anatomy.weights))
    drawings.append(attention_drawing(anatomy.attention))
    return [
        Drawing(f"{slug(name)}_{d.name}", f"{name}: {d.title}", d.caption, d.figure, d.alt)
        for d in drawings
    ]
