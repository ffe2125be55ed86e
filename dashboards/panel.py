"""What a panel is: one question, one query, and how the answer is drawn. The panels themselves are in `panels.py`."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Template
from typing import Final, Literal

from detectors.budget import BUDGET, PARTS, per_week

Kind = Literal["timeseries", "table", "stat", "status"]
Shown = Literal["text", "time", "number", "severity", "state", "summary", "entity", "evidence", "process", "span"]
"""How a column of a table is drawn. `summary` links to the finding, `entity` to the events of that entity, `process`
is a state word, `span` a duration in seconds."""

BOUND: Final[dict[str, str]] = {
    "from": "fromUnixTimestamp64Milli({from_ms:Int64})",
    "to": "fromUnixTimestamp64Milli({to_ms:Int64})",
    "in_range": "timestamp >= fromUnixTimestamp64Milli({from_ms:Int64}) "
    "AND timestamp < fromUnixTimestamp64Milli({to_ms:Int64})",
    "bucket": "toDateTime(intDiv(toUnixTimestamp(timestamp), {bucket_s:UInt32}) * {bucket_s:UInt32}, 'UTC')",
    "bucket_s": "{bucket_s:UInt32}",
    "tenant": "({tenant:String} = '' OR tenant = {tenant:String})",
    "budget_a_week": str(per_week(BUDGET)),
}
"""All that a panel's SQL takes from outside, as parameters that the store binds. `grafana.py` has the same names as
macros of Grafana's ClickHouse data source."""

SHARED: Final[dict[str, str]] = {
    "events": "events\nWHERE $in_range AND $tenant AND NOT duplicate AND NOT quarantined",
    "answered": "status IN ('ok', 'blocked_output')",
    "budget_shares": "[{}]".format(", ".join(f"('{part.detector}', {part.share})" for part in PARTS)),
}
"""What panels mean by the same words."""


Row = Mapping[str, object]
"""A row of an answer: column → value."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A value column of the answer, as a line or as a part of a stat."""

    column: str
    label: str
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    column: str
    label: str
    shown: Shown = "text"
    unit: str = "count"
    watch_from: float | None = None
    """From this value on the cell asks for attention."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel. Which columns the answer of its SQL must have depends on `kind`:

    timeseries  `time`, and the columns of `series`; or `time`, `series` (the name) and `value` where `by` is set
    table       the columns of `columns`
    stat        one row: `value`, and the columns of `series` as its parts
    status      rows of `label`, `value` (text) and `tone` (watch, bad or nothing)
    """

    name: str
    title: str
    answers: str
    kind: Kind
    sql: str
    """With `$name` for the pieces of `BOUND` and `SHARED`."""
    unit: str = "count"
    series: tuple[Series, ...] = ()
    by: str = ""
    tones: Mapping[str, str] = field(default_factory=dict)
    """Where `by` is set: the tone of known names, in the order they are stacked."""
    stacked: bool = False
    columns: tuple[Column, ...] = ()
    watch_from: float | None = None
    """From this value on a stat asks for attention; in a plot it is a line. `[dashboards.watch]` sets others."""
    rows: int = 8
    """Rows of a table on the overview; all of them are on the panel's own page."""
    detectors: tuple[str, ...] = ()
    """The findings of these detectors are marked on the time axis."""
    width: Literal[2, 4, 6, 8] = 4
    """Of the twelve columns of the page."""
    empty: str = "No events in this time range."
    """What the panel says when the answer has no rows."""
    compared: bool = False
    """A stat that is also shown against the stretch of the same length before."""

    def query(self, pieces: Mapping[str, str] = BOUND) -> str:
        """The SQL with its pieces put in. Raises KeyError where it names one that is not there."""
        return put_in(self.sql, pieces)


def put_in(sql: str, pieces: Mapping[str, str] = BOUND) -> str:
    """`sql` with `SHARED` and then `pieces` put in."""
    return Template(Template(inspect.cleandoc(sql)).safe_substitute(SHARED)).substitute(pieces)
