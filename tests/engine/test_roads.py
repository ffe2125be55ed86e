"""Every road into the engine gives its events: what was asked, what came back, and what was refused."""

import asyncio
import json
import multiprocessing
from collections import Counter
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from openai import OpenAI, PermissionDeniedError

from collector.event import AuditEvent, Rejection
from collector.journal import JournalFull
from tests.engine.asking import EOS, PROMPT, chat, identity
from tests.engine.conftest import MODEL, Server


def test_engine_requests_and_rejections_are_the_events(server: Server, web: httpx.Client) -> None:
    """Each kind of request has exactly its events, and no other events are there."""
    before = server.mark()
    counters = server.auditor().publisher.counters
    begun = counters.engine_requests
    expected: dict[str, list[str]] = {}

    def did(answer: httpx.Response, *statuses: str) -> httpx.Response:
        expected[identity(answer)] = sorted(statuses)
        return answer

    assert did(web.post("/v1/chat/completions", json=chat()), "ok").status_code == 200
    assert did(web.post("/v1/chat/completions", json=chat(n=3)), "ok").status_code == 200
    prompt = {"model": MODEL, "prompt": "one", "max_tokens": 4, **EOS}
    assert did(web.post("/v1/completions", json=prompt), "ok").status_code == 200
    four = {**prompt, "prompt": ["one", "two", "three", "four"]}
    assert did(web.post("/v1/completions", json=four), "ok", "ok", "ok", "ok").status_code == 200
    assert did(web.post("/v1/completions", json={**prompt, "prompt": [5, 6, 7]}), "ok").status_code == 200
    assert did(web.post("/v1/responses", json={"model": MODEL, "input": "hi", "max_output_tokens": 4}), "ok").is_success
    message = {"model": MODEL, "messages": PROMPT, "max_tokens": 4}
    assert did(web.post("/v1/messages", json=message), "ok").status_code == 200
    streamed = did(web.post("/v1/chat/completions", json=chat(stream=True)), "ok")
    assert streamed.text.rstrip().endswith("[DONE]")
    with web.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=1500)) as gone:
        did(gone, "aborted")
    blocked = did(
        web.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": "blockme"}])), "blocked_input"
    )
    assert blocked.status_code == 403
    streamed = did(web.post("/v1/completions", json={**prompt, "prompt": "blockme", "stream": True}), "blocked_input")
    assert streamed.status_code == 403
    server.guard.block_output = True
    withheld = did(web.post("/v1/chat/completions", json=chat(n=3)), "blocked_output")
    server.guard.block_output = False
    texts = {choice["message"]["content"] for choice in withheld.json()["choices"]}
    assert (texts, len(withheld.json()["choices"])) == ({"This answer was withheld by policy."}, 3)
    wrong = httpx.post(f"{server.url}/v1/chat/completions", json=chat(), headers={"authorization": "Bearer wrong"})
    assert did(wrong, "rejected").status_code == 401
    assert did(web.get("/docs"), "rejected").status_code == 404
    assert did(web.post("//v1/chat/completions", json=chat()), "rejected").status_code == 404
    assert did(web.post("/v1/chat/completions", json=chat(max_tokens=-1)), "rejected").status_code == 400
    assert did(web.post("/v1/chat/completions", json=chat(model="other")), "rejected").status_code == 404

    events = server.settled(sum(len(statuses) for statuses in expected.values()), before)
    found: dict[str, list[str]] = {}
    for event in events:
        found.setdefault(event.http_request_id, []).append(event.status)
    assert {key: sorted(statuses) for key, statuses in found.items()} == expected
    kinds = Counter(type(event) for event in events)
    assert kinds[AuditEvent] == counters.engine_requests - begun
    assert kinds[AuditEvent] + kinds[Rejection] == len(events)


def test_a_chat_has_one_event_with_all_that_is_known(server: Server, client: OpenAI) -> None:
    """The event of a chat has tokens, times, digests, pseudonyms and verdicts, and agrees with the answer."""
    before = server.mark()
    answer = client.chat.completions.create(model=MODEL, messages=PROMPT, max_tokens=5, extra_body=EOS)  # type: ignore[arg-type]
    (event,) = server.settled(1, before)
    assert answer.usage is not None
    assert (event.prompt_tokens, event.response_tokens) == (answer.usage.prompt_tokens, 5)
    assert (event.status, event.finish_reason, event.max_tokens, event.n) == ("ok", "length", 5, 1)
    assert (event.route, event.operation, event.view) == ("POST /v1/chat/completions", "chat", "messages")
    assert event.model_version.startswith("tiny@")
    assert event.weights_digest.startswith("sha256:")
    assert [(r.stage, r.decision) for r in event.guardrail_results] == [("input", "allow"), ("output", "allow")]
    assert 0 < (event.ttft_ms or 0) <= event.latency_ms
    assert (event.queue_ms or 0) >= 0
    assert (event.ms_per_output_token or 0) > 0
    assert all([event.prompt_hash, event.turn_hash, event.minhash, event.user_id, event.api_key, event.client_address])


def test_the_same_words_have_the_same_turn_hash_by_any_road(server: Server, web: httpx.Client) -> None:
    """Chat with another system prompt, a plain completion and token ids of the same text share a turn hash."""
    before = server.mark()
    ids = server.engine.get_tokenizer().encode("hello there", add_special_tokens=False)
    system = [{"role": "system", "content": "be brief"}, *PROMPT]
    plain = {"model": MODEL, "max_tokens": 2, **EOS}
    for path, body in [
        ("/v1/chat/completions", chat()),
        ("/v1/chat/completions", chat(messages=system)),
        ("/v1/completions", {**plain, "prompt": "hello there"}),
        ("/v1/completions", {**plain, "prompt": ids}),
    ]:
        assert web.post(path, json=body).status_code == 200
    events = server.settled(4, before)
    assert len({event.turn_hash for event in events}) == 1
    assert len({event.prompt_hash for event in events}) == 3


def test_token_ids_do_not_evade_the_guards(server: Server, web: httpx.Client) -> None:
    """A prompt sent as token ids is judged as the text that it is."""
    ids = server.engine.get_tokenizer().encode("please blockme now", add_special_tokens=False)
    before = server.mark()
    answer = web.post("/v1/completions", json={"model": MODEL, "prompt": ids, "max_tokens": 2})
    (event,) = server.settled(1, before)
    assert (answer.status_code, event.status, event.blocked) == (403, "blocked_input", True)


def test_the_second_of_several_prompts_is_judged_too(server: Server, web: httpx.Client) -> None:
    """A list with one bad prompt is refused as a whole; what had been begun has its event."""
    before = server.mark()
    body = {"model": MODEL, "prompt": ["fine", "blockme"], "max_tokens": 2}
    answer = web.post("/v1/completions", json=body)
    events = server.settled(2, before)
    assert answer.status_code == 403
    assert sorted(event.status for event in events) == ["aborted", "blocked_input"]


def test_the_official_client_sees_a_clean_refusal_for_streams_too(server: Server, client: OpenAI) -> None:
    """A blocked stream is an HTTP 403 before it begins, not an error within a 200."""
    with pytest.raises(PermissionDeniedError):
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "blockme"}], stream=True, max_tokens=3
        )


@pytest.mark.parametrize("choices", [1, 3])
def test_no_byte_of_a_blocked_stream_leaves(server: Server, web: httpx.Client, choices: int) -> None:
    """A stream whose answer is blocked carries the fixed text alone, and ends by content_filter."""
    before = server.mark()
    server.guard.block_output = True
    try:
        answer = web.post("/v1/chat/completions", json=chat(stream=True, n=choices, max_tokens=12, logprobs=True))
    finally:
        server.guard.block_output = False
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    pieces = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    texts = {choice["delta"].get("content") for choice in pieces} - {None, ""}
    assert texts == {"This answer was withheld by policy."}
    ended = [choice for choice in pieces if choice.get("finish_reason")]
    assert [choice["finish_reason"] for choice in ended] == ["content_filter"] * choices
    assert not any((choice.get("logprobs") or {}).get("content") for choice in pieces)
    (event,) = server.settled(1, before)
    assert (event.status, event.blocked, event.response_tokens) == ("blocked_output", True, 12 * choices)


def test_the_user_of_the_body_counts_only_with_a_key_that_may_speak_for_others(server: Server) -> None:
    """A plain key is always its own user; a proxy's key names the user it serves."""
    before = server.mark()
    for key, user in [(server.site.api_key, "bob"), (server.site.proxy_key, "bob"), (server.site.proxy_key, "alice")]:
        headers = {"authorization": f"Bearer {key}", "x-session-id": "one"}
        httpx.post(f"{server.url}/v1/chat/completions", json=chat(user=user), headers=headers, timeout=60)
    own, bob, alice = server.settled(3, before)
    assert own.user_id == alice.user_id != bob.user_id
    assert own.session_id == alice.session_id == bob.session_id != ""


def test_a_generator_dropped_before_its_first_step_has_its_event(server: Server) -> None:
    """What the server begins and never reads is an aborted request."""
    from vllm import SamplingParams

    before = server.mark()

    async def drop() -> None:
        server.engine.generate("unread", SamplingParams(max_tokens=2), "dropped")

    server.run(drop())
    (event,) = server.settled(1, before)
    assert (event.status, event.reason, event.view) == ("aborted", "never started", "rendered")


def test_a_cancelled_wait_is_an_aborted_request(server: Server) -> None:
    """A client that goes while the engine works leaves an aborted event, with the tokens delivered so far."""
    from vllm import SamplingParams

    before = server.mark()

    async def leave() -> None:
        async def read() -> None:
            async for _ in server.engine.generate("long", SamplingParams(max_tokens=1500, ignore_eos=True), "left"):
                pass

        task = asyncio.ensure_future(read())
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    server.run(leave())
    (event,) = server.settled(1, before)
    assert (event.status, event.reason, event.max_tokens) == ("aborted", "client gone", 1500)


def test_encode_is_audited(server: Server) -> None:
    """The pooling road is wrapped too: here the model has none, and the error is the event."""
    from vllm import PoolingParams

    before = server.mark()

    async def pool() -> None:
        async for _ in server.engine.encode("text", PoolingParams(task="embed"), "pooled"):
            pass

    with pytest.raises(Exception):  # noqa: B017, PT011 - vLLM's own error, whatever it is
        server.run(pool())
    (event,) = server.settled(1, before)
    assert (event.status, event.operation) == ("error", "encode")


def test_a_failing_guard_blocks_and_is_counted(server: Server, web: httpx.Client) -> None:
    """What a guard could not judge is blocked by default, and the verdict says why without the text."""
    before = server.mark()
    server.guard.fail = True
    try:
        answer = web.post("/v1/chat/completions", json=chat())
    finally:
        server.guard.fail = False
    (event,) = server.settled(1, before)
    assert (answer.status_code, event.status) == (403, "blocked_input")
    assert [(r.decision, r.error) for r in event.guardrail_results] == [("error", "RuntimeError")]
    assert server.auditor().publisher.counters.guard_errors["secrets"] >= 1


def test_without_room_in_the_journal_nothing_is_answered(
    server: Server, web: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full journal means 503 for every request, by the gate's road and by the engine's."""

    def full(**_: Any) -> None:
        raise JournalFull

    publisher = server.auditor().publisher
    monkeypatch.setattr(publisher, "begin", full)
    monkeypatch.setattr(publisher, "reject", full)
    assert web.post("/v1/chat/completions", json=chat()).status_code >= 500
    assert web.post("/v1/chat/completions", json=chat(stream=True)).status_code >= 500
    assert httpx.get(f"{server.url}/v1/models").status_code == 503


def test_an_answer_whose_event_can_not_be_written_does_not_leave(
    server: Server, web: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal fails between begin and end: the client gets an error and not one word of the answer."""
    publisher = server.auditor().publisher

    def full(*_: Any, **__: Any) -> None:
        raise JournalFull

    with monkeypatch.context() as patch:
        patch.setattr(publisher, "finish", full)
        plain = web.post("/v1/chat/completions", json=chat())
        streamed = web.post("/v1/chat/completions", json=chat(stream=True))
    assert plain.status_code == 503
    assert "choices" not in plain.text
    assert '"content"' not in streamed.text.replace('"content":""', "")


def test_a_fault_of_the_plugin_fails_closed(server: Server, web: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in the wrapper is a 503, never an unaudited answer."""
    from collector.engine import online

    def broken(*_: Any) -> None:
        raise AttributeError("secret words")

    monkeypatch.setattr(online, "engine_request", broken)
    answer = web.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 503
    assert "secret words" not in answer.text


def test_an_engine_without_the_plugin_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate asks for the plugin round this very engine and does not open without it."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from collector.engine import active, auditor_for

    assert active(server.engine)
    monkeypatch.setattr(AsyncLLM, "generate", AsyncLLM.generate.__wrapped__)
    with pytest.raises(RuntimeError, match="plugin is not active"):
        auditor_for(server.engine)


def test_installing_twice_wraps_once(server: Server) -> None:
    """vLLM may load its plugins more than once in a process."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from inferwatch.vllm import register

    once = AsyncLLM.generate
    register()
    assert AsyncLLM.generate is once


def test_every_route_of_this_vllm_is_in_the_table(server: Server) -> None:
    """A new version's new routes are told at the start; this version has none that the table does not know."""
    from collector.routes import unknown

    rows = [f"{method} {route.path}" for route in server.app.routes for method in getattr(route, "methods", None) or ()]
    assert len(rows) > 30
    assert unknown(rows) == []


def test_the_death_of_the_engine_is_an_error_for_each_request_in_flight(server: Server) -> None:
    """SIGKILL to the engine core: every client's request has an error event. Last here, as the engine is gone then."""
    before = server.mark()
    headers = {"authorization": f"Bearer {server.site.api_key}"}
    with ExitStack() as stack:
        for _ in range(5):
            web = stack.enter_context(httpx.Client(base_url=server.url, headers=headers, timeout=60))
            stack.enter_context(web.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=1500)))
        for child in multiprocessing.active_children():
            child.kill()
        events = server.settled(5, before)
    assert [(event.status, event.reason) for event in events] == [("error", "EngineDeadError")] * 5
