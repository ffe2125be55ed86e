"""What stands between a browser and the view: reading only, known hosts only, no other site, nothing foreign on a page.

The view has no log-in and listens on loopback; these rules keep other pages in the same browser from reading it. A
hostile site can neither frame it, nor fetch it, nor reach it under a name of its own (DNS rebinding).
"""

from collections.abc import Iterable
from typing import Final

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from dashboards.config import DashboardsConfig

log = structlog.get_logger(__name__)

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
EVERY_ADDRESS: Final = ("0.0.0.0", "::")  # noqa: S104  # these names are taken off the list, not bound


def shield(config: DashboardsConfig) -> Middleware:
    """The middleware. Refuses with one sentence: 405 writing, 421 unknown hosts, 403 requests from other sites."""
    own = () if config.host in EVERY_ADDRESS else (config.host,)
    names = frozenset(name.lower().rstrip(".") for name in (*LOCAL_NAMES, *own, *config.allowed_hosts))

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        refusal = _refusal(request, names)
        if refusal is not None:
            return refusal
        try:
            return await handler(request)
        except web.HTTPException as error:
            return web.Response(status=error.status, text=f"{error.reason}\n")
        except Exception as error:  # noqa: BLE001  # a fault of ours: told in a sentence, logged without what it held
            log.warning(
                "page failed", path=request.match_info.route.name or request.path[:80], error=type(error).__name__
            )
            return web.Response(status=500, text="This page could not be made; the others are not affected.\n")

    return guard


async def add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    """For `on_response_prepare`: every answer carries the policy, refusals and failures too."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.popall("Server", None)


def host_name(host: str) -> str:
    """The name in a Host header, without its port; an IPv6 address without brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _refusal(request: web.Request, names: Iterable[str]) -> web.Response | None:
    if request.method not in ("GET", "HEAD"):
        return web.Response(status=405, text="This view only reads: GET and HEAD.\n", headers={"Allow": "GET, HEAD"})
    if host_name(request.headers.get("Host", "")) not in names:
        told = "This host name is not one of the view's: add it to dashboards.allowed_hosts if it should be.\n"
        return web.Response(status=421, text=told)
    site = request.headers.get("Sec-Fetch-Site", "none")
    opened = request.headers.get("Sec-Fetch-Mode") == "navigate" and request.headers.get("Sec-Fetch-Dest") == "document"
    if site not in ("none", "same-origin") and not opened:
        return web.Response(status=403, text="Requests from other sites are refused.\n")
    return None
