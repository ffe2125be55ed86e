"""The doors: what has two meanings is refused, files of keys are read again while running, limits hold."""

import asyncio
import hmac
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from collector import identity as identity_module
from collector.audit import EngineRequest
from collector.doors import Watched, open_identity
from collector.identity import KeyProblem, KeyRing
from collector.identity_config import IdentityConfig
from inferwatch.keys import add_api_key, change_api_key, successor
from tests.collector.doors import Site, ask, make_site, port_of, send_raw, serving
from tests.collector.gating import BODY, CHAT

CANARY = "canary-5d21"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """API keys alone."""
    return make_site(tmp_path)


Lines = Callable[[bytes], tuple[bytes, ...]]


@pytest.mark.parametrize(
    ("lines", "status", "reason"),
    [
        (lambda k: (b"Authorization: Bearer " + k,), 200, ""),
        (lambda k: (b"authorization: bEaReR " + k,), 200, ""),
        (lambda k: (b"X-API-Key: " + k,), 200, ""),
        (lambda k: (b"Authorization: Bearer " + k, b"X-Api-Key: " + k), 200, ""),
        (lambda k: (b"Authorization:    Bearer " + k + b" \t ",), 200, ""),
        (lambda k: (b"Authorization: Bearer " + k, b"Authorization: Bearer " + k), 400, "doubled_header"),
        (lambda k: (b"Authorization: Bearer " + k, b"aUTHORIZATION: Bearer x"), 400, "doubled_header"),
        (lambda k: (b"X-Api-Key: x", b"x-api-key: " + k), 400, "doubled_header"),
        (lambda k: (b"Authorization: Bearer x, Bearer " + k,), 400, "malformed_key"),
        (lambda k: (b"Authorization: Bearer " + k + b",x",), 400, "malformed_key"),
        (lambda k: (b"Authorization: Bearer  " + k,), 400, "malformed_key"),
        (lambda k: (b"Authorization: Bearer \t" + k,), 400, "malformed_key"),
        (lambda k: (b"Authorization: Bearer " + k + b" x",), 400, "malformed_key"),
        (lambda k: (b"Authorization: Bearer " + k + b"\xc3\xa9",), 400, "malformed_key"),
        (lambda k: (b"Authorization: Bearer \xa0" + k,), 400, "malformed_key"),
        (lambda k: (b"X-Api-Key: \xef\xbb\xbf" + k,), 400, "malformed_key"),
        (lambda k: (b"Authorization: Bearer " + b"a" * 8193,), 400, "malformed_key"),
        (lambda k: (b"Authorization: Bearer\t" + k,), 401, "no_key"),
        (lambda k: (b"Authorization: Bearer" + k,), 401, "no_key"),
        (lambda k: (b"Authorization: " + k,), 401, "no_key"),
        (lambda k: (b"Authorization: Basic " + k,), 401, "no_key"),
        (lambda k: (b"X_Api_Key: " + k,), 401, "no_key"),
        (lambda k: (b"Proxy-Authorization: Bearer " + k,), 401, "no_key"),
        (lambda k: (b"Cookie: x-api-key=" + k,), 401, "no_key"),
        (lambda k: (b"Authorization: Bearer " + k, b"X-Api-Key: x"), 401, "two_keys"),
        (lambda k: (b"Authorization: Bearer " + k.upper(),), 401, "wrong_key"),
        (lambda k: (b"Authorization: Bearer " + k[:-1],), 401, "wrong_key"),
    ],
)
async def test_a_key_has_one_meaning_or_is_refused(site: Site, lines: Lines, status: int, reason: str) -> None:
    """Doubled, joined, padded, non-ASCII and misplaced keys, as bytes on the wire to a real server."""
    async with serving(site) as server:
        assert await send_raw(port_of(server), *lines(site.api_key.encode())) == status
    assert site.refused == ([(reason, status)] if reason else [])
    assert len(site.app.bodies) == (status == 200)


@pytest.mark.parametrize(
    "lines",
    [
        (b"Authorization : Bearer KEY",),
        (b"X: y", b" Authorization: Bearer KEY"),
        (b"Authorization: Bearer\x00 KEY",),
        (b"Transfer-Encoding: chunked", b"Authorization: Bearer KEY"),
        (b"Content-Length: 3", b"Authorization: Bearer KEY"),
        (b"Transfer-Encoding: xchunked", b"Authorization: Bearer KEY"),
    ],
)
async def test_a_request_that_two_servers_would_read_differently_does_not_pass(
    site: Site, lines: tuple[bytes, ...]
) -> None:
    """Blanks before the colon, folded lines, two lengths: the server or the gate refuses; the app never hears of it."""
    async with serving(site) as server:
        status = await send_raw(port_of(server), *(line.replace(b"KEY", site.api_key.encode()) for line in lines))
    assert (status, site.app.bodies) in [(400, []), (401, [])]


def test_keys_are_compared_by_digests_in_constant_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up hashes first, under a key of the process, and compares 32 bytes with 32 bytes; never the key itself."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(identity_module.hmac, "compare_digest", spy)
    ring = KeyRing.load(site.config.api_keys_file or Path())
    assert ring.owner(site.api_key, 0) is not None
    assert ring.owner(site.api_key + "x", 0) is None
    assert [(len(one), len(other)) for one, other in compared] == [(32, 32)]
    stored = (site.config.api_keys_file or Path()).read_text()
    assert compared[0][0].hex() not in stored


# -- rotation, expiry, revocation


async def test_two_keys_of_one_owner_are_good_until_the_first_ends(site: Site) -> None:
    """Rotation without a gap: the new key works at once, the old one until its end, and then is refused by name."""
    now = datetime.now(UTC)
    new_key, new_id, _ = successor(site.config.api_keys_file, site.key_id, now + timedelta(hours=1), expires=None)
    told = site.look()
    assert [(change["subject"], change["tenant"]) for change in told] == [("api_keys", "")]
    callers = []
    for key in (site.api_key, new_key):
        assert (await ask(site, ("x-api-key", key))).status_code == 200
        callers.append(site.app.exchanges[-1].caller)
    assert callers[0].user_id == callers[1].user_id
    assert [caller.key_id for caller in callers] == [site.key_id, new_id]
    site.identity._clock_s = lambda: time.time() + 3601
    assert (await ask(site, ("x-api-key", site.api_key))).status_code == 401
    assert (await ask(site, ("x-api-key", new_key))).status_code == 200
    (rejection,) = site.publisher.rejections
    assert (rejection["reason"], rejection["key_id"]) == ("expired_key", site.key_id)
    assert rejection["user_id"] == callers[0].user_id


async def test_a_revoked_key_is_refused_without_a_restart_and_its_use_is_told_by_name(site: Site) -> None:
    """The client learns no more than that the key is no good."""
    assert (await ask(site, ("x-api-key", site.api_key))).status_code == 200
    change_api_key(site.config.api_keys_file, site.key_id, "revoked", value=True)
    assert len(site.look()) == 1
    answer = await ask(site, ("x-api-key", site.api_key))
    unknown = await ask(site, ("x-api-key", "iw-unknown"))
    assert answer.status_code == unknown.status_code == 401
    assert answer.json() == unknown.json()
    assert [each["reason"] for each in site.publisher.rejections] == ["revoked_key", "wrong_key"]
    assert [each["key_id"] for each in site.publisher.rejections] == [site.key_id, ""]


async def test_a_key_is_not_good_before_its_time(site: Site) -> None:
    """`not_before` lets a key be handed out ahead."""
    begins = datetime.now(UTC) + timedelta(hours=1)
    key, _ = add_api_key(site.config.api_keys_file, tenant="default", user="dora", on_behalf=False, not_before=begins)
    site.look()
    assert (await ask(site, ("x-api-key", key))).status_code == 401
    site.identity._clock_s = lambda: time.time() + 3601
    assert (await ask(site, ("x-api-key", key))).status_code == 200
    assert site.refused == [("early_key", 401)]


@pytest.mark.parametrize("text", ["[broken", "k = " + "[" * 100_000, f"[k]\nsha256 = '{CANARY}'\nuser = 'x'\n", None])
async def test_a_broken_file_keeps_the_keys_it_had_and_says_so_once(
    site: Site, text: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """A typo locks nobody out and lets nobody in; the log names file and fault, and a change event says `refused`."""
    file = site.config.api_keys_file or Path()
    good = file.read_text()
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    told = [site.look(), site.look()]
    assert [[(each["subject"], each["after"]) for each in one] for one in told] == [[("api_keys", "refused")], []]
    assert (await ask(site, ("x-api-key", site.api_key))).status_code == 200
    out = "".join(capfd.readouterr())
    assert str(file) in out
    assert CANARY not in out
    change = good.replace("alice", "bob")
    file.write_text(change)
    file.chmod(0o600)
    assert [each["after"] != "refused" for each in site.look()] == [True]
    await ask(site, ("x-api-key", site.api_key))
    assert site.app.exchanges[0].caller.user_id != site.app.exchanges[1].caller.user_id


def test_a_file_that_is_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    """Half a file may be sound TOML with half the keys: what changes under the reader waits for the next look."""
    file = tmp_path / "keys.toml"
    file.write_text("1")
    writing = [True]

    def load() -> str:
        text = file.read_text()
        if text == "half" and writing.pop():
            file.write_text("half and half")
        return text

    watched = Watched("api_keys", file, load)
    file.write_text("half")
    assert watched.look() is None
    assert watched.value == "1"
    assert watched.look() is not None
    assert watched.value == "half and half"


async def test_a_revocation_is_not_lost_to_a_failure_that_passes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file could not be read once, and has not changed since: it is read at the next look."""

    def fail(_: Path) -> None:
        raise OSError(24, "Too many open files")

    change_api_key(site.config.api_keys_file, site.key_id, "revoked", value=True)
    with monkeypatch.context() as patched:
        patched.setattr(identity_module, "read_key_tables", fail)
        assert [each["after"] for each in site.look()] == ["refused"]
        assert site.look() == []
    assert [each["after"] != "refused" for each in site.look()] == [True]
    assert (await ask(site, ("x-api-key", site.api_key))).status_code == 401


async def test_the_watch_runs_by_itself_and_outlives_a_full_journal(site: Site) -> None:
    """A revocation takes effect within the interval though the change can't be told."""

    def full(**_: str) -> None:
        raise OSError(CANARY)

    site.identity.watch(full, 0.02)
    change_api_key(site.config.api_keys_file, site.key_id, "revoked", value=True)
    for _ in range(200):
        if (await ask(site, ("x-api-key", site.api_key))).status_code == 401:
            break
        await asyncio.sleep(0.02)
    site.identity.stop()
    assert site.refused == [("revoked_key", 401)]


def test_a_new_tenant_needs_a_key_for_its_pseudonyms_first(site: Site) -> None:
    """A file that names a tenant without a key is refused whole; with the key it is taken, though it is as it was."""
    site.look()
    add_api_key(site.config.api_keys_file, tenant="other", user="eve", on_behalf=False)
    assert [each["after"] for each in site.look()] == ["refused"]
    identity_module.create_key_file(site.config.key_dir / "other.key")
    assert [each["subject"] for each in site.look()] == ["api_keys"]
    assert "other" in site.identity.tenants


def test_two_tenants_never_have_one_key(site: Site) -> None:
    """Else a person or a prompt of one would be the same in the other's events: no start, and no change to it."""
    keys = site.config.key_dir
    acme = site.identity.names("default").epoch
    add_api_key(site.config.api_keys_file, tenant="acme", user="eve", on_behalf=False)
    site.look()
    good = (keys / "acme.key").read_text()
    (keys / "acme.key").write_text((keys / "default.key").read_text())
    assert [(each["subject"], each["after"]) for each in site.look()] == [("key_epoch", "refused")]
    assert site.identity.names("acme").epoch != acme
    with pytest.raises(KeyProblem, match=r"acme\.key: this is the key of tenant default"):
        open_identity(site.config, "default")
    (keys / "acme.key").write_text(good)
    assert open_identity(site.config, "default").tenants == {"default", "acme"}


def test_without_a_door_nothing_opens(tmp_path: Path) -> None:
    """A gate that nobody can pass, or anybody, does not start."""
    with pytest.raises(KeyProblem, match="there are no API keys"):
        open_identity(IdentityConfig(key_dir=tmp_path), "default")


# -- limits


async def test_over_a_limit_there_is_429_an_event_and_a_time_to_come_back(tmp_path: Path) -> None:
    """Requests a minute; each refused one is a rejection under the key's name. Another key is not concerned."""
    site = make_site(tmp_path, limits={"requests_per_minute": 2})
    other, _ = add_api_key(site.config.api_keys_file, tenant="default", user="bob", on_behalf=False)
    site.look()
    answers = [await ask(site, ("x-api-key", site.api_key)) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert answers[2].json()["error"]["type"] == "rate_limit_error"
    assert 55 < int(answers[2].headers["retry-after"]) <= 65
    assert site.refused == [("request_limit", 429)] * 2
    assert {each["key_id"] for each in site.publisher.rejections} == {site.key_id}
    assert (await ask(site, ("x-api-key", other))).status_code == 200
    now_s = site.identity.monotonic_s()
    site.identity.monotonic_s = lambda: now_s + int(answers[3].headers["retry-after"])
    assert (await ask(site, ("x-api-key", site.api_key))).status_code == 200


async def test_a_key_has_limits_of_its_own(tmp_path: Path) -> None:
    """What its table says goes before the configuration; what it leaves out is the configuration's; 0 is none."""
    site = make_site(tmp_path, limits={"requests_per_minute": 1, "body_bytes_max": 10})
    change_api_key(site.config.api_keys_file, site.key_id, "limits", {"requests_per_minute": 0, "body_bytes_max": 0})
    site.look()
    assert [(await ask(site, ("x-api-key", site.api_key))).status_code for _ in range(3)] == [200] * 3
    other, _ = add_api_key(site.config.api_keys_file, tenant="default", user="bob", on_behalf=False)
    site.look()
    assert (await ask(site, ("x-api-key", other))).status_code == 413
    assert site.refused == [("body_too_large", 413)]


async def test_requests_at_a_time_are_given_back_however_a_request_ends(tmp_path: Path) -> None:
    """Answered, refused, failed or cancelled: none of them keeps a place."""
    site = make_site(tmp_path, limits={"concurrent": 1})
    key = ("x-api-key", site.api_key)
    for status, error in ((200, None), (500, None), (200, RuntimeError("x"))):
        site.app.status, site.app.error = status, error
        if error is None:
            assert (await ask(site, key)).status_code == status
        else:
            with pytest.raises(RuntimeError):
                await ask(site, key)
    site.app.error = None
    assert (await ask(site, key, path="/nothing")).status_code == 404
    started, done = asyncio.Event(), asyncio.Event()
    real = site.gate._app

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        started.set()
        await done.wait()
        await real(scope, receive, send)

    site.gate._app = slow
    task = asyncio.ensure_future(ask(site, key))
    await started.wait()
    busy = await ask(site, key)
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    done.set()
    assert (await ask(site, key)).status_code == 200
    assert ("concurrency_limit", 429) in site.refused


async def test_tokens_of_answers_are_counted_where_their_event_is_written(tmp_path: Path) -> None:
    """Prompt and answer tokens of the engine's requests; what a guard blocked before the engine cost none."""
    site = make_site(tmp_path, limits={"tokens_per_minute": 20})
    real = site.gate._app

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        audit = site.auditor.open(EngineRequest("generate", "hello", prompt_tokens=8))
        audit.close("ok", generated=2)
        site.auditor.open(EngineRequest("generate", "hello", prompt_tokens=1_000)).close("blocked_input")
        await real(scope, receive, send)

    site.gate._app = engine
    assert [(await ask(site, ("x-api-key", site.api_key))).status_code for _ in range(3)] == [200, 200, 429]
    assert site.refused == [("token_limit", 429)]


async def test_a_stranger_is_not_counted_and_fills_no_table(tmp_path: Path) -> None:
    """Wrong keys make no meters."""
    site = make_site(tmp_path, limits={"requests_per_minute": 5, "keys_max": 1})
    for n in range(20):
        assert (await ask(site, ("x-api-key", f"wrong-{n}"))).status_code == 401
    assert len(site.identity._limits) == 0


async def test_a_real_client_gets_its_answer_by_each_spelling(site: Site) -> None:
    """httpx over TCP to uvicorn: bearer and x-api-key."""
    async with serving(site) as server, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port_of(server)}") as client:
        for headers in ({"authorization": f"Bearer {site.api_key}"}, {"x-api-key": site.api_key}):
            answer = await client.post(CHAT, json=BODY, headers=headers)
            assert (answer.status_code, len(answer.headers["inferwatch-request-id"])) == (200, 36)
