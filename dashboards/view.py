"""The built-in HTML view: `make_view(query, config)` is an aiohttp application for the store's process to serve.

Pages   /              all panels          /panel/NAME     one panel, large (`?part=1`: its section)
        /finding/UID   one finding         /events         events by user, session, model, prompt hash …
Every page takes `range` (15m, 1h, 6h, 24h, 7d) or `from` and `to` (ISO 8601), `tenant`, and `theme`.

It only reads, keeps nothing, and makes no request to anywhere. What the store can't answer is told in its place.
"""

import time
from collections.abc import Callable
from importlib.resources import files
from typing import Final

import msgspec
import structlog
from aiohttp import web

from dashboards import lookups
from dashboards.answers import Answers, Query, Trouble
from dashboards.boards import Boards
from dashboards.config import DashboardsConfig
from dashboards.events_page import events_article, filters_of
from dashboards.finding_page import Seen, article, plot_of, window_around
from dashboards.markup import Markup, element
from dashboards.page import CLOSING, opening, page
from dashboards.panel import Row
from dashboards.panel_html import sentence
from dashboards.panels import BY_NAME
from dashboards.scope import Scope, scope_of
from dashboards.shield import add_headers, shield
from dashboards.window import BadWindow
from detectors.finding import Finding, decode

__all__ = ["Query", "make_view", "serve_view"]

log = structlog.get_logger(__name__)

STATIC: Final = {
    "view.css": "text/css",
    "view.js": "text/javascript",
    "theme.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
UID_CHARACTERS_MAX: Final = 64


def make_view(
    query: Query, config: DashboardsConfig, *, clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
) -> web.Application:
    """The application. `query` blocks and is called in threads; whatever it raises becomes a sentence on the page."""
    view = _View(query, config, clock_ms)
    app = web.Application(middlewares=[shield(config)])
    app.on_response_prepare.append(add_headers)
    app.on_cleanup.append(view.close)
    app.add_routes(
        [
            web.get("/", view.overview),
            web.get("/panel/{name}", view.panel),
            web.get("/finding/{uid}", view.finding),
            web.get("/events", view.events),
            web.get("/static/{name}", view.static),
        ]
    )
    return app


async def serve_view(app: web.Application, config: DashboardsConfig) -> tuple[web.AppRunner, str]:
    """Serves the view at `config.host:port` and gives its address; `await runner.cleanup()` ends it.

    Raises OSError with one sentence where the port is taken.
    """
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, config.host, config.port).start()
    except OSError as error:
        await runner.cleanup()
        raise OSError(
            f"the HTML view can't listen on {config.host} port {config.port} ({error.strerror}): "
            "set dashboards.port, or 0 for any free one"
        ) from None
    host = f"[{config.host}]" if ":" in config.host else config.host
    return runner, f"http://{host}:{runner.addresses[0][1]}"


class _View:
    """The handlers. State: only remembered answers, in `Answers`."""

    def __init__(self, query: Query, config: DashboardsConfig, clock_ms: Callable[[], int]) -> None:
        self._config = config
        self._clock_ms = clock_ms
        self._answers = Answers(query, config)
        self._boards = Boards(self._answers, config)
        folder = files("dashboards") / "static"
        self._static = {name: (folder / name).read_bytes() for name in STATIC}

    async def close(self, _app: web.Application) -> None:
        self._answers.close()

    async def overview(self, request: web.Request) -> web.StreamResponse:
        """Sent panel by panel, so that a slow one holds back only those after it."""
        scope = self._scope(request)
        response = web.StreamResponse(headers={"Content-Type": "text/html; charset=utf-8"})
        response.enable_compression()
        tenants = await self._boards.tenants()
        refresh_s = self._config.refresh_s
        start = opening("Overview", scope, path="/", tenants=tenants, theme=_theme(request), refresh_s=refresh_s)
        await response.prepare(request)
        await response.write(start.encode())
        if request.method == "GET":
            async for part in self._boards.overview(scope):
                await response.write(part.encode())
        await response.write(CLOSING.encode())
        await response.write_eof()
        return response

    async def panel(self, request: web.Request) -> web.Response:
        """One panel on a page of its own, or only its section."""
        panel = BY_NAME.get(request.match_info["name"])
        if panel is None:
            raise web.HTTPNotFound(reason="There is no such panel.")
        scope = self._scope(request)
        part, large = request.query.get("part"), request.query.get("large")
        drawn = await self._boards.panel(panel, scope, rows_max=self._config.rows_max if large or not part else None)
        if part:
            return _html(drawn)
        main = element("div", {"class": "alone"}, drawn)
        return await self._page(request, panel.title, main, scope, refresh_s=self._config.refresh_s)

    async def finding(self, request: web.Request) -> web.Response:
        """One finding. `?part=1` gives only the article, for the drawer."""
        scope = self._scope(request)
        uid = request.match_info["uid"]
        try:
            rows = await self._answers.rows(lookups.REVISIONS, {"uid": uid[:UID_CHARACTERS_MAX]})
        except Trouble as trouble:
            return await self._answer(request, sentence(str(trouble), "bad"), scope, 503)
        if not rows:
            return await self._answer(request, sentence("There is no finding with this uid in the store."), scope, 404)
        try:
            finding = decode(str(rows[0]["json"]).encode())
        except msgspec.DecodeError:
            told = "This finding is stored in a form this version of inferwatch can't read."
            return await self._answer(request, sentence(told, "bad"), scope, 502)
        around = Scope(window_around(finding), finding.tenant, scope.now_ms)
        plot = await self._boards.panel(BY_NAME[plot_of(finding)], around)
        seen = Seen(finding, rows, await self._samples(finding, around), plot)
        return await self._answer(request, article(seen, scope), scope, 200, title=f"{finding.detector} finding")

    async def events(self, request: web.Request) -> web.Response:
        """Events, newest first."""
        scope = self._scope(request)
        filters = filters_of(request.query)
        try:
            rows = await self._answers.rows(
                lookups.EVENTS, {**scope.parameters(), **filters, "rows": lookups.EVENTS_PAGE}
            )
            main = events_article(rows, filters, scope)
        except Trouble as trouble:
            main = sentence(str(trouble), "bad")
        return await self._page(request, "Events", main, scope)

    async def static(self, request: web.Request) -> web.Response:
        """The style sheet, the scripts and the icon: four known names, nothing from the file system."""
        name = request.match_info["name"]
        if name not in STATIC:
            raise web.HTTPNotFound(reason="There is no such file.")
        return web.Response(body=self._static[name], content_type=STATIC[name], charset="utf-8")

    async def _samples(self, finding: Finding, around: Scope) -> list[Row] | str:
        if not finding.evidence.event_ids:
            return "This finding names no sample events."
        parameters = {**around.parameters(), "ids": finding.evidence.event_ids, "rows": lookups.EVENTS_PAGE}
        try:
            rows = await self._answers.rows(lookups.SAMPLES, parameters)
        except Trouble as trouble:
            return str(trouble)
        return rows or "The sample events are no longer in the store."

    async def _answer(
        self, request: web.Request, main: Markup, scope: Scope, status: int, title: str = "Finding"
    ) -> web.Response:
        if request.query.get("part"):
            return _html(main, status)
        path = f"/finding/{request.match_info['uid'][:UID_CHARACTERS_MAX]}"
        whole = page(title, element("div", {"class": "alone"}, main), scope, path=path, theme=_theme(request))
        return _html(whole, status)

    async def _page(
        self, request: web.Request, title: str, main: Markup, scope: Scope, *, refresh_s: int = 0
    ) -> web.Response:
        tenants = await self._boards.tenants()
        whole = page(title, main, scope, path=request.path, tenants=tenants, theme=_theme(request), refresh_s=refresh_s)
        return _html(whole)

    def _scope(self, request: web.Request) -> Scope:
        try:
            return scope_of(request.query, self._config.default_range, self._clock_ms())
        except BadWindow as error:
            raise web.HTTPBadRequest(reason=str(error)) from None


def _theme(request: web.Request) -> str:
    return request.query.get("theme", "")


def _html(content: Markup, status: int = 200) -> web.Response:
    return web.Response(status=status, text=str(content), content_type="text/html", charset="utf-8")
