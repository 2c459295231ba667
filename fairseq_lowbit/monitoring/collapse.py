"""Whether a quantizer still carries information, by the health records of a run."""

from collections.abc import Iterable

from fairseq_lowbit.monitoring.health import QuantizerHealth

_CLIPPED = 0.99
_AT_FLOOR = 0.5
_FAITHFUL_DB = 10.0
_NAMED = 5


def collapse(quantizer: QuantizerHealth) -> str | None:
    """Why a quantizer counts as collapsed, in words; None if it does not.

    A quantizer that reproduces its input faithfully has not collapsed, whatever levels it uses: one
    level is enough for uniform attention, and a scale at its smallest value for tiny inputs. That
    is checked first, since such a scale clips everything too.
    """
    if quantizer.sqnr_db >= _FAITHFUL_DB:
        return None
    if quantizer.at_floor >= _AT_FLOOR:
        return "scale at its smallest value"
    if quantizer.clipped >= _CLIPPED:
        return f"{quantizer.clipped:.0%} of its values clipped"
    if quantizer.levels_used * 2**quantizer.bits < 1.5:
        return f"1 of {2**quantizer.bits} levels in use"
    return None


class CollapseWatch:
    """Warns once about each collapsed quantizer, and again only after it has recovered."""

    def __init__(self) -> None:
        self._collapsed: set[str] = set()

    def warning(self, quantizers: Iterable[QuantizerHealth]) -> str | None:
        """The warning due after one health record; None when nothing collapsed since the last."""
        reasons = {entry.name: collapse(entry) for entry in quantizers}
        reasons = {name: reason for name, reason in reasons.items() if reason}
        new = [f"{n} ({reason})" for n, reason in reasons.items() if n not in self._collapsed]
        self._collapsed = set(reasons)
        if not new:
            return None
        more = f" and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
        return (
            "collapsed quantizers, whose output carries no information: "
            f"{', '.join(new[:_NAMED])}{more}. They seldom recover: "
            "go back to an earlier checkpoint and lower optimizer.scale_lr_ratio, "
            "optimizer.shift_lr_ratio or optimization.lr, or give these modules more bits with "
            "model.precision.rules"
        )
