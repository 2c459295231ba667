"""Squared errors between teacher and student (Yeh et al. 1.2; normalisation: docs/numerics.md)."""

from torch import Tensor


def feature_error(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """Mean squared error over valid frames and features.

    Args:
        student, teacher: [batch, frames, features].
        valid: [batch, frames] bool; None when all frames are valid.

    Returns:
        () fp32.
    """
    error = (student.float() - teacher.float()).square().mean(-1)
    return _mean(error, valid)


def attention_error(
    student: Tensor, teacher: Tensor, valid: Tensor | None, center: bool = False
) -> Tensor:
    """Squared error summed over keys, mean over valid query rows and heads.

    Averaged over keys instead it would be about 1e-5 even for unrelated maps: switched off.

    Args:
        student, teacher: [batch, heads, queries, keys]; padded keys are equal in both.
        valid: [batch, queries] bool; None when all are valid.
        center: subtract each row's mean over valid keys first (for scores, which the softmax
            knows only up to a constant).

    Returns:
        () fp32.
    """
    difference = student.float() - teacher.float()
    if center:
        difference = _centered(difference, valid)
    return _mean(difference.square().sum(-1).mean(1), valid)


def _centered(difference: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return difference - difference.mean(-1, keepdim=True)
    keys = valid[:, None, None]
    mean = (difference * keys).sum(-1, keepdim=True) / keys.sum(-1, keepdim=True)
    return (difference - mean) * keys


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of [batch, frames] over valid frames."""
    if valid is None:
        return rows.mean()
    return (rows * valid).sum() / valid.sum().clamp_min(1)
