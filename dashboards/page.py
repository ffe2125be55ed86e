"""The frame of every page: head, bar with the time picker, main part. The policy forbids inline script and style."""

from collections.abc import Sequence
from typing import Final

from dashboards.config import RANGES_S
from dashboards.markup import Markup, element, joined, shown
from dashboards.scope import Scope
from dashboards.units import clock

THEMES: Final = ("light", "dark")
_NAMES: Final = {"15m": "15 min", "1h": "1 h", "6h": "6 h", "24h": "24 h", "7d": "7 d"}


def page(
    title: str,
    main: object,
    scope: Scope,
    *,
    path: str,
    tenants: Sequence[str] = (),
    theme: str = "",
    refresh_s: int = 0,
) -> Markup:
    """A whole document. `path` is the page's own address, which the time picker leads back to."""
    return joined([opening(title, scope, path=path, tenants=tenants, theme=theme, refresh_s=refresh_s), main, CLOSING])


def opening(
    title: str, scope: Scope, *, path: str, tenants: Sequence[str] = (), theme: str = "", refresh_s: int = 0
) -> Markup:
    """Everything up to the main part, so that a page can be sent while its answers are still awaited."""
    head = element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, f"{shown(title, 80)} · inferwatch"),
        element("link", {"rel": "icon", "href": "/static/icon.svg", "type": "image/svg+xml"}),
        element("link", {"rel": "stylesheet", "href": "/static/view.css"}),
        element("script", {"src": "/static/theme.js"}),
        element("script", {"src": "/static/view.js", "defer": True}),
        element("noscript", None, element("meta", {"http-equiv": "refresh", "content": max(30, refresh_s)}))
        if refresh_s
        else None,
    )
    attributes = {"lang": "en", "data-theme": theme if theme in THEMES else None}
    tag = Markup(str(element("html", attributes)).removesuffix("</html>"))
    skip = element("a", {"class": "skip", "href": "#main"}, "Skip to the panels")
    bar = _bar(scope, path, tenants, refresh_s)
    return joined([Markup("<!doctype html>\n"), tag, head, Markup("<body>"), skip, bar, Markup('<main id="main">')])


CLOSING: Final = Markup(
    '</main><aside id="drawer" class="drawer" hidden aria-label="Finding" tabindex="-1"></aside></body></html>\n'
)


def _bar(scope: Scope, path: str, tenants: Sequence[str], refresh_s: int) -> Markup:
    links = element(
        "nav",
        {"aria-label": "Pages", "class": "pages"},
        (
            element("a", {"href": scope.link(where), "aria-current": "page" if where == path else None}, name)
            for where, name in (("/", "Overview"), ("/panel/findings", "Findings"), ("/events", "Events"))
        ),
    )
    live = element(
        "div",
        {"class": "clock"},
        element("span", {"id": "live", "role": "status", "data-refresh": refresh_s}, f"{clock(scope.now_ms)[11:]} UTC"),
        element("button", {"id": "pause", "type": "button", "hidden": True}, "Pause") if refresh_s else None,
        element("button", {"id": "theme", "type": "button", "hidden": True}, "Theme"),
    )
    brand = element("a", {"class": "brand", "href": scope.link("/")}, _GLYPH, "inferwatch")
    return element("header", {"class": "bar"}, brand, links, _picker(scope, path, tenants), live)


_GLYPH: Final = Markup(
    '<svg viewBox="0 0 24 24" width="20" height="20" aria-hidden="true">'
    '<path d="M2 12h4l3-8 5 16 3-8h5" fill="none" stroke="currentColor" stroke-width="2.2" '
    'stroke-linecap="round" stroke-linejoin="round"/></svg>'
)


def _picker(scope: Scope, path: str, tenants: Sequence[str]) -> Markup:
    """Links for the usual ranges, a form for another one, a choice of tenants where there are several."""
    window = scope.window
    ranges = (
        element(
            "a",
            {
                "href": scope.link(path, range=name, **{"from": "", "to": ""}),
                "aria-current": "true" if window.name == name else None,
                "data-range": index + 1,
            },
            _NAMES[name],
        )
        for index, name in enumerate(RANGES_S)
    )
    addressed = "" if window.name else f"{clock(window.from_ms, seconds=False)} – {clock(window.to_ms, seconds=False)}"
    own = element(
        "details",
        {"class": "own"},
        element("summary", {"aria-current": None if window.name else "true"}, addressed or "Custom"),
        element(
            "form",
            {"method": "get", "action": path},
            _moment("from", "From (UTC)", window.from_ms),
            _moment("to", "To (UTC)", window.to_ms),
            element("input", {"type": "hidden", "name": "tenant", "value": scope.tenant}) if scope.tenant else None,
            element("button", {"type": "submit"}, "Show"),
        ),
    )
    return element(
        "nav",
        {"aria-label": "Time range", "class": "picker"},
        _tenants(scope, path, tenants),
        element("div", {"class": "ranges"}, ranges, own),
    )


def _moment(name: str, label: str, value_ms: int) -> Markup:
    value = clock(value_ms).replace(" ", "T")
    field = element("input", {"type": "datetime-local", "name": name, "value": value, "step": 1, "required": True})
    return element("label", None, label, " ", field)


def _tenants(scope: Scope, path: str, tenants: Sequence[str]) -> Markup | None:
    if len(tenants) < 2 and not scope.tenant:
        return None
    names = [*tenants, *([scope.tenant] if scope.tenant and scope.tenant not in tenants else [])]
    chosen = shown(scope.tenant, 24) or "all tenants"
    items = (
        element("li", None, element("a", {"href": scope.link(path, tenant=name)}, shown(name, 60) or "all tenants"))
        for name in ("", *names)
    )
    return element("details", {"class": "own"}, element("summary", None, chosen), element("ul", None, items))
