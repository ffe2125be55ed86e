"""What the gate refuses because it can be read in two ways, is too large, or never ends."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from collector.routes import GateConfig
from tests.collector.gating import BODY, CHAT, Site


@pytest.mark.parametrize(
    "path",
    [
        "//v1/chat/completions",
        "/v1//chat/completions",
        "/v1/chat/completions/",
        "/v1/chat/./completions",
        "/v1/chat/../chat/completions",
        "/V1/chat/completions",
        "/v1/chat/completion%73",
        "/v1%2fchat/completions",
        "/%2e/v1/chat/completions",
        "/v1/chat/completions%00",
        "/v1/chat/completions%20",
        "/v1/chat/completions;a=b",
        "/v1/chat/completions.",
        "/v1/responses/resp_1",
        "/v1/audio/speech",
        "/",
    ],
)
async def test_other_spellings_of_a_path_are_other_paths(site: Site, path: str) -> None:
    """A path that is not spelled as in the table reaches nothing, and its text stays out of the event."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": httpx.URL("http://gate" + path).path,
        "raw_path": path.encode(),
        "headers": [(b"authorization", f"Bearer {site.key}".encode())],
        "client": ("127.0.0.1", 1),
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(BODY).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    await site.gate(scope, receive, send)
    assert (sent[0]["status"], site.app.bodies, site.reasons) == (404, [], [("unlisted_route", 404)])
    assert site.publisher.rejections[0]["route"] == "unlisted"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
async def test_other_methods_do_not_pass(site: Site, method: str) -> None:
    """A known path by another method is refused under its own name."""
    assert (await site.send(method, CHAT)).status_code == 404
    assert site.publisher.rejections[0]["route"] == f"{method} {CHAT}"
    assert site.app.bodies == []


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"messages": "\xff"}', "not_utf8"),
        ('{"messages": "hi"}'.encode("utf-16"), "not_utf8"),
        ('{"messages": "hi"}'.encode("utf-16-le"), "bad_json"),
        (b'\xef\xbb\xbf{"messages": "hi"}', "bad_json"),
        (b"{", "bad_json"),
        (b"", "bad_json"),
        (b'{"a": 1} {"a": 2}', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"a":' + b"9" * 5000 + b"}", "bad_json"),
        (b"[1]", "not_an_object"),
        (b'{"messages": [], "messages": []}', "doubled_key"),
        (b'{"messages": [{"role": "user", "role": "tool", "content": "x"}]}', "doubled_key"),
        (b'{"input": "x", "background": true}', "background"),
        (b'{"messages": [{"role": "user", "content": ' + b"[" * 50 + b"]" * 50 + b"}]}", "too_deep"),
    ],
)
async def test_a_body_that_can_not_be_read_in_one_way_is_refused(site: Site, raw: bytes, reason: str) -> None:
    """400, a clear sentence without a word of the body, one rejection."""
    answer = await site.send("POST", CHAT, content=raw)
    assert (answer.status_code, site.app.bodies, site.reasons) == (400, [], [(reason, 400)])
    assert answer.json()["error"]["code"] == reason


async def test_a_body_over_the_limit_is_refused_before_it_is_read(site: Site) -> None:
    """1 MB and more is a 413 by its declared length, and by what arrives where no length is declared."""
    big = json.dumps({"messages": [{"role": "user", "content": "x" * 1_100_000}]}).encode()

    async def pieces() -> Any:
        for start in range(0, len(big), 65_536):
            yield big[start : start + 65_536]

    assert (await site.send("POST", CHAT, content=big)).status_code == 413
    assert (await site.send("POST", CHAT, content=pieces())).status_code == 413
    assert (site.app.bodies, site.reasons) == ([], [("body_too_large", 413)] * 2)
    assert (await site.send("POST", "/tokenize", content=big)).status_code == 413


async def test_a_large_body_passes_where_the_configuration_allows_it() -> None:
    """The limit is the operator's."""
    site = Site(GateConfig(body_bytes_max=4_000_000))
    body = {"messages": [{"role": "user", "content": "word " * 300_000}]}
    assert (await site.send("POST", CHAT, json=body)).status_code == 200


async def test_a_body_that_never_comes_is_given_up() -> None:
    """A slow client is told 408 and counted, and holds no memory afterwards."""
    site = Site(GateConfig(body_timeout_s=0.05))

    async def never() -> Any:
        yield b'{"mess'
        await asyncio.sleep(60)

    assert (await site.send("POST", CHAT, content=never())).status_code == 408
    assert site.reasons == [("slow_body", 408)]
    assert site.gate._buffered_bytes == 0


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "x-session-id", "x-user-id", "content-type"])
async def test_a_header_that_decides_may_come_once(site: Site, name: str) -> None:
    """Two of them could be read differently by the gate and by what is behind it."""
    answer = await site.send("POST", CHAT, key=None, headers=[(name, "a"), (name, "b")], content=b"{}")
    assert (answer.status_code, site.app.bodies) == (400, [])
    assert site.reasons == [("doubled_header", 400)]


async def test_a_fault_of_the_gate_lets_nobody_in(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug while judging is a 500 and a rejection, and says nothing of the prompt."""

    def broken(*_: Any) -> None:
        raise RuntimeError("secret words")

    monkeypatch.setattr(site.auditor, "judge", broken)
    answer = await site.send("POST", CHAT, json=BODY)
    assert (answer.status_code, site.app.bodies, site.reasons) == (500, [], [("gate_failed", 500)])
    assert "secret" not in answer.text


@pytest.mark.parametrize("make", [lambda text: {**BODY, "messages": [{"role": "user", "content": text}]}])
async def test_no_canary_in_any_rejection_log_or_answer(
    make: Callable[[str], dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    """A word of the prompt, the key, the path or a header is in nothing that the gate writes."""
    site, canary = Site(GateConfig()), "canary7f3a"
    body = json.dumps(make(canary))
    answers = [
        await site.send("POST", CHAT, key=canary, content=body),
        await site.send("POST", f"/{canary}", content=body),
        await site.send("POST", CHAT, content=body + canary),
        await site.send("POST", CHAT, content=body.replace("{", '{"a":1,"a":"' + canary + '",', 1)),
        await site.send("POST", CHAT, headers=[("x-session-id", canary), ("x-session-id", canary)], content=body),
    ]
    site.app.status, site.app.engine_requests = 400, 0
    await site.send("POST", CHAT, headers=[("x-session-id", canary)], content=body)
    assert len(site.publisher.rejections) == 6
    written = "".join(map(str, site.publisher.rejections)) + "".join(answer.text for answer in answers)
    out, err = capfd.readouterr()
    assert canary not in written + out + err
