"""A gate with real doors on a real uvicorn, for tests: files of keys on disk, a recording publisher, raw requests."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from collector.auditor import Auditor
from collector.doors import Identity, open_identity
from collector.gate import Gate
from collector.guards.config import GuardsConfig
from collector.guards.stack import GuardStack
from collector.identity import create_key_file
from collector.identity_config import IdentityConfig
from collector.routes import GateConfig
from inferwatch.keys import add_api_key
from tests.collector.gating import BODY, CHAT, App, Recorder

ISSUER, AUDIENCE = "https://issuer.example", "inferwatch"


@dataclass
class Site:
    """A folder of keys, the identity read from it, the gate before it, and what it wrote."""

    folder: Path
    config: IdentityConfig
    identity: Identity
    auditor: Auditor
    gate: Gate
    app: App
    publisher: Recorder
    api_key: str
    key_id: str
    changes: list[dict[str, str]] = field(default_factory=list)

    @property
    def refused(self) -> list[tuple[str, int]]:
        """Reason and status of each rejection."""
        return [(each["reason"], each["http_status"]) for each in self.publisher.rejections]

    def look(self) -> list[dict[str, str]]:
        """Look whether files have changed; what was told of it."""
        told: list[dict[str, str]] = []
        self.identity.look(lambda **change: told.append(change))
        return told


def make_site(folder: Path, gate: GateConfig | None = None, **identity: Any) -> Site:
    """API keys and the doors in `identity`, as `[collector.identity]` has them."""
    for tenant in ("default", "acme"):
        create_key_file(folder / "keys" / f"{tenant}.key")
    file = folder / "api-keys.toml"
    api_key, key_id = add_api_key(file, tenant="default", user="alice", on_behalf=False)
    config = IdentityConfig(key_dir=folder / "keys", api_keys_file=file, **identity)
    doors = open_identity(config, "default")
    app, publisher = App(), Recorder()
    guards = GuardStack(GuardsConfig(order=()))
    auditor = Auditor(publisher, guards, doors, gate or GateConfig(), model_version="m@1")  # type: ignore[arg-type]
    made = Gate(app, auditor=lambda _: auditor, stop=lambda: None)
    return Site(folder, config, doors, auditor, made, app, publisher, api_key, key_id)


@asynccontextmanager
async def serving(site: Site, **options: Any) -> AsyncIterator[uvicorn.Server]:
    """The gate behind a real uvicorn; `server.port`, or a Unix socket given as `uds`."""
    config = uvicorn.Config(site.gate, host="127.0.0.1", port=0, log_level="error", lifespan="on", **options)
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server.serve())
    while not server.started:
        assert not task.done(), "the server did not start"
        await asyncio.sleep(0.01)
    try:
        yield server
    finally:
        server.should_exit = True
        await task


def port_of(server: uvicorn.Server) -> int:
    """Where it listens."""
    return int(server.servers[0].sockets[0].getsockname()[1])


async def send_raw(port: int, *headers: bytes) -> int:
    """One chat request with exactly these header lines; its status."""
    body = json.dumps(BODY).encode()
    head = [
        f"POST {CHAT} HTTP/1.1".encode(),
        b"Host: gate",
        b"Connection: close",
        b"Content-Type: application/json",
        f"Content-Length: {len(body)}".encode(),
        *headers,
    ]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"\r\n".join(head) + b"\r\n\r\n" + body)
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()


async def ask(site: Site, *headers: tuple[str, str | bytes], path: str = CHAT) -> httpx.Response:
    """One chat request by the ASGI protocol alone."""
    transport = httpx.ASGITransport(site.gate)  # type: ignore[arg-type]  # the same protocol, typed otherwise
    async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
        return await client.post(path, json=BODY, headers=[(name.encode(), _raw(value)) for name, value in headers])


def _raw(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


KEYS: dict[str, Any] = {
    "rsa": rsa.generate_private_key(65537, 2048),
    "other": rsa.generate_private_key(65537, 2048),
    "ec": ec.generate_private_key(ec.SECP256R1()),
    "ed": ed25519.Ed25519PrivateKey.generate(),
}
"""Private keys of a made-up provider, and `other`, which is not its."""
_ALGORITHM = {"rsa": "RS256", "other": "RS256", "ec": "ES256", "ed": "EdDSA"}


def jwk(name: str, **more: Any) -> dict[str, Any]:
    """The public half of a key, as a JWKS has it."""
    algorithm = jwt.get_algorithm_by_name(_ALGORITHM[name])
    return {**algorithm.to_jwk(KEYS[name].public_key(), as_dict=True), "kid": name, "use": "sig", **more}


def write_jwks(path: Path, *keys: dict[str, Any]) -> Path:
    """A JWKS file."""
    path.write_text(json.dumps({"keys": keys}))
    return path


def claims(**more: Any) -> dict[str, Any]:
    """Claims that are good now; None takes one out."""
    now = int(time.time())
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "carol", "iat": now, "exp": now + 300}
    return {name: value for name, value in {**good, **more}.items() if value is not None}


def token(name: str = "rsa", headers: dict[str, Any] | None = None, **more: Any) -> str:
    """A token signed by a key."""
    return jwt.encode(claims(**more), KEYS[name], _ALGORITHM[name], headers={"kid": name, **(headers or {})})


def tokens(folder: Path, *keys: dict[str, Any], **more: Any) -> dict[str, Any]:
    """`[collector.identity.tokens]`."""
    path = write_jwks(folder / "jwks.json", *(keys or (jwk("rsa"), jwk("ec"), jwk("ed"))))
    good = {"jwks_file": path, "issuer": ISSUER, "audience": AUDIENCE, "algorithms": ("RS256", "ES256", "EdDSA")}
    return good | more
