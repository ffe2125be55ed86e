"""Fills panels: asks what a panel needs, draws the answer, and turns trouble into the panel's own sentence."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import structlog

from dashboards import lookups
from dashboards.answers import Answers, Trouble
from dashboards.cells import SEVERITIES
from dashboards.config import DashboardsConfig
from dashboards.markup import Markup, element, shown
from dashboards.panel import BOUND, Panel, Row
from dashboards.panel_html import framed, listing, sentence, stat, status, timeseries
from dashboards.panels import PANELS, STATS
from dashboards.plot import Mark
from dashboards.scope import Scope, moment_ms

log = structlog.get_logger(__name__)


class Boards:
    """Draws panels for the pages of one application."""

    def __init__(self, answers: Answers, config: DashboardsConfig) -> None:
        self._answers = answers
        self._config = config

    async def panel(self, panel: Panel, scope: Scope, *, rows_max: int | None = None) -> Markup:
        """One panel, always: where it can't be answered, with the sentence that says why."""
        try:
            body = await self._body(panel, scope, rows_max or panel.rows)
        except Trouble as trouble:
            return framed(panel, sentence(str(trouble), "bad"), scope, trouble=True)
        except Exception as error:  # noqa: BLE001  # a row of an unforeseen shape must not take the page down
            log.warning("panel not drawn", panel=panel.name, error=type(error).__name__)
            told = f"The answer could not be drawn ({type(error).__name__}): please report this panel."
            return framed(panel, sentence(told, "bad"), scope, trouble=True)
        return framed(panel, body, scope)

    async def overview(self, scope: Scope) -> AsyncIterator[Markup]:
        """All panels in their order, each as soon as it and those before it are done."""
        tasks = {panel.name: asyncio.create_task(self.panel(panel, scope)) for panel in PANELS}
        try:
            yield element("div", {"class": "tiles"}, [await tasks[panel.name] for panel in STATS])
            yield Markup('<div class="board">')
            for panel in PANELS[len(STATS) :]:
                yield await tasks[panel.name]
            yield Markup("</div>")
        finally:
            for task in tasks.values():
                task.cancel()

    async def marks(self, scope: Scope) -> list[Mark]:
        """The findings of the window for the time axes; none where they can't be had, since the plots matter more."""
        try:
            rows = await self._answers.rows(lookups.MARKS, scope.parameters())
        except Trouble:
            return []
        return [_mark(row) for row in rows]

    async def tenants(self) -> list[str]:
        """The tenants that have events; none where they can't be had."""
        try:
            return [str(row["tenant"]) for row in await self._answers.rows(lookups.TENANTS, {})]
        except Trouble:
            return []

    async def _body(self, panel: Panel, scope: Scope, rows_max: int) -> Markup:
        watch_from = self._config.watch.get(panel.name, panel.watch_from)
        rows = await self._answers.rows(panel.query(BOUND | self._config.pieces()), scope.parameters())
        match panel.kind:
            case "timeseries":
                marks = await self.marks(scope)
                series_max = self._config.series_max
                return timeseries(panel, rows, scope, series_max=series_max, watch_from=watch_from, marks=marks)
            case "stat":
                before: Sequence[Row] = []
                if panel.compared:
                    before = await self._answers.rows(panel.query(), scope.before().parameters())
                return stat(panel, rows, before, scope, watch_from)
            case "table":
                return listing(panel, rows, scope, rows_max=rows_max)
            case "status":
                return status(panel, rows)


def _mark(row: Row) -> Mark:
    severity = row["severity"]
    return Mark(
        uid=str(row["uid"]),
        detector=str(row["detector"]),
        severity=str(severity) if severity in SEVERITIES else "info",
        text=f"{shown(row['detector'], 40)}: {shown(row['summary'], 200)}",
        first_ms=moment_ms(row["first_seen"]),
        last_ms=moment_ms(row["last_seen"]),
    )
