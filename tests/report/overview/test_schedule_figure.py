"""What the figure of schedules shows."""

import math

from fairseq_lowbit.report.overview.schedule_figure import draw_schedules
from fairseq_lowbit.runs.columns import COSINE, SNR
from fairseq_lowbit.runs.schedules import read_schedules
from tests.runs.test_schedules import PREVIOUS, entry, whole


def test_every_curve_with_its_bars_and_gaps() -> None:
    schedules = read_schedules([*whole(), entry("w1a1", 5.0, 1, PREVIOUS)])
    figure = draw_schedules(schedules, (SNR, COSINE))
    snr, cosine = figure.axes
    assert [label.get_text() for label in snr.get_xticklabels()] == ["W8A8", "W2A2", "W1A1"]
    one_step, _, previous = snr.containers
    means = [list(container.lines[0].get_ydata()) for container in snr.containers]
    assert means[:2] == [[31.0, 11.0, 5.0], [30.0, 10.0, 4.0]]
    assert math.isnan(means[2][0])
    assert means[2][2] == 5.0
    # A bar is as long as the deviation each way; a single seed has none.
    (bars,) = one_step.lines[2]
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == (31 - 2**0.5, 31 + 2**0.5)
    (bars,) = previous.lines[2]
    assert not any(len(segment) for segment in bars.get_segments())
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*(curve.label for curve in schedules.curves), "teacher"]
    assert len(cosine.containers) == 3  # not measured, and yet a panel that says so
