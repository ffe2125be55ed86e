"""The trusted proxy: its headers count from its place with its secret, and are refused from anybody else."""

import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from collector.doors import open_identity
from collector.identity import KeyProblem
from collector.identity_config import ProxyConfig
from collector.trusted import TrustedProxy
from tests.collector.doors import Site, ask, make_site, port_of, send_raw, serving
from tests.collector.gating import BODY, CHAT

SECRET = "s" * 40
GOOD = (("x-inferwatch-proxy", SECRET), ("x-inferwatch-user", "carol"))


def make(folder: Path, **more: Any) -> Site:
    """A site with a proxy before it."""
    secret = folder / "proxy.secret"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    return make_site(folder, proxy={"secret_file": secret, "tenants": ("default", "acme"), **more})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """With a proxy on this machine."""
    return make(tmp_path)


async def test_whom_the_proxy_names_comes_in(site: Site) -> None:
    """User, tenant, session and address are the proxy's; without the last three there are defaults."""
    more = (("x-inferwatch-tenant", "acme"), ("x-inferwatch-session", "s1"), ("x-inferwatch-address", "192.0.2.7"))
    assert (await ask(site, *GOOD)).status_code == 200
    assert (await ask(site, *GOOD, *more)).status_code == 200
    plain, full = [at_hand.caller for at_hand in site.app.exchanges]
    default, acme = site.identity.names("default"), site.identity.names("acme")
    assert (plain.user_id, plain.session_id, plain.key_id) == (default.user("carol"), "", "proxy")
    assert (full.tenant, full.user_id, full.session_id) == ("acme", acme.user("carol"), acme.session("s1"))
    assert (plain.client_address, full.client_address) == (default.address("127.0.0.1"), acme.address("192.0.2.7"))


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ((("x-inferwatch-user", "carol"),), "untrusted_headers"),
        ((("x-inferwatch-proxy", ""), ("x-inferwatch-user", "carol")), "untrusted_headers"),
        ((("x-inferwatch-proxy", SECRET[:-1]), ("x-inferwatch-user", "carol")), "untrusted_headers"),
        ((("x-inferwatch-proxy", SECRET + "s"), ("x-inferwatch-user", "carol")), "untrusted_headers"),
        ((("x-inferwatch-proxy", "é" * 40), ("x-inferwatch-user", "carol")), "untrusted_headers"),
        ((("x-inferwatch-proxy", SECRET),), "no_user"),
        ((("x-inferwatch-proxy", SECRET), ("x-inferwatch-user", "")), "no_user"),
        ((*GOOD, ("x-inferwatch-tenant", "evil")), "wrong_tenant"),
        ((*GOOD, ("x-inferwatch-tenant", "ACME")), "wrong_tenant"),
        ((("x-inferwatch-proxy", SECRET), ("x-inferwatch-user", b"\xff")), "bad_header"),
        ((("x-inferwatch-proxy", SECRET), ("x-inferwatch-user", "ca\trol")), "bad_header"),
        ((("x-inferwatch-proxy", SECRET), ("x-inferwatch-user", "a\u202eb")), "bad_header"),
        ((("x-inferwatch-proxy", SECRET), ("x-inferwatch-user", "u" * 257)), "bad_header"),
        ((*GOOD, ("authorization", "Bearer KEY")), "two_identities"),
        ((*GOOD, ("x-api-key", "KEY")), "two_identities"),
        ((("x-api-key", "KEY"), ("x-inferwatch-user", "carol")), "untrusted_headers"),
        ((("x-api-key", "KEY"), ("x-inferwatch-session", "s")), "untrusted_headers"),
        ((("x-inferwatch_proxy", SECRET), ("x_inferwatch_user", "carol")), "no_key"),
    ],
)
async def test_its_headers_from_anybody_else_are_refused(
    site: Site, headers: tuple[tuple[str, str | bytes], ...], reason: str
) -> None:
    """Not ignored: with a good API key beside them too, so that nobody passes for somebody else."""
    sent = [(name, value.replace("KEY", site.api_key) if isinstance(value, str) else value) for name, value in headers]
    answer = await ask(site, *sent)
    assert (answer.status_code, site.app.bodies, site.refused) == (401, [], [(reason, 401)])


@pytest.mark.parametrize("name", ["x-inferwatch-proxy", "x-inferwatch-user", "X-Inferwatch-Tenant"])
async def test_each_of_its_headers_comes_once(site: Site, name: str) -> None:
    """On the wire to a real server, with the first one right."""
    right = {"x-inferwatch-proxy": SECRET, "x-inferwatch-user": "carol"}
    lines = [f"{key}: {value}".encode() for key, value in right.items()]
    async with serving(site) as server:
        assert await send_raw(port_of(server), *lines) == 200
        assert await send_raw(port_of(server), *lines, f"{name}: acme".encode(), f"{name}: acme".encode()) == 400
    assert site.refused == [("doubled_header", 400)]


async def test_its_place_counts_as_well_as_its_secret(tmp_path: Path) -> None:
    """The right secret from another network is worth nothing; an address that a client names is no place."""
    site = make(tmp_path, peers=("192.0.2.0/24",))
    assert (await ask(site, *GOOD)).status_code == 401
    lines = [f"{name}: {value}".encode() for name, value in GOOD]
    async with serving(site, forwarded_allow_ips="") as server:
        assert await send_raw(port_of(server), *lines, b"X-Forwarded-For: 192.0.2.1") == 401
    assert site.refused == [("untrusted_headers", 401)] * 2


@pytest.mark.parametrize(
    ("client", "near"),
    [
        (("127.0.0.1", 1), True), (("127.9.9.9", 1), True), (("::1", 1), True), (("::ffff:127.0.0.1", 1), True),
        (("::ffff:192.0.2.1", 1), False), (("192.0.2.1", 1), False), (("fe80::1%eth0", 1), False),
        (("127.0.0.1.example", 1), False), (("localhost", 1), False), (("", 1), False), (None, False),
    ],
)  # fmt: skip
def test_a_place_is_an_address_in_one_of_its_networks(tmp_path: Path, client: Any, near: bool) -> None:
    """However it is written; names are nobody's, and no address is no place."""
    assert TrustedProxy(ProxyConfig(secret_file=tmp_path), SECRET.encode())._from_proxy(client) is near


async def test_an_address_claimed_by_header_does_not_replace_the_secret(site: Site) -> None:
    """Even where the server believes X-Forwarded-For from everybody."""
    async with serving(site, forwarded_allow_ips="*") as server:
        claim = (b"X-Forwarded-For: 127.0.0.1", b"X-Inferwatch-User: carol")
        assert await send_raw(port_of(server), *claim) == 401
        assert await send_raw(port_of(server), *claim, b"X-Inferwatch-Proxy: " + b"t" * 40) == 401
    assert site.app.bodies == []


def test_a_server_that_believes_every_claimed_address_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FORWARDED_ALLOW_IPS=* makes the proxy's place claimable."""
    site = make(tmp_path)
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    with pytest.raises(KeyProblem, match="FORWARDED_ALLOW_IPS"):
        open_identity(site.config, "default")


async def test_a_unix_socket_is_a_place_where_it_is_named(tmp_path: Path) -> None:
    """Behind a Unix socket there is no address: `unix` in peers stands for it."""
    for name, peers, status in (("a", ("unix",), 200), ("b", ("127.0.0.0/8",), 401)):
        folder = tmp_path / name
        folder.mkdir()
        site = make(folder, peers=peers)
        path = str(folder / "s")
        async with serving(site, uds=path), httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=path)) as client:
            answer = await client.post(f"http://gate{CHAT}", json=BODY, headers=dict(GOOD))
        assert answer.status_code == status


async def test_its_secret_changes_without_a_restart(site: Site) -> None:
    """The new secret counts, the old one no more; a bad file keeps the old one."""
    file = site.folder / "proxy.secret"
    file.write_text("short")
    assert [(each["subject"], each["after"]) for each in site.look()] == [("proxy_secret", "refused")]
    assert (await ask(site, *GOOD)).status_code == 200
    file.write_text("t" * 40)
    (told,) = site.look()
    assert (told["subject"], len(told["after"])) == ("proxy_secret", 8)
    assert (await ask(site, *GOOD)).status_code == 401
    assert (await ask(site, ("x-inferwatch-proxy", "t" * 40), GOOD[1])).status_code == 200


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [
        ("short", 0o600, "32 or more"),
        ("s s" * 20, 0o600, "no space"),
        (SECRET, 0o644, "chmod 600"),
        (None, 0, "no such"),
    ],
)
def test_a_bad_secret_file_is_named(tmp_path: Path, text: str | None, mode: int, told: str) -> None:
    """With the remedy, without the secret."""
    site = make(tmp_path)
    file = tmp_path / "proxy.secret"
    file.unlink()
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    with pytest.raises(KeyProblem, match=told) as caught:
        open_identity(site.config, "default")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {"user_header": "authorization"},
        {"user_header": "X-User"},
        {"user_header": "x-inferwatch-proxy"},
        {"peers": ("x",)},
    ],
)
def test_headers_that_would_have_two_meanings_can_not_be_configured(tmp_path: Path, more: dict[str, Any]) -> None:
    """Taken names, other spellings, one name twice, a peer that is no network."""
    with pytest.raises(ValueError, match=r"header|network|name"):
        ProxyConfig(secret_file=tmp_path, **more)


def _certificates(folder: Path) -> None:
    """A CA, and a server and a client certificate by it."""
    run = lambda *line: subprocess.run(["openssl", *line], cwd=folder, check=True, capture_output=True)  # noqa: E731
    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=proxies", "-days", "2")
    for name in ("server", "client"):
        run(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "san").write_text("subjectAltName=IP:127.0.0.1")
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out",
            f"{name}.pem", "-days", "2", "-extfile", "san")  # fmt: skip


async def test_mutual_tls_keeps_others_from_connecting_but_names_nobody(site: Site) -> None:
    """What docs/identity.md says of the server: it asks for the certificate, and the app never sees whose it was."""
    _certificates(site.folder)
    scopes: list[Any] = []
    real = site.gate._app

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await real(scope, receive, send)

    site.gate._app = app
    options = {
        "ssl_keyfile": str(site.folder / "server.key"),
        "ssl_certfile": str(site.folder / "server.pem"),
        "ssl_ca_certs": str(site.folder / "ca.pem"),
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
    }
    async with serving(site, **options) as server:
        url = f"https://127.0.0.1:{port_of(server)}{CHAT}"
        context = ssl.create_default_context(cafile=str(site.folder / "ca.pem"))
        async with httpx.AsyncClient(verify=context) as stranger:
            with pytest.raises(httpx.TransportError):
                await stranger.post(url, json=BODY, headers=dict(GOOD))
        context.load_cert_chain(site.folder / "client.pem", site.folder / "client.key")
        async with httpx.AsyncClient(verify=context) as proxy:
            answer = await proxy.post(url, json=BODY, headers=dict(GOOD))
    assert answer.status_code == 200
    (scope,) = [scope for scope in scopes if scope["type"] == "http"]
    assert "tls" not in scope.get("extensions", {})
