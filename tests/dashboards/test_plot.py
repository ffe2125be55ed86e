"""Plots drawn from data."""

import re

from dashboards.panel_html import lines_of
from dashboards.panels import BY_NAME
from dashboards.plot import Limit, Line, Mark, draw, line_path, top_of
from dashboards.units import ticks
from dashboards.window import Window

HOUR = Window(1_790_002_800_000, 1_790_006_400_000, 900, "1h")


def test_a_gap_lifts_the_pen_and_a_lone_value_is_a_dot() -> None:
    """Three stretches: a line of two, nothing, a dot, nothing, a dot at the end."""
    path = line_path((0.0, 50.0, None, 100.0, None, 25.0), 100.0)
    assert path == "M83.3 1000.0L250.0 500.0M583.3 0.0h0.01M916.7 750.0h0.01"


def test_values_are_placed_to_scale_and_kept_inside() -> None:
    """0 is the floor, the top is the top; what lies beyond is cut at the edge."""
    assert line_path((0.0, 10.0, 20.0, -5.0), 10.0) == "M125.0 1000.0L375.0 0.0L625.0 0.0L875.0 1000.0"


def test_the_top_counts_stacks_and_near_limits() -> None:
    """Stacked values add up; a limit within four times the data is kept in sight, one far above is not."""
    lines = [Line("a", "c1", (1.0, 2.0)), Line("b", "c2", (3.0, None))]
    assert top_of(lines, stacked=True) == 4.0
    assert top_of(lines, stacked=False) == 3.0
    assert top_of(lines, stacked=False, limits=[Limit(10.0, "watch")]) == 10.0
    assert top_of(lines, stacked=False, limits=[Limit(13.0, "watch")]) == 3.0
    assert top_of([], stacked=False) == 0.0


def test_bars_are_stacked_on_each_other() -> None:
    """The second series begins where the first ends."""
    drawn = draw(
        HOUR,
        [Line("a", "c1", (2.0, None, 0.0, 1.0)), Line("b", "c2", (2.0, 4.0, 0.0, None))],
        title="T",
        unit="count",
        stacked=True,
    )
    top = ticks(4.0 * 1.06)[-1]
    first, second = re.findall(r'class="bar c\d" d="([^"]*)"', drawn)
    edge = f"{1000 * (1 - 2 / top):.1f}"
    assert first.startswith(f"M22.5 1000.0V{edge}")
    assert second.startswith(f"M22.5 {edge}V{1000 * (1 - 4 / top):.1f}")
    assert first.count("M") == 2
    assert second.count("M") == 2


def test_the_table_behind_a_plot_has_every_bucket_and_a_dash_for_a_gap() -> None:
    """What a screen reader and the read-out get is what was drawn."""
    drawn = draw(HOUR, [Line("p50", "c1", (100.0, None, 340.0, 1_500.0))], title="Latency", unit="ms")
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th><td>([^<]*)</td></tr>', drawn)
    assert rows == [
        ("2026-09-21 15:00:00", "100.0 ms"),
        ("2026-09-21 15:15:00", "–"),
        ("2026-09-21 15:30:00", "340.0 ms"),
        ("2026-09-21 15:45:00", "1,500.0 ms"),
    ]


def test_findings_lie_on_the_time_axis_where_they_happened() -> None:
    """A dot at the start, a line to the end, a link; outside the window none; lanes keep them apart."""
    quarter_ms = 900_000
    marks = [
        Mark("a" * 32, "latency", "high", "slow <b>", HOUR.from_ms + quarter_ms, HOUR.from_ms + 2 * quarter_ms),
        Mark("b" * 32, "latency", "low", "too", HOUR.from_ms + 1.5 * quarter_ms, HOUR.to_ms + 99),
        Mark("c" * 32, "latency", "low", "long ago", HOUR.from_ms - 9_000_000, HOUR.from_ms - 1),
    ]
    drawn = draw(HOUR, [Line("p50", "c1", (1.0,) * 4)], title="T", unit="ms", marks=marks)
    links = re.findall(r'<a href="/finding/(\w)\w*" class="mark (\w+)"[^>]*><title>([^<]*)</title>(<line[^>]*>)', drawn)
    assert [(uid, severity, text) for uid, severity, text, _ in links] == [
        ("a", "high", "slow &lt;b&gt;"),
        ("b", "low", "too"),
    ]
    assert 'x1="25.00%" x2="50.00%" y1="4"' in links[0][3]
    assert 'x1="37.50%" x2="100.00%" y1="11"' in links[1][3]
    assert drawn.count('class="band') == 2


def test_series_beyond_the_bound_are_counted_or_added_up() -> None:
    """Lines that are left out are counted; a stack keeps its height with `others`."""
    moment = HOUR.from_ms
    rows = [{"time": moment, "series": f"model-{index:02}", "value": float(index)} for index in range(20)]
    lines, left_out = lines_of(BY_NAME["block_rate"], rows, HOUR, 8)
    assert ([line.label for line in lines], left_out) == ([f"model-{index}" for index in range(12, 20)], 12)
    stacked, left_out = lines_of(BY_NAME["requests"], rows, HOUR, 8)
    assert (stacked[-1].label, stacked[-1].values[0], left_out) == ("others", sum(range(12)), 0)


def test_known_series_keep_their_order_and_missing_counts_beside_others_are_none() -> None:
    """`ok` is stacked first in its own colour; a bucket where nothing was counted stays a gap."""
    rows = [
        {"time": HOUR.from_ms, "series": "rejected", "value": 2.0},
        {"time": HOUR.from_ms, "series": "ok", "value": 5.0},
        {"time": HOUR.from_ms + 900_000, "series": "ok", "value": 7.0},
    ]
    lines, _ = lines_of(BY_NAME["requests"], rows, HOUR, 8)
    assert lines == [Line("ok", "calm", (5.0, 7.0, None, None)), Line("rejected", "c4", (2.0, 0.0, None, None))]
