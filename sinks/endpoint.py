"""Which addresses a sink may post to: the guard against being sent to a neighbour's door (SSRF).

https anywhere public; http to this machine only. Addresses of private networks need `allow_private`; link-local ones
(the cloud's metadata service lives there), multicast and unspecified are never allowed. Names are resolved once for
each connection, all their addresses are judged, and the connection goes to the judged address.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple, TypeAlias
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_LOOPBACK_NAMES: Final = {"localhost": ("127.0.0.1", "::1")}
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_ADDRESSES_MAX: Final = 16


class EndpointForbidden(ValueError):
    """The URL or an address behind it is not allowed; the message is one sentence without the URL's path."""


class Endpoint(NamedTuple):
    """A URL that passed, and what its addresses may be."""

    url: str
    host: str
    loopback: bool
    """The URL itself names this machine; no other name may lead here."""
    allow_private: bool


def check_url(url: str, *, allow_private: bool) -> Endpoint:
    """The endpoint of `url`. Raises `EndpointForbidden`."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise EndpointForbidden("it is no URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise EndpointForbidden("it must begin with https:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise EndpointForbidden("it must not hold a user name or password")
    address = _literal(host)
    loopback = host in _LOOPBACK_NAMES or (address is not None and address.is_loopback)
    endpoint = Endpoint(url, host, loopback, allow_private)
    if parts.scheme == "http" and not loopback:
        raise EndpointForbidden("plain http is for this machine only: use https")
    if address is not None:
        check_address(address, endpoint)
    return endpoint


def check_address(address: Address, endpoint: Endpoint) -> None:
    """Raises `EndpointForbidden` where a connection to `address` is not allowed for this endpoint."""
    inner = _unwrapped(address)
    if inner.is_loopback:
        allowed = endpoint.loopback
    elif inner.is_link_local or inner.is_multicast or inner.is_unspecified or inner.is_reserved:
        allowed = False
    else:
        allowed = inner.is_global or endpoint.allow_private
    if not allowed:
        raise EndpointForbidden(
            f"{endpoint.host} leads to {address}, which is not allowed"
            + ("" if endpoint.allow_private else " (allow_private = true allows private networks)")
        )


def _literal(host: str) -> Address | None:
    """The address that `host` spells out, also the short and octal spellings that the system's resolver takes."""
    try:
        return ipaddress.ip_address(host.split("%", 1)[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _unwrapped(address: Address) -> Address:
    """The IPv4 address inside a mapped, NAT64, 6to4 or Teredo address: that is where the packets end up."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else address)


async def system_resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of `host` as the system knows them. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class PinnedResolver(AbstractResolver):
    """Gives aiohttp judged addresses only. One bad address among several refuses them all."""

    def __init__(self, endpoint: Endpoint, resolve: Resolve = system_resolve) -> None:
        self._endpoint = endpoint
        self._resolve = resolve

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_INET,  # noqa: ARG002  # the signature is aiohttp's
    ) -> list[ResolveResult]:
        """The addresses to connect to. Raises `EndpointForbidden` or `OSError`."""
        known = _LOOPBACK_NAMES.get(host) if self._endpoint.loopback else None
        texts = known if known is not None else await self._resolve(host, port)
        addresses = [ipaddress.ip_address(text.split("%", 1)[0]) for text in texts[:_ADDRESSES_MAX]]
        for address in addresses:
            check_address(address, self._endpoint)
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Holds nothing."""
