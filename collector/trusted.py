"""Who a trusted proxy says is asking: by headers, where a proxy before us has authenticated the client.

A proxy is trusted by two things together: where it connects from, and a secret in a header, compared in constant time.
The server (uvicorn) asks for a client certificate where it is told to, but does not tell the app whose it was; so the
secret stands for the proxy's name, and mutual TLS, with a CA that signs for proxies alone, keeps everybody else from
connecting (docs/identity.md). These headers from anybody else are refused, not ignored.
"""

import hmac
import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Any, Final, Self

from collector.identity import PROXY, KeyProblem, NotKnown, Principal, read_private
from collector.identity_config import ProxyConfig

NAME_BYTES_MAX: Final = 256


class TrustedProxy:
    """One proxy under one secret. Immutable."""

    def __init__(self, config: ProxyConfig, secret: bytes) -> None:
        self._config, self._secret = config, secret
        self._networks = [ipaddress.ip_network(peer) for peer in config.peers if peer != "unix"]
        self._unix = "unix" in config.peers
        self._names = [name.encode() for name in config.headers]
        self.names = frozenset(self._names)
        """All its headers."""
        self._tenants = frozenset(config.tenants)

    @classmethod
    def load(cls, config: ProxyConfig) -> Self:
        """With the secret in its file. Raises KeyProblem naming the file and what to do."""
        path = config.secret_file
        secret = read_private(path, "make one by `openssl rand -hex 32`, mode 0600")
        if not re.fullmatch(rb"[\x21-\x7e]{32,4096}", secret):
            raise KeyProblem(f"{path}: the proxy's secret has 32 or more printable characters and no space")
        if os.environ.get("FORWARDED_ALLOW_IPS", "").strip() == "*":
            raise KeyProblem(
                "FORWARDED_ALLOW_IPS=* lets anybody claim any address, the proxy's too: name the proxy there instead"
            )
        return cls(config, secret)

    def speaks(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request has any of the proxy's headers."""
        return not self.names.isdisjoint(headers)

    def owner(self, headers: Mapping[bytes, bytes], scope: Mapping[str, Any]) -> Principal:
        """Whom the proxy names. Raises `NotKnown`, the same for a wrong place and a wrong secret."""
        secret, user, tenant, session, address = (headers.get(name, b"") for name in self._names)
        right = hmac.compare_digest(secret, self._secret)
        if not (self._from_proxy(scope.get("client")) and right):
            raise NotKnown("untrusted_headers")
        named = self._tenant(tenant)
        if not user:
            raise NotKnown("no_user")
        said = _text(user)
        return Principal(named, PROXY, said, session=_text(session), address=_text(address), meter=f"{named}\n{said}")

    def _from_proxy(self, client: Any) -> bool:
        """`client` is None behind a Unix socket. A name that is no address is nobody's."""
        if not client:
            return self._unix
        try:
            address = ipaddress.ip_address(client[0])
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)

    def _tenant(self, named: bytes) -> str:
        tenant = _text(named) if named else self._config.tenants[0]
        if tenant not in self._tenants:
            raise NotKnown("wrong_tenant")
        return tenant


def _text(value: bytes) -> str:
    """A name. Raises `NotKnown` where it is no UTF-8, too long, or has controls or blanks at its ends."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        raise NotKnown("bad_header") from None
    if len(value) > NAME_BYTES_MAX or not (text.isprintable() and text == text.strip()):
        raise NotKnown("bad_header")
    return text
