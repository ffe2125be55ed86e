"""What a page shows: a stretch of time and a tenant, and the addresses that keep both."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote, urlencode

from dashboards.window import BadWindow, Window, asked

TENANT_CHARACTERS_MAX: Final = 256
VALUE_CHARACTERS_MAX: Final = 300
"""More than any identifier has; what data put into an address is cut there."""


@dataclass(frozen=True)
class Scope:
    """The window, the tenant (empty: all of them) and the moment at which the page was asked for."""

    window: Window
    tenant: str
    now_ms: int

    def parameters(self) -> dict[str, object]:
        """For the SQL of a panel."""
        return {**self.window.parameters(), "tenant": self.tenant}

    def before(self) -> "Scope":
        """The stretch of the same length just before."""
        window = self.window
        length_ms = window.to_ms - window.from_ms
        earlier = replace(window, from_ms=window.from_ms - length_ms, to_ms=window.from_ms, name="")
        return replace(self, window=earlier)

    def link(self, path: str, **more: str) -> str:
        """An address on this host that keeps the time range and the tenant, unless `more` says otherwise."""
        query = {**({"tenant": self.tenant} if self.tenant else {}), **self.window.address(), **more}
        return f"{path}?{urlencode({key: value[:VALUE_CHARACTERS_MAX] for key, value in query.items() if value})}"

    def finding(self, uid: object) -> str:
        """The address of a finding's page."""
        return self.link(f"/finding/{quote(str(uid)[:64], safe='')}")


def scope_of(query: Mapping[str, str], default_range: str, now_ms: int) -> Scope:
    """The scope that an address asks for. Raises `BadWindow` with one sentence."""
    tenant = query.get("tenant", "")
    if len(tenant) > TENANT_CHARACTERS_MAX:
        raise BadWindow(f"A tenant has at most {TENANT_CHARACTERS_MAX} characters.")
    return Scope(asked(query, default_range, now_ms), tenant, now_ms)


def moment_ms(value: object) -> float:
    """A moment as the store gives it, in milliseconds since the epoch. A naive one is UTC."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp() * 1000
    if isinstance(value, int | float):
        return float(value)
    raise TypeError(f"no moment: {type(value).__name__}")
