"""Table 1 of Yeh et al., arXiv 2301.00652: the cells that are known, to stand beside ours."""

from dataclasses import dataclass

SOURCE = "Yeh et al., arXiv 2301.00652, Table 1: SUPERB ASR, no language model, LibriSpeech 960 h"


@dataclass(frozen=True)
class PaperRow:
    """One row; None where a cell is not known.

    Attributes:
        name: as in the table.
        precision: of this package.
        model: group of ``config/model``.
        wer: word error rate in %.
        storage_mb: in 1e6 bytes.
        gflops, gquantops: 1e9 operations and 1e9 bits, for 10 s of audio.
        runtime: relative to HuBERT-FastConv.
        without_final_projection: its stored size leaves out ``final_proj``.
        note: why an honest count differs from a cell.
    """

    name: str
    precision: str = "float"
    model: str = "fastconv_base"
    wer: float | None = None
    storage_mb: float | None = None
    gflops: float | None = None
    gquantops: float | None = None
    runtime: float | None = None
    without_final_projection: bool = False
    note: str | None = None


_ATTENTION_NOTE = (
    "the paper counts 2 * 768^2 multiply-accumulates per frame and layer for the attention "
    "products, 14.13 G; at 499 frames they are 2 * 768 * 499, 9.18 G"
)
_LINEARS_NOTE = (
    "FLOPs and QuantOps of the paper cover a part of the linears only, although its storage counts "
    "all of them; all are 84.76 G operations of max(weight, activation) bits"
)

TABLE = (
    PaperRow("HuBERT Base", model="hubert_base", wer=6.42, gflops=153.0, runtime=1.38),
    PaperRow(
        "HuBERT-FastConv",
        wer=7.06,
        storage_mb=184.42,
        gflops=110.79,
        runtime=1.0,
        note=_ATTENTION_NOTE,
    ),
    PaperRow(
        "DistilHuBERT",
        model="distilhubert",
        wer=13.37,
        storage_mb=46.98,
        runtime=0.73,
        without_final_projection=True,
    ),
    PaperRow("SqWQ W8", "sqwq_w8", storage_mb=99.65, gquantops=421.88, note=_LINEARS_NOTE),
    PaperRow("SqWQ W4", "sqwq_w4", storage_mb=57.19, gquantops=421.88),
    PaperRow("SqWQ W2", "sqwq_w2", wer=12.56, gquantops=421.88),
    PaperRow("SqWQ W1", "sqwq_w1", gquantops=421.88),
    PaperRow("BiT-L W8A8", "bitl_w8a8", wer=7.03),
    PaperRow("BiT-L W2A2", "bitl_w2a2", wer=10.80),
    PaperRow(
        "BiT-L W1A1",
        "bitl_w1a1",
        storage_mb=25.17,
        gflops=82.29,
        gquantops=52.73,
        runtime=0.75,
        note=_LINEARS_NOTE,
    ),
    PaperRow("BiT-LA W8A8", "bitla_w8a8", wer=7.07),
    PaperRow("BiT-LA W2A2", "bitla_w2a2", wer=12.68, storage_mb=35.84, runtime=0.15),
    PaperRow("BiT-LA W1A1", "bitla_w1a1", wer=15.96, storage_mb=25.23, gflops=11.82, runtime=0.12),
)
# The same model trained with the HuBERT loss instead of distillation (Table 2).
HUBERT_LOSS_WER = {"bitla_w1a1": 18.93}


def paper_wer(precision: str, loss: str) -> float | None:
    """HuBERT-FastConv's word error rate in %; None where it is not known.

    Args:
        precision: a name without rules, ``float`` for the teacher.
        loss: ``distillation`` or ``hubert``.
    """
    if loss == "hubert" and precision != "float":
        return HUBERT_LOSS_WER.get(precision)
    rows = (r for r in TABLE if r.precision == precision and r.model == "fastconv_base")
    return next((row.wer for row in rows), None)
