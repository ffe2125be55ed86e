"""Every road of a generation model, driven by official clients on the real engine; the events against its own count."""

import base64
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from anthropic import Anthropic
from openai import OpenAI

from collector.engine.process import current
from collector.event import AuditEvent, Heartbeat, Rejection, encode
from collector.routes import ROUTES
from detectors.config import DetectConfig
from detectors.engine import PartitionEngine, TenantEngine
from tests.engine.asking import EOS, chat, identity
from tests.engine.conftest import ADAPTER, MODEL, Server

WORDS = "please blockme now"
NOT_OF_THIS_MODEL = "POST /v1/systemone"
"""It wants single tokens for its labels, which the tiny tokenizer has not."""


class Counted:
    """The engine's own count and the wrapper's, since the start of a test."""

    def __init__(self) -> None:
        self.finished, self.unaudited = current.tally.finished, current.tally.unaudited

    def since(self, expected: int, timeout_s: float = 10) -> tuple[int, int]:
        """(finished, unaudited) once the engine has counted `expected`."""
        end = time.monotonic() + timeout_s
        while current.tally.finished - self.finished < expected and time.monotonic() < end:
            time.sleep(0.02)
        return current.tally.finished - self.finished, current.tally.unaudited - self.unaudited


def ids(server: Server, text: str) -> list[int]:
    """The text as token ids."""
    encoded: list[int] = server.engine.get_tokenizer().encode(text, add_special_tokens=False)
    return encoded


def roads(server: Server) -> dict[str, tuple[str, dict[str, Any], int, int]]:
    """Name: path, body, events, and what the engine counts (n choices are n)."""
    token_ids = ids(server, "hello there")
    plain = {"model": MODEL, "max_tokens": 3, **EOS}
    return {
        "chat": ("/v1/chat/completions", chat(), 1, 1),
        "chat, n": ("/v1/chat/completions", chat(n=3), 1, 3),
        "chat, stream": ("/v1/chat/completions", chat(stream=True, n=2), 1, 2),
        "batch chat": (
            "/v1/chat/completions/batch",
            chat(messages=[[{"role": "user", "content": text}] for text in ("one", "two")]),
            2,
            2,
        ),
        "completion": ("/v1/completions", {**plain, "prompt": "one"}, 1, 1),
        "prompts": ("/v1/completions", {**plain, "prompt": ["one", "two", "three"]}, 3, 3),
        "token ids": ("/v1/completions", {**plain, "prompt": token_ids}, 1, 1),
        "lists of token ids": ("/v1/completions", {**plain, "prompt": [token_ids, token_ids]}, 2, 2),
        "responses": ("/v1/responses", {"model": MODEL, "input": "hi", "max_output_tokens": 4}, 1, 1),
        "messages": ("/v1/messages", {"model": MODEL, "messages": chat()["messages"], "max_tokens": 4}, 1, 1),
        "tokens in, tokens out": (
            "/inference/v1/generate",
            {"model": MODEL, "token_ids": token_ids, "sampling_params": {"max_tokens": 3, **EOS}},
            1,
            1,
        ),
        "invocations": ("/invocations", chat(), 1, 1),
        "generative scoring": (
            "/generative_scoring",
            {"model": MODEL, "query": "which", "items": ["one", "two"], "label_token_ids": [5, 6]},
            2,
            2,
        ),
    }


def test_every_audited_road_has_its_events_and_the_engine_counts_the_same(server: Server, web: httpx.Client) -> None:
    """Road by road: the status, the events under its id, the operation of the table, and nothing unaudited."""
    table = roads(server)
    driven = {f"POST {path}" for path, _, _, _ in table.values()}
    served = {f"POST {route.path}" for route in server.app.routes if "POST" in (getattr(route, "methods", None) or ())}
    audited = {row for row, route in ROUTES.items() if route.handling == "audited"}
    assert driven == (audited & served) - {NOT_OF_THIS_MODEL}
    for name, (path, body, events, counted) in table.items():
        count, before = Counted(), server.mark()
        answer = web.post(path, json=body)
        assert answer.status_code == 200, (name, answer.text)
        found = server.settled(events, before)
        assert [(e.http_request_id, e.status, e.operation) for e in found] == [
            (identity(answer), "ok", ROUTES[f"POST {path}"].operation)
        ] * events, name
        assert count.since(counted) == (counted, 0), name


def test_a_road_that_the_model_can_not_serve_is_a_rejection(server: Server, web: httpx.Client) -> None:
    """The server answers 501 before the engine sees anything: one rejection says so."""
    question = {"type": "choice", "instructions": "Which?", "criteria": {"one": None, "two": None}}
    before = server.mark()
    answer = web.post("/v1/systemone", json={"model": MODEL, "state": "x", "questions": {"q": question}})
    (event,) = server.settled(1, before)
    told = (event.http_request_id, event.operation, event.reason, event.http_status)
    assert told == (identity(answer), "decision", "server_refused", 501)


def test_roads_that_only_handle_text_need_a_key_and_make_no_event(server: Server, web: httpx.Client) -> None:
    """Tokenising and rendering work no model: harmless by the table, and the engine counts nothing."""
    count, before = Counted(), server.mark()
    assert web.post("/tokenize", json={"model": MODEL, "prompt": "hello"}).json()["count"] > 0
    assert web.post("/detokenize", json={"model": MODEL, "tokens": [5, 6]}).status_code == 200
    assert web.post("/v1/chat/completions/render", json=chat()).status_code == 200
    assert web.get("/v1/models").status_code == 200
    assert httpx.post(f"{server.url}/tokenize", json={"model": MODEL, "prompt": "hello"}).status_code == 401
    (refused,) = server.settled(1, before)
    assert (refused.reason, count.since(0)) == ("no_key", (0, 0))


@pytest.mark.parametrize("road", ["token ids", "lists of token ids", "tokens in, tokens out", "generative scoring"])
def test_token_ids_are_judged_as_text_wherever_they_stand(server: Server, web: httpx.Client, road: str) -> None:
    """A prompt in token ids, also nested, also on the road that knows nothing else, is blocked like its text."""
    path, body, _, _ = roads(server)[road]
    bad = ids(server, WORDS)
    place = {"token ids": "prompt", "lists of token ids": "prompt", "tokens in, tokens out": "token_ids"}.get(road)
    hidden = {place: [ids(server, "fine"), bad] if road.startswith("lists") else bad} if place else {"query": bad}
    hidden |= {} if place else {"items": [ids(server, "fine")]}
    before = server.mark()
    answer = web.post(path, json={**body, **hidden})
    events = server.settled(1, before)
    assert answer.status_code == 403
    assert "blocked_input" in {event.status for event in events}
    assert "ok" not in {event.status for event in events}


@pytest.fixture
def anthropic(server: Server) -> Iterator[Anthropic]:
    """The official client with a good key."""
    with Anthropic(base_url=server.url, api_key=server.site.api_key, max_retries=0) as made:
        yield made


def test_the_official_clients_are_audited(server: Server, client: OpenAI, anthropic: Anthropic) -> None:
    """OpenAI's and Anthropic's own clients, plain and streaming: an event each with the tokens that they were told."""
    before = server.mark()
    messages: Any = chat()["messages"]
    said = anthropic.messages.create(model=MODEL, messages=messages, max_tokens=4)
    with anthropic.messages.stream(model=MODEL, messages=messages, max_tokens=4) as stream:
        streamed = stream.get_final_message()
    assert anthropic.messages.count_tokens(model=MODEL, messages=messages).input_tokens > 0
    response = client.responses.create(model=MODEL, input="hello", max_output_tokens=4)
    chunks = client.completions.create(
        model=MODEL, prompt="hello", max_tokens=4, stream=True, stream_options={"include_usage": True}, extra_body=EOS
    )
    *_, last = chunks
    assert response.usage is not None
    assert last.usage is not None
    told = [said.usage.output_tokens, streamed.usage.output_tokens]
    told += [response.usage.output_tokens, last.usage.completion_tokens]
    events = server.settled(4, before)
    assert [(event.operation, event.response_tokens) for event in events] == list(
        zip(["messages", "messages", "responses", "completion"], told, strict=True)
    )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_beam_search_is_one_event(server: Server, web: httpx.Client, path: str) -> None:
    """However many engine requests it takes: one event with n beams and their tokens, each step accounted for."""
    count, before = Counted(), server.mark()
    body = {**chat(n=3, max_tokens=4), "use_beam_search": True}
    if path == "/v1/completions":
        body = {"model": MODEL, "prompt": "hello there", "max_tokens": 4, "n": 3, "use_beam_search": True, **EOS}
    answer = web.post(path, json=body)
    assert answer.status_code == 200, answer.text
    (event,) = server.settled(1, before)
    assert (event.status, event.n, event.response_tokens) == ("ok", 3, 12)
    steps, unaudited = count.since(10)
    assert (steps, unaudited) == (1 + 3 * 3, 0)


def test_the_answers_of_a_beam_search_are_judged_before_any_leaves(server: Server, web: httpx.Client) -> None:
    """All beams go when the guard blocks one; a blocked prompt never searches."""
    body = {**chat(n=2, max_tokens=3), "use_beam_search": True}
    before = server.mark()
    server.guard.block_output = True
    try:
        answer = web.post("/v1/chat/completions", json=body)
    finally:
        server.guard.block_output = False
    (event,) = server.settled(1, before)
    texts = {choice["message"]["content"] for choice in answer.json()["choices"]}
    assert (event.status, texts) == ("blocked_output", {"This answer was withheld by policy."})
    count, before = Counted(), server.mark()
    answer = web.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": WORDS}]})
    (event,) = server.settled(1, before)
    assert (answer.status_code, event.status, count.since(0)) == (403, "blocked_input", (0, 0))


@pytest.mark.parametrize("kind", ["plain", "stream", "n", "beam"])
def test_an_abort_counts_what_was_generated(server: Server, web: httpx.Client, kind: str) -> None:
    """A client that goes has received nothing, or nothing yet; the event has the tokens that the engine made."""
    fields: dict[str, Any] = {"stream": {"stream": True}, "n": {"n": 2}, "beam": {"n": 2, "use_beam_search": True}}
    before = server.mark()
    with pytest.raises(httpx.ReadTimeout):
        web.post("/v1/chat/completions", json=chat(max_tokens=1500, **fields.get(kind, {})), timeout=0.7)
    (event,) = server.settled(1, before)
    assert (event.status, event.reason) == ("aborted", "client gone")
    assert 0 < event.response_tokens < 3000


def test_an_image_is_refused_and_told(server: Server, web: httpx.Client) -> None:
    """The gate sees it before vLLM does; the rejection has its digest and size."""
    url = "data:image/png;base64," + base64.b64encode(b"picture").decode()
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": url}}]
    before = server.mark()
    answer = web.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": parts}]))
    (event,) = server.settled(1, before)
    assert (answer.status_code, event.reason, event.media_count) == (403, "media", 1)
    assert [(each.kind, each.size_bytes) for each in event.media] == [("image", 7)]
    assert isinstance(event, Rejection)


def test_an_adapter_is_named_with_its_digest_and_no_other_is_loaded(
    server: Server, web: httpx.Client, tmp_path: Path
) -> None:
    """What the server was started with answers; a path that comes while it runs is refused by every road."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    before = server.mark()
    assert web.post("/v1/chat/completions", json=chat(model=ADAPTER)).status_code == 200
    assert web.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(tmp_path)}).status_code == 404
    event, refused = server.settled(2, before)
    assert event.adapter is not None
    assert (event.adapter.name, event.adapter.digest[:7], refused.reason) == (ADAPTER, "sha256:", "refused_route")
    stray = LoRARequest("stray", 9, str(tmp_path))
    with pytest.raises(ValueError, match="not among those"):
        server.run(server.engine.add_lora(stray))

    async def ask() -> None:
        async for _ in server.engine.generate("hello", SamplingParams(max_tokens=1), "stray", lora_request=stray):
            pass

    before = server.mark()
    with pytest.raises(Exception, match="blocked by policy"):
        server.run(ask())
    (event,) = server.settled(1, before)
    assert (event.status, event.reason) == ("blocked_input", "adapter")


def test_the_self_test_has_its_event(server: Server) -> None:
    """The first event of the boot is the collector's own request, marked so, and of no user."""
    (tested,) = [event for event in server.site.events() if event.operation == "selftest"]
    assert (tested.status, tested.user_id, tested.api_key, tested.response_tokens) == ("ok", "", "", 1)


def test_a_self_test_that_makes_no_event_stops_the_start(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper is bypassed though its marks are there: the engine answers, and the gate would not open."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from collector.engine import active, selftest
    from collector.engine.process import MARK

    bare = AsyncLLM.generate.__wrapped__

    def around(self: Any, *args: Any, **kwargs: Any) -> Any:
        return bare(self, *args, **kwargs)

    setattr(around, MARK, True)
    monkeypatch.setattr(AsyncLLM, "generate", around)
    assert active(server.engine)
    with pytest.raises(RuntimeError, match="made no event"):
        server.run(selftest(server.engine, server.auditor()))


def test_a_request_driven_around_the_wrapper_is_a_finding(server: Server) -> None:
    """Straight into the engine: its own statistics count it, a heartbeat says so, the stages make the finding."""
    from vllm import SamplingParams

    async def around() -> None:
        queue = await server.engine.add_request("around", "hello", SamplingParams(max_tokens=2))
        output = await queue.get()
        while not output.finished:
            output = await queue.get()

    count = Counted()
    server.run(around())
    assert count.since(1) == (1, 1)
    findings: list[Any] = []
    end = time.monotonic() + 30
    while not findings and time.monotonic() < end:
        time.sleep(0.5)
        findings = coverage_of(server)
    assert {(each.severity, each.entity.id.rpartition("#")[2]) for each in findings} == {("high", "unaudited")}
    assert "that nobody audited" in findings[0].summary


def coverage_of(server: Server) -> list[Any]:
    """What the streams' two halves say of coverage on what Kafka holds now."""
    config = DetectConfig()
    logs = server.site.logs()
    tenant = TenantEngine(config, partition=0, partitions=len(logs))
    for partition, log in logs.items():
        engine = PartitionEngine(config, topic="iw.events", partition=partition, partitions=len(logs))
        raws, times, offsets = zip(*log, strict=True)
        assert engine.observe_log(list(raws), np.array(times), np.array(offsets)) == []
        for rollup in engine.take():
            tenant.observe(rollup)
    return [finding for finding in tenant.take() if finding.detector == "coverage"]


def test_everything_driven_so_far_adds_up(server: Server) -> None:
    """Engine requests and rejections are the events, and every heartbeat of the end carries the engine's own count."""
    time.sleep(1)
    records = server.site.records()
    kinds = Counter(type(record) for record in records)
    last = max((record for record in records if isinstance(record, Heartbeat)), key=lambda beat: beat.timestamp)
    counters = server.auditor().publisher.counters
    assert kinds[AuditEvent] == counters.engine_requests == last.events
    assert kinds[Rejection] == counters.rejections == last.rejections
    assert (last.engine_finished, last.unaudited) == (current.tally.finished, current.tally.unaudited)
    assert encode(last)
