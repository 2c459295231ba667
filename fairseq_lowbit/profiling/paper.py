"""Table 1 of Yeh et al., arXiv 2301.00652: its cells, to stand beside ours."""

from collections.abc import Mapping
from dataclasses import dataclass

SOURCE = "Yeh et al., arXiv 2301.00652, Table 1: SUPERB ASR, no language model, LibriSpeech 960 h"
# What a cell is, and its unit.
CELLS = {
    "wer": "WER %",
    "wer_hubert_loss": "WER %, HuBERT loss",
    "storage_mb": "storage MB",
    "gflops": "GFLOPs",
    "gquantops": "QuantOps Gbit",
    "runtime": "runtime",
}
# Why an honest count differs, found by arithmetic: the paper does not say how it counted.
REASONS = (
    "QuantOps: the paper's fit its model in no unit but 2^30; its 421.88 are 452.99 of ours.",
    "QuantOps of SqWQ and BiT-L: the paper's are those of the two feed-forward linears of a layer "
    "alone, 12 * 2 * 8 * 768^2 * 500 / 2^30 = 52.73 for each bit. Its storage has all linears "
    "quantized.",
    "GFLOPs of HuBERT-FastConv, and runtime of HuBERT Base: the paper takes 500 frames, where the "
    "convolutions give 499, and 2 * 768^2 multiply-accumulates per frame and layer for the "
    "attention products, where they are 2 * 768 * frames.",
    "GFLOPs of BiT-L W1A1 and BiT-LA W1A1, runtime of DistilHuBERT and BiT-LA W2A2: not explained "
    "by the paper. The runtime of BiT-L W1A1 follows from its GFLOPs.",
)


@dataclass(frozen=True)
class PaperRow:
    """One row.

    Attributes:
        name: as in the table.
        cells: the published ones, by the keys of :data:`CELLS`; sizes in 1e6 bytes, operations in
            1e9 for 10 s of audio, runtime relative to HuBERT-FastConv.
        precision: of this package.
        model: group of ``config/model``.
        without_final_projection: its stored size leaves out ``final_proj``.
    """

    name: str
    cells: Mapping[str, float]
    precision: str = "float"
    model: str = "fastconv_base"
    without_final_projection: bool = False


def _gbit(gibit: float) -> float:
    """The paper's QuantOps in our unit."""
    return gibit * 2**30 / 1e9


_SQWQ = {"gquantops": _gbit(421.88)}

TABLE = (
    PaperRow("HuBERT Base", {"wer": 6.42, "runtime": 1.38}, model="hubert_base"),
    PaperRow(
        "HuBERT-FastConv", {"wer": 7.06, "storage_mb": 184.42, "gflops": 110.79, "runtime": 1.0}
    ),
    PaperRow(
        "DistilHuBERT",
        {"wer": 13.37, "storage_mb": 46.98, "runtime": 0.73},
        model="distilhubert",
        without_final_projection=True,
    ),
    PaperRow("SqWQ W8", {"storage_mb": 99.65, **_SQWQ}, "sqwq_w8"),
    PaperRow("SqWQ W4", {"storage_mb": 57.19, **_SQWQ}, "sqwq_w4"),
    PaperRow("SqWQ W2", {"wer": 12.56, **_SQWQ}, "sqwq_w2"),
    PaperRow("SqWQ W1", _SQWQ, "sqwq_w1"),
    PaperRow("BiT-L W8A8", {"wer": 7.03}, "bitl_w8a8"),
    PaperRow("BiT-L W2A2", {"wer": 10.80}, "bitl_w2a2"),
    PaperRow(
        "BiT-L W1A1",
        {"storage_mb": 25.17, "gflops": 82.29, "gquantops": _gbit(52.73), "runtime": 0.75},
        "bitl_w1a1",
    ),
    PaperRow("BiT-LA W8A8", {"wer": 7.07}, "bitla_w8a8"),
    PaperRow("BiT-LA W2A2", {"wer": 12.68, "storage_mb": 35.84, "runtime": 0.15}, "bitla_w2a2"),
    PaperRow(
        "BiT-LA W1A1",
        {
            "wer": 15.96,
            "wer_hubert_loss": 18.93,
            "storage_mb": 25.23,
            "gflops": 11.82,
            "runtime": 0.12,
        },
        "bitla_w1a1",
    ),
)

SUPERB_SOURCE = (
    "SUPERB's own figures of HuBERT Base and DistilHuBERT, and DPHuBERT by Peng et al., arXiv "
    "2305.17651; storage is twice the parameters"
)


def _superb_row(parameters: float, *figures: float) -> dict[str, float]:
    """Figures of SUPERB by the keys of ``runs/superb/tasks.py``; parameters in millions. SUPERB's
    diarization errors are left out: they are counted in another way than s3prl's log does."""
    keys = ("ks_accuracy", "ic_accuracy", "pr_per", "asr_wer", "er_accuracy", "qbe_mtwv")
    keys += ("sf_f1", "sf_cer", "sid_accuracy", "asv_eer")
    return {"storage_mb": 2 * parameters, **dict(zip(keys, figures, strict=True))}


# In %.
SUPERB_FIGURES = {
    "HuBERT Base": _superb_row(
        94.68, 96.30, 98.34, 5.41, 6.42, 64.92, 7.36, 88.53, 25.20, 81.42, 5.11
    ),
    "DistilHuBERT": _superb_row(
        23.49, 95.98, 94.99, 16.27, 13.37, 63.02, 5.11, 82.57, 35.59, 73.54, 8.55
    ),
    "DPHuBERT": _superb_row(
        23.59, 96.36, 97.92, 9.67, 10.47, 63.16, 6.93, 86.86, 28.26, 76.83, 5.84
    ),
}


def paper_wer(precision: str, loss: str) -> float | None:
    """HuBERT-FastConv's word error rate in %; None where it is not known.

    Args:
        precision: a name without rules, ``float`` for the teacher.
        loss: ``distillation`` or ``hubert``.
    """
    key = "wer_hubert_loss" if loss == "hubert" and precision != "float" else "wer"
    rows = (r for r in TABLE if r.precision == precision and r.model == "fastconv_base")
    return next((row.cells.get(key) for row in rows), None)
