"""The gate before a recording app: who gets in, and what each request leaves behind."""

import asyncio
from typing import Any

import pytest

from collector.auditor import Auditor
from collector.context import Claim, exchange
from collector.gate import Gate
from tests.collector.gating import BODY, CHAT, Site, lifespan


async def test_a_good_request_passes_unchanged_and_leaves_no_rejection(site: Site) -> None:
    """The app gets the very bytes, and the exchange says who asks and what the guards said."""
    raw = b'{ "messages": [{"role":"user","content":"hello"}],\n "user":"bob" }'
    answer = await site.send("POST", CHAT, content=raw)
    (at_hand,) = site.app.exchanges
    assert (answer.status_code, site.app.bodies, site.reasons) == (200, [raw], [])
    assert answer.headers["inferwatch-request-id"] == at_hand.http_request_id
    assert (at_hand.route, at_hand.operation) == (f"POST {CHAT}", "chat")
    assert [(r.stage, r.decision) for r in at_hand.prompts[0].verdicts] == [("input", "allow")]
    assert exchange.get() is None


@pytest.mark.parametrize(
    ("key", "headers", "reason"),
    [
        (None, [], "no_key"),
        ("wrong", [], "wrong_key"),
        (None, [("authorization", "Basic abc")], "no_key"),
        (None, [("authorization", "Bearer")], "no_key"),
        (None, [("x-api-key", "wrong")], "wrong_key"),
        ("", [("x-api-key", "other")], "two_keys"),
    ],
)
async def test_without_a_good_key_nobody_gets_in(
    site: Site, key: str | None, headers: list[tuple[str, str]], reason: str
) -> None:
    """Each refusal is a 401 in OpenAI's shape and one rejection; the app never hears of it."""
    answer = await site.send("POST", CHAT, key=key, headers=headers, json=BODY)
    assert (answer.status_code, site.app.bodies, site.reasons) == (401, [], [(reason, 401)])
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert site.publisher.rejections[0]["client_address"].startswith("a_")
    assert site.publisher.rejections[0]["http_request_id"] == answer.headers["inferwatch-request-id"]


async def test_both_ways_of_sending_the_key_are_good(site: Site) -> None:
    """`x-api-key` serves as well as a bearer token, and both at once where they agree."""
    for key, headers in [(None, [("x-api-key", site.key)]), ("", [("x-api-key", site.key)])]:
        assert (await site.send("POST", CHAT, key=key, headers=headers, json=BODY)).status_code == 200


async def test_a_length_said_in_two_ways_ends_the_connection(site: Site) -> None:
    """Who stands before the gate may have read the other one."""
    headers = [("content-length", "2"), ("transfer-encoding", "chunked")]
    answer = await site.send("POST", CHAT, headers=headers, content=b"{}")
    assert (answer.status_code, answer.headers["connection"], site.app.bodies) == (400, "close", [])
    assert site.reasons == [("two_lengths", 400)]


async def test_the_trace_id_is_on_every_event_of_the_request(site: Site) -> None:
    """Requests that pass and requests that do not."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = [("traceparent", f"00-{trace}-00f067aa0ba902b7-01")]
    await site.send("POST", CHAT, headers=headers, json=BODY)
    await site.send("POST", CHAT, key="wrong", headers=headers, json=BODY)
    await site.send("POST", CHAT, key="wrong", headers=[("traceparent", "words")], json=BODY)
    assert site.app.exchanges[0].trace_id == trace
    assert [fields["trace_id"] for fields in site.publisher.rejections] == [trace, ""]


@pytest.mark.parametrize(
    ("status", "engine_requests", "error", "expected"),
    [
        (400, 0, None, [("server_refused", 400)]),
        (500, 0, None, [("server_refused", 500)]),
        (200, 0, None, [("no_engine_request", 200)]),
        (403, 1, None, []),
        (200, 4, None, []),
        (200, 0, RuntimeError("words"), [("server_failed", 500)]),
    ],
)
async def test_each_audited_request_has_its_event(
    site: Site, status: int, engine_requests: int, error: Exception | None, expected: list[tuple[str, int]]
) -> None:
    """Whatever the server does without an engine request is one rejection; with one, none."""
    site.app.status, site.app.engine_requests, site.app.error = status, engine_requests, error
    if error is None:
        await site.send("POST", CHAT, json=BODY)
    else:
        with pytest.raises(RuntimeError):
            await site.send("POST", CHAT, json=BODY)
    assert site.reasons == expected


async def test_a_client_that_goes_before_the_engine_begins_has_its_event(site: Site) -> None:
    """A cancelled request without an engine request is an aborted rejection."""
    started = asyncio.Event()

    async def hang(_scope: Any, _receive: Any, _send: Any) -> None:
        started.set()
        await asyncio.sleep(60)

    site.gate._app = hang
    task = asyncio.ensure_future(site.send("POST", CHAT, json=BODY))
    await started.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    (fields,) = site.publisher.rejections
    assert (fields["reason"], fields["status"], fields["http_status"]) == ("client_gone", "aborted", 0)


async def test_users_and_sessions_are_pseudonyms_of_what_the_key_allows(site: Site) -> None:
    """Only a key that may speak for others names a user; header and body spell the same pseudonym."""
    for key, headers, body in [
        (site.key, [("x-user-id", "bob")], {**BODY, "user": "bob", "session_id": "s1"}),
        (site.proxy_key, [("x-user-id", "bob")], {**BODY, "session_id": "s1"}),
        (site.proxy_key, [("x-session-id", "s1")], {**BODY, "user": "bob"}),
        (site.proxy_key, [], BODY),
    ]:
        await site.send("POST", CHAT, key=key, headers=headers, json=body)
    alice, bob, same, proxy = [at_hand.caller for at_hand in site.app.exchanges]
    assert bob.user_id == same.user_id
    assert len({alice.user_id, bob.user_id, proxy.user_id}) == 3
    assert alice.session_id == bob.session_id == same.session_id
    assert proxy.session_id == ""
    assert "bob" not in repr(bob)
    assert bob.key == bob.user_id


async def test_verdicts_are_on_each_prompt_of_the_body(site: Site) -> None:
    """The engine plugin finds the blocked one by its place and its text."""
    await site.send("POST", "/v1/completions", json={"prompt": ["fine", "an attack"]})
    (at_hand,) = site.app.exchanges
    assert [judged.blocked for judged in at_hand.prompts] == [False, True]


async def test_a_verdict_counts_for_its_own_prompt_only(site: Site) -> None:
    """Another text at the place of a judged prompt has no verdict of the gate's."""
    site.app.engine_requests = 0
    site.app.status = 400
    await site.send("POST", "/v1/completions", json={"prompt": ["fine", "good"]})
    (at_hand,) = site.app.exchanges
    assert at_hand.claim("fine") == Claim(at_hand.prompts[0], fits=True)
    assert at_hand.claim("fine") == Claim(at_hand.prompts[1], fits=False)
    assert at_hand.claim("good") == Claim()
    at_hand.claimed = 0
    assert at_hand.claim(None) == Claim(at_hand.prompts[0], fits=False)


async def test_where_no_event_can_be_written_nothing_is_answered(site: Site) -> None:
    """A full journal turns even a refusal into 503."""
    site.publisher.full = True
    assert (await site.send("POST", CHAT, key="wrong", json=BODY)).status_code == 503


async def test_the_publisher_stops_before_the_server_says_that_it_has(site: Site) -> None:
    """Goodbye is said while the process still lives."""
    sent = await lifespan(site.gate)
    assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert site.stopped == 1


async def test_a_gate_that_can_not_open_stops_the_start(site: Site) -> None:
    """One sentence says why, and no request is answered."""

    def refuse(_: Any) -> Auditor:
        raise RuntimeError("inferwatch's plugin is not active in this vLLM")

    gate = Gate(site.app, auditor=refuse, stop=site.stop)
    assert await lifespan(gate) == [
        {"type": "lifespan.startup.failed", "message": "inferwatch: inferwatch's plugin is not active in this vLLM"}
    ]
    site.gate = gate
    assert (await site.send("POST", CHAT, json=BODY)).status_code == 503
    assert (await site.send("GET", "/health")).status_code == 503
    assert site.app.bodies == []
