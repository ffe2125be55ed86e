"""What the gate refuses because it can be read in two ways, is too large, or never ends."""

import asyncio
import json
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from collector.context import exchange
from collector.prompt import views
from collector.requests import read_body
from collector.routes import GateConfig
from tests.collector.gating import BODY, CHAT, Site, lifespan


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


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a"] * 4_097}),
        ("/v1/completions", {"prompt": [[1]] * 4_097}),
        ("/v1/embeddings", {"input": ["a"] * 4_097}),
        ("/rerank", {"query": "q", "documents": ["a"] * 4_097}),
        ("/generative_scoring", {"items": ["a"] * 4_097}),
        ("/v1/systemone", {"state": "s", "questions": {f"q{each}": {"type": "bool"} for each in range(4_097)}}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}] * 4_097}),
    ],
)
async def test_one_request_is_at_most_so_many_prompts(site: Site, path: str, body: dict[str, Any]) -> None:
    """Each would be an engine request and an event; a client counts requests."""
    assert (await site.send("POST", path, json=body)).status_code == 400
    assert (site.app.bodies, site.reasons) == ([], [("too_many", 400)])


async def test_one_long_prompt_in_token_ids_is_one_prompt(site: Site) -> None:
    """However many they are; nor is a bias for each token more than one."""
    body = {"prompt": [7] * 50_000, "logit_bias": {str(token): 0.5 for token in range(5_000)}}
    assert (await site.send("POST", "/v1/completions", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"previous_response_id": "resp_of_bob"}, "stateful"),
        ({"conversation": "conv_of_bob"}, "stateful"),
        ({"background": True}, "background"),
        ({"kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [1]}}, "kv_transfer"),
        ({"sampling_params": {"extra_args": {"kv_transfer_params": {"do_remote_prefill": True}}}}, "kv_transfer"),
        ({"ec_transfer_params": {"k": "v"}}, "kv_transfer"),
    ],
)
async def test_nobody_is_answered_from_what_belongs_to_others(site: Site, body: dict[str, Any], reason: str) -> None:
    """Earlier responses and caches are found by their names alone, and the server does not ask whose they are."""
    assert (await site.send("POST", "/v1/responses", json={"input": "hi", **body})).status_code == 400
    assert (site.app.bodies, site.reasons) == ([], [(reason, 400)])


async def test_a_router_may_name_caches_where_the_operator_says_so() -> None:
    """As with prefill and decode on engines of their own."""
    site = Site(GateConfig(kv_transfer=True))
    body = {**BODY, "kv_transfer_params": {"do_remote_decode": True}}
    assert (await site.send("POST", CHAT, json=body)).status_code == 200


async def test_bodies_that_come_together_stay_within_the_buffer() -> None:
    """All had begun while there was room; those that find none are refused, and what they held is free again."""
    site = Site(GateConfig(buffered_bytes_max=1_048_576, body_bytes_max=1_048_576))
    await lifespan(site.gate)
    begun, peak = asyncio.Event(), 0

    async def ask() -> int:
        pieces, answers = 0, []

        async def receive() -> dict[str, Any]:
            nonlocal pieces, peak
            peak = max(peak, site.gate._buffered_bytes)
            pieces += 1
            if pieces == 2:
                await begun.wait()
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b" " * 1_000, "more_body": pieces < 900}

        async def send(message: Any) -> None:
            answers.append(message.get("status"))

        headers = [(b"authorization", b"Bearer " + site.key.encode())]
        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "headers": headers}
        await site.gate(scope, receive, send)
        return int(answers[0])

    asking = [asyncio.ensure_future(ask()) for _ in range(20)]
    await asyncio.sleep(0.05)
    begun.set()
    answers = await asyncio.gather(*asking)
    assert (peak <= 1_048_576 + 20_000, 503 in answers, site.gate._buffered_bytes) == (True, True, 0)


async def test_a_body_in_single_bytes_takes_no_more_memory_than_its_length() -> None:
    """And what its copy takes."""
    sent = 0

    async def receive() -> dict[str, Any]:
        nonlocal sent
        sent += 1
        return {"type": "http.request", "body": bytes([sent % 256]), "more_body": sent < 200_000}

    tracemalloc.start()
    body = await read_body({"headers": []}, receive, 200_000, lambda _: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(body), peak < 1_000_000) == (200_000, True)


async def test_a_server_that_hands_its_context_on_says_nothing_of_who_asked_before(site: Site) -> None:
    """uvicorn begins a pipelined request within the answer of the one before."""
    await site.send("POST", CHAT, json=BODY)
    token = exchange.set(site.app.exchanges[0])
    try:
        await site.send("GET", "/v1/models")
    finally:
        exchange.reset(token)
    assert site.app.exchanges[1] is None


async def test_a_large_body_is_read_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of a megabyte in small parts takes a third of a second, in which others are answered."""
    site, threads = Site(GateConfig(), guarded=False), []

    def read(operation: str, body: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return views(operation, body)

    monkeypatch.setattr(site.gate, "_read", read)
    for words in (1, 20_000):
        await site.send("POST", CHAT, json={"messages": [{"role": "user", "content": "word " * words}]})
    assert threads == [True, False]
