"""Curves keep their extremes however many rows there are, and whatever the numbers are, the drawing is sound."""

import re

import numpy as np
import pytest

from jaxdit import charts
from jaxdit.charts import Line


def coordinates(html):
    return [float(value) for path in re.findall(r' d="([^"]*)"', html) for value in re.findall(r"-?\d+\.?\d*", path)]


def test_thinning_keeps_every_extreme_and_the_mean():
    chance = np.random.default_rng(0)
    steps = np.cumsum(chance.integers(1, 40, 40_000)).astype(float)
    values = chance.normal(5, 1, 40_000)
    values[chance.integers(0, 40_000, 4_000)] = np.nan
    values[12_345], values[33_333] = 90.0, -70.0
    thinned = charts.thin(steps, values)
    assert 0.9 * charts.COLUMNS < len(thinned.step) <= charts.COLUMNS
    assert thinned.high.max() == 90 and thinned.low.min() == -70
    place = np.searchsorted(thinned.step, steps[12_345])
    assert 90 in thinned.high[max(place - 1, 0) : place + 1]  # where it happened
    assert (thinned.low <= thinned.mean).all() and (thinned.mean <= thinned.high).all()
    assert np.diff(thinned.step).min() > 0
    first = (steps - steps[0]) / (steps[-1] - steps[0]) < 1 / charts.COLUMNS
    assert thinned.mean[0] == pytest.approx(np.nanmean(values[first]))


def test_thinning_leaves_few_rows_as_they_are_and_logs_what_is_above_zero():
    steps, values = np.arange(1.0, 9), np.array([1, 0, 10, np.nan, -3, np.inf, 100, 1000])
    thinned = charts.thin(steps, values, log=True)
    assert thinned.step.tolist() == [1, 3, 7, 8] and thinned.mean == pytest.approx([1, 10, 100, 1000])
    merged = charts.thin(steps[[0, 2, 6]], values[[0, 2, 6]], log=True, columns=1)
    assert merged.mean == pytest.approx([10]) and (merged.low, merged.high) == (1, 100)
    assert len(charts.thin(steps, np.full(8, np.nan)).step) == 0


def test_smoothing_leaves_a_slope_a_slope():
    line = np.arange(40.0)
    np.testing.assert_allclose(charts.smooth(line, 9), line, atol=1e-9)
    spike = np.zeros(41)
    spike[20] = 9
    assert charts.smooth(spike, 9)[16:25] == pytest.approx([1] * 9) and charts.smooth(spike, 9)[15] == 0


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [[2.0], [2.0, 2.0], [0.0, 0.0, 0.0], [1e-9, 1e-8], [1e12, 3e12, np.nan], [-5.0, 5.0], list(range(3000)), [1.0] * 999 + [1e9]],
    ids=["one", "constant", "zeros", "tiny", "huge", "negative", "many", "spike"],
)  # fmt: skip
def test_a_chart_of_anything_is_finite_and_inside_its_frame(values, log):
    values = np.array(values)
    drawn = charts.chart("a & b", np.arange(1.0, len(values) + 1), [Line("x", values, band=True)], log=log)
    if log and not (values > 0).any():
        assert drawn == ""
        return
    assert "nan" not in drawn and "inf" not in drawn and "a &amp; b" in drawn
    assert min(coordinates(drawn)) >= -20 and max(coordinates(drawn)) <= charts.WIDTH + 20
    tops = [float(place) for place in re.findall(r"<i style=.top:([\d.]+)%", drawn)]
    assert all(0 <= place <= 100 for place in tops)


def test_a_chart_without_values_is_left_out():
    assert charts.chart("loss", np.arange(3.0), [Line("x", np.full(3, np.nan))]) == ""
    drawn = charts.chart("two", np.arange(3.0), [Line("x", np.full(3, np.nan)), Line("y", np.arange(3.0))])
    assert "legend" not in drawn and '<span class="now">2</span>' in drawn


def test_the_axis_of_a_curve_that_is_nothing_is_readable():
    drawn = charts.chart("copies", np.arange(3.0), [Line("x", np.zeros(3))], zero=True, percent=True)
    assert ">0%<" in drawn and "e-" not in drawn


def test_a_line_breaks_where_values_are_missing_for_long_and_not_where_they_are_sparse():
    steps = np.arange(1.0, 2001)
    values = np.sin(steps / 100)
    values[800:1000] = np.nan
    line = re.search(r'<path class="ca" d="([^"]*)"', charts.chart("a", steps, [Line("x", values)])).group(1)
    assert line.count("M") == 2
    sparse = np.where(steps % 20 == 0, np.sin(steps / 100), np.nan)
    line = re.search(r'<path class="ca" d="([^"]*)"', charts.chart("a", steps, [Line("x", sparse)])).group(1)
    assert line.count("M") == 1


def test_an_outlier_is_cut_and_its_value_told_and_a_high_start_is_not_worth_words():
    steps = np.arange(1.0, 2001)
    values = 0.5 + 0.01 * np.sin(steps)
    values[1499] = 1e6
    values[0] = 2.0
    drawn = charts.chart("loss", steps, [Line("x", values, band=True)])
    assert "highest 1e6 at step 1,500" in drawn
    high = max(float(word) for word in re.findall(r"<i [^>]*>([\d.]+)</i>", drawn))
    assert high < 2.5
    values[1499] = 0.5
    assert "highest" not in charts.chart("loss", steps, [Line("x", values, band=True)])


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (0.513, 0.552), (-3, 4000), (1e-9, 3e-9), (0, 1e9)):
        ticks = charts._ticks(low, high, 4)
        assert 2 <= len(ticks) <= 6 and low <= ticks[0] and ticks[-1] <= high * (1 + 1e-9), ticks
    for low, high in ((0.9, 1.1), (0.13, 6.6), (1e-8, 1e3)):
        assert 1 <= len(charts._log_ticks(low, high)) <= 8


def test_marks_and_stretches_stand_at_their_steps():
    steps = np.arange(1.0, 1001)
    drawn = charts.chart("norm", steps, [Line("x", steps)], marks=np.array([500.0, 500.2, 1000.0]))
    assert re.search(r'class="rug" d="M500 300v-14M1000 300v-14"', drawn)
    band = charts.stretches([(0, 250, "good"), (250, 1000, "act")], 1000)
    assert 'class="good" x="0.00" width="250.00"' in band and 'class="act" x="250.00" width="750.00"' in band
