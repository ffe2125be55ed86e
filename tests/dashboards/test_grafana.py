"""The Grafana dashboards: the same bytes every time, and SQL that answers as the HTML view's does."""

import json
import re
from pathlib import Path

import pytest

from dashboards.config import DashboardsConfig
from dashboards.grafana import dumps, export, grafana_dashboards, grafana_sql
from dashboards.panel import Panel
from dashboards.panels import PANELS
from dashboards.window import Window, between
from tests.dashboards.stored import StoreProcess

GOLDEN = Path(__file__).parents[2] / "compose" / "grafana" / "dashboards" / "inferwatch-overview.json"


def expanded(sql: str, window: Window, tenant: str) -> str:
    """What Grafana's ClickHouse data source makes of its macros, and Grafana of the variable."""
    start, end = (f"fromUnixTimestamp64Milli({moment})" for moment in (window.from_ms, window.to_ms - 1))
    for macro, meaning in (
        (r"\$__timeFilter_ms\((\w+)\)", rf"\1 >= {start} AND \1 <= {end}"),
        (r"\$__timeInterval\((\w+)\)", rf"toStartOfInterval(toDateTime(\1), INTERVAL {window.bucket_s} second)"),
        (r"\$__fromTime_ms", start),
        (r"\$__toTime_ms", end),
        (r"\$__interval_s", str(window.bucket_s)),
        (r"\$\{tenant:sqlstring\}", f"'{tenant}'"),
    ):
        sql = re.sub(macro, meaning, sql)
    return sql


def test_the_dashboard_is_the_golden_one() -> None:
    """A change of a panel shows in the golden file: `inferwatch dashboards export` writes it anew."""
    assert dumps(grafana_dashboards()["inferwatch-overview"]) == GOLDEN.read_text(encoding="utf-8")


def test_export_writes_the_same_files_twice(tmp_path: Path) -> None:
    """The files are named for the dashboards, are whole JSON, and don't change when written again."""
    files = export(tmp_path / "new" / "folder")
    first = [file.read_bytes() for file in files]
    assert [file.name for file in files] == ["inferwatch-overview.json"]
    assert [file.read_bytes() for file in export(tmp_path / "new" / "folder")] == first
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["inferwatch-overview.json"]
    assert json.loads(first[0])["uid"] == "inferwatch-overview"


@pytest.mark.parametrize("tenant", ["", "acme"])
@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_grafanas_sql_answers_as_the_views_does(seeded: StoreProcess, end_us: int, panel: Panel, tenant: str) -> None:
    """With the macros expanded as the data source does, each panel gives the rows that the HTML view draws."""
    window = between((end_us - 5_400_000_000) // 1000, end_us // 1000)
    ours = seeded.query(panel.query(), {**window.parameters(), "tenant": tenant})
    theirs = seeded.query(expanded(grafana_sql(panel), window, tenant), {})
    assert theirs == ours
    assert theirs


def test_no_parameter_of_the_view_is_left_in_grafanas_sql() -> None:
    """`{name:Type}` means nothing to Grafana, and every `$` is a macro or variable of it."""
    for panel in PANELS:
        sql = grafana_sql(panel)
        assert not re.search(r"\{\w+:\w+\}", sql.replace("${tenant:sqlstring}", ""))
        assert set(re.findall(r"\$\w+|\$\{[^}]*\}", sql)) <= {
            "$__fromTime_ms", "$__toTime_ms", "$__timeFilter_ms", "$__timeInterval", "$__interval_s",
            "${tenant:sqlstring}",
        }  # fmt: skip


def test_every_panel_is_there_once_without_overlap() -> None:
    """Each panel keeps its title, asks the ClickHouse data source, and no two share a place."""
    panels = grafana_dashboards()["inferwatch-overview"]["panels"]
    assert isinstance(panels, list)
    assert [panel["title"] for panel in panels] == [panel.title for panel in PANELS]
    assert len({panel["id"] for panel in panels}) == len(PANELS)
    assert {panel["datasource"]["type"] for panel in panels} == {"grafana-clickhouse-datasource"}
    assert all(panel["options"] is not None for panel in panels)
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) == 23


def test_the_watch_line_of_the_config_reaches_grafana() -> None:
    """`[dashboards.watch] latency = 5000` is a dashed threshold of that panel."""
    built = grafana_dashboards(DashboardsConfig(watch={"latency": 5_000}))["inferwatch-overview"]["panels"]
    assert isinstance(built, list)
    latency = next(panel for panel in built if panel["title"] == "Latency")
    assert latency["fieldConfig"]["defaults"]["thresholds"]["steps"][1] == {"color": "orange", "value": 5_000.0}
