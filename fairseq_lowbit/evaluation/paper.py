"""Published results, to stand beside measured rows for orientation."""

SOURCE = "Yeh et al., arXiv 2301.00652: SUPERB ASR, no language model, trained on LibriSpeech 960 h"

# Word error rate in % by precision and loss, the cells of Table 1 that are known.
_WER = {
    ("float", "hubert"): 7.06,
    ("sqwq_w2", "distillation"): 12.56,
    ("bitl_w8a8", "distillation"): 7.03,
    ("bitl_w2a2", "distillation"): 10.80,
    ("bitla_w8a8", "distillation"): 7.07,
    ("bitla_w2a2", "distillation"): 12.68,
    ("bitla_w1a1", "distillation"): 15.96,
    ("bitla_w1a1", "hubert"): 18.93,
}


def paper_wer(precision: str, loss: str) -> float | None:
    """HuBERT-FastConv's word error rate in %; None where it is not known.

    Args:
        precision: a name without rules, ``float`` for the teacher.
        loss: ``distillation`` or ``hubert``.
    """
    return _WER.get((precision, loss))
