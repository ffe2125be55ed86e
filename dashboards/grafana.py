"""The same panels as dashboards for Grafana, with the official ClickHouse data source (grafana-clickhouse-datasource).

The SQL is the panels' own: `GRAFANA` writes the pieces that a panel takes from outside as macros of the data source
(`$__timeFilter_ms`, `$__timeInterval`, `$__interval_s` …) and as the dashboard's variable `tenant`. The data source's
`format` is 0 for time series and 1 for tables. The output is the same, byte for byte, for the same configuration.
"""

import json
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.builders import common, dashboard, stat, table, timeseries
from grafana_foundation_sdk.cog import builder as cog
from grafana_foundation_sdk.cog import variants
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

from dashboards.config import DashboardsConfig
from dashboards.panel import BOUND, Panel
from dashboards.panels import FINDINGS, PANELS

PLUGIN: Final = "grafana-clickhouse-datasource"
GRAFANA: Final[dict[str, str]] = {
    "from": "$__fromTime_ms",
    "to": "$__toTime_ms",
    "in_range": "$__timeFilter_ms(timestamp)",
    "bucket": "$__timeInterval(timestamp)",
    "bucket_s": "$__interval_s",
    "tenant": "(${tenant:sqlstring} = '' OR tenant = ${tenant:sqlstring})",
    "budget_a_week": BOUND["budget_a_week"],
}
UNITS: Final = {
    "count": "short",
    "per_minute": "cpm",
    "per_second": "cps",
    "ratio": "percentunit",
    "ms": "ms",
    "s": "s",
    "tokens": "short",
    "tokens_per_minute": "cpm",
}
COLOURS: Final = {
    "calm": "blue",
    "grey": "text",
    "bad": "red",
    "dark": "dark-purple",
    "c1": "blue",
    "c2": "orange",
    "c3": "green",
    "c4": "purple",
    "c5": "light-red",
}
SEVERITY_COLOURS: Final = {"critical": "red", "high": "orange", "medium": "yellow", "low": "blue", "info": "text"}
COLUMNS: Final = 24
HEIGHTS: Final = {"stat": 4, "timeseries": 8, "table": 9, "status": 9}
Builder = Any
"""A panel builder of the SDK: they share their methods, but no type."""


class ClickHouseQuery(variants.Dataquery):
    """A raw query of the ClickHouse data source, for which the SDK has no type."""

    def __init__(self, sql: str, *, series: bool) -> None:
        self._sql, self._series = sql, series

    def to_json(self) -> dict[str, object]:
        """As Grafana stores it."""
        return {
            "refId": "A",
            "datasource": {"type": PLUGIN, "uid": "${datasource}"},
            "editorType": "sql",
            "queryType": "timeseries" if self._series else "table",
            "format": 0 if self._series else 1,
            "rawSql": self._sql,
        }


class _Built(cog.Builder[variants.Dataquery]):
    def __init__(self, query: ClickHouseQuery) -> None:
        self._query = query

    def build(self) -> ClickHouseQuery:
        return self._query


def grafana_dashboards(config: DashboardsConfig | None = None) -> dict[str, dict[str, object]]:
    """Name (also the file's) → dashboard, ready for JSON. Raises nothing."""
    config = config or DashboardsConfig()
    built = (
        dashboard.Dashboard("inferwatch: overview")
        .uid("inferwatch-overview")
        .description("What the LLM inference servers are asked, what the guards block, what the detectors found.")
        .tags(["inferwatch", "llm", "security"])
        .timezone("utc")
        .refresh("30s")
        .time("now-6h", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(dashboard.DatasourceVariable("datasource").label("Store").type(PLUGIN).current(_chosen(config)))
        .with_variable(_tenant())
        .annotation(_findings_annotation())
    )
    x = y = row_height = 0
    for number, panel in enumerate(PANELS, 1):
        width, height = panel.width * 2, HEIGHTS[panel.kind]
        if x + width > COLUMNS:
            x, y, row_height = 0, y + row_height, 0
        place = models.GridPos(h=height, w=width, x=x, y=y)
        x, row_height = x + width, max(row_height, height)
        built = built.with_panel(_panel(panel, config).id(number).grid_pos(place))
    plain: dict[str, object] = json.loads(JSONEncoder(sort_keys=True).encode(built.build()))
    return {"inferwatch-overview": plain}


def export(folder: Path, config: DashboardsConfig | None = None) -> list[Path]:
    """Writes each dashboard to `FOLDER/NAME.json`, whole or not at all, and gives the files. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in grafana_dashboards(config).items():
        file = folder / f"{name}.json"
        temporary = file.with_suffix(".json.new")
        temporary.write_text(dumps(content), encoding="utf-8")
        temporary.replace(file)
        written.append(file)
    return written


def dumps(content: dict[str, object]) -> str:
    """The JSON of a dashboard as files hold it: keys in order, a newline at the end."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def grafana_sql(panel: Panel, config: DashboardsConfig | None = None) -> str:
    """The panel's SQL in the data source's macros."""
    return panel.query(GRAFANA | config.pieces() if config else GRAFANA)


def _panel(panel: Panel, config: DashboardsConfig) -> Builder:
    makers = {"timeseries": _timeseries, "stat": _stat, "table": _table, "status": _table}
    built = makers[panel.kind](panel, config.watch.get(panel.name, panel.watch_from))
    query = ClickHouseQuery(grafana_sql(panel, config), series=panel.kind == "timeseries")
    source = models.DataSourceRef(type_val=PLUGIN, uid="${datasource}")
    return built.title(panel.title).description(panel.answers).datasource(source).with_target(_Built(query))


def _timeseries(panel: Panel, watch_from: float | None) -> Builder:
    built = (
        timeseries.Panel()
        .unit(UNITS[panel.unit])
        .min(0)
        .line_width(0 if panel.stacked else 1)
        .fill_opacity(80 if panel.stacked else 0)
        .draw_style(common_models.GraphDrawStyle.BARS if panel.stacked else common_models.GraphDrawStyle.LINE)
        .show_points(common_models.VisibilityMode.AUTO)
        .span_nulls(False)
        .no_value(panel.empty)
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    )
    if panel.stacked:
        built = built.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    for series in panel.series:
        named = [models.DynamicConfigValue(id_val="displayName", value=series.label), *_colour(series.tone)]
        built = built.override_by_name(series.column, named)
    for name, tone in panel.tones.items():
        built = built.override_by_regexp(f"/\\b{name}$/", _colour(tone))
    if watch_from is not None:
        style = common.GraphThresholdsStyleConfig().mode(common_models.GraphTresholdsStyleMode.DASHED)
        built = built.thresholds(_thresholds(watch_from)).thresholds_style(style)
    return built


def _stat(panel: Panel, watch_from: float | None) -> Builder:
    built = stat.Panel().unit(UNITS[panel.unit]).graph_mode(common_models.BigValueGraphMode.NONE)
    reduced = common.ReduceDataOptions().calcs(["lastNotNull"]).fields("/^value$/").values(False)
    return built.reduce_options(reduced).thresholds(_thresholds(watch_from))


def _table(panel: Panel, _watch_from: float | None) -> Builder:
    built = table.Panel().no_value(panel.empty).show_header(True)
    wanted = {column.column: column for column in panel.columns}
    if wanted:
        only = {"include": {"names": list(wanted)}}
        built = built.with_transformation(models.DataTransformerConfig(id_val="filterFieldsByName", options=only))
    for name, column in wanted.items():
        properties = [models.DynamicConfigValue(id_val="displayName", value=column.label)]
        if column.shown in ("number", "span"):
            properties.append(models.DynamicConfigValue(id_val="unit", value=UNITS[column.unit]))
        if column.shown == "severity":
            properties += _severity_cells()
        built = built.override_by_name(name, properties)
    return built


def _severity_cells() -> list[models.DynamicConfigValue]:
    options = {name: {"color": colour, "text": name} for name, colour in SEVERITY_COLOURS.items()}
    return [
        models.DynamicConfigValue(id_val="mappings", value=[{"type": "value", "options": options}]),
        models.DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-text"}),
    ]


def _colour(tone: str) -> list[models.DynamicConfigValue]:
    if tone not in COLOURS:
        return []
    return [models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": COLOURS[tone]})]


def _thresholds(watch_from: float | None) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(value=None, color="text")]
    if watch_from is not None:
        steps.append(models.Threshold(value=watch_from, color="orange"))
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _chosen(config: DashboardsConfig) -> models.VariableOption:
    uid = config.grafana_datasource_uid
    return models.VariableOption(selected=True, text=uid, value=uid)


def _tenant() -> dashboard.QueryVariable:
    """All tenants, or one. The value for all is an empty SQL string: Grafana leaves that one as it is."""
    return (
        dashboard.QueryVariable("tenant")
        .label("Tenant")
        .datasource(models.DataSourceRef(type_val=PLUGIN, uid="${datasource}"))
        .query({"rawSql": "SELECT DISTINCT tenant FROM events_1m ORDER BY tenant LIMIT 200", "refId": "tenant"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value("''")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def _findings_annotation() -> dashboard.AnnotationQuery:
    """The findings on every time axis, as the HTML view marks them."""
    sql = (
        "SELECT first_seen AS time, last_seen AS timeEnd, concat(detector, ': ', summary) AS text, severity AS tags "
        "FROM findings_now WHERE last_seen >= $__fromTime_ms AND first_seen < $__toTime_ms LIMIT 200"
    )
    target = ClickHouseQuery(sql, series=False).to_json()
    built = dashboard.AnnotationQuery().name(FINDINGS.title).enable(True).icon_color("orange")
    built = built.datasource(models.DataSourceRef(type_val=PLUGIN, uid="${datasource}"))
    return _WithTarget(built, target)


class _WithTarget(dashboard.AnnotationQuery):
    """An annotation whose query is the data source's own; the SDK knows only Grafana's."""

    def __init__(self, built: dashboard.AnnotationQuery, target: dict[str, object]) -> None:
        super().__init__()
        self._internal = built.build()
        self._internal.target = target  # type: ignore[assignment]  # the data source's query, see above
