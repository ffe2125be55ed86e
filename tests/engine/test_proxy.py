"""The proxy before a real vLLM: its events say what the engine's own events of the same requests say.

Long: `.venv-engine/bin/python -m pytest tests/engine/test_proxy.py`.
"""

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI, PermissionDeniedError

from collector.event import AuditEvent
from tests.collector.proxying import Front, fronting
from tests.engine.conftest import MODEL, Server
from tests.hostile.wire import CHAT, cases, send_all

PROMPT = [{"role": "user", "content": "hello there"}]
EOS = {"ignore_eos": True}
SAME = ("status", "operation", "route", "response_tokens", "prompt_tokens", "max_tokens", "n", "trace_id")


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[Front]:
    """The proxy, which has a key of the server behind."""
    with fronting(server.url, secret=server.site.api_key) as made:
        yield made


@pytest.mark.long
def test_both_events_of_a_request_agree(server: Server, front: Front) -> None:
    """Whole, streamed, several choices, several prompts: counts, settings and trace are the same."""
    before = server.mark()
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    with OpenAI(base_url=f"{front.url}/v1", api_key=front.key, max_retries=0, default_headers=headers) as client:
        ask = {"model": MODEL, "messages": PROMPT, "max_tokens": 6, "extra_body": EOS}
        client.chat.completions.create(**ask)
        client.chat.completions.create(**ask, n=3)
        parts = list(client.chat.completions.create(**ask, stream=True))
        assert all(part.choices for part in parts)
        client.completions.create(model=MODEL, prompt=["one", "one"], max_tokens=4, extra_body=EOS)
        client.responses.create(model=MODEL, input="hi", max_output_tokens=4)
        list(client.responses.create(model=MODEL, input="hi", max_output_tokens=4, stream=True))
        assert MODEL in [model.id for model in client.models.list()]
    httpx.post(
        f"{front.url}/v1/messages", headers={**front.headers, **headers}, timeout=60,
        json={"model": MODEL, "messages": PROMPT, "max_tokens": 4},
    ).raise_for_status()  # fmt: skip
    own = server.settled(8, before)
    ours = [[getattr(event, name) for name in SAME] for event in front.events]
    assert ours == [[getattr(event, name) for name in SAME] for event in own]
    assert {event.tokens_from for event in front.events} == {"usage", "shared"}
    assert {event.model_version for event in front.events} == {f"{MODEL}@unknown"}
    streamed, behind = front.events[2], own[2]
    assert [event.stream for event in front.events[:3]] == [event.stream for event in own[:3]] == [False, False, True]
    assert streamed.ttft_ms is not None
    assert behind.ttft_ms is not None
    assert streamed.ttft_ms >= behind.ttft_ms


@pytest.mark.long
def test_a_blocked_prompt_stops_at_the_proxy_and_a_client_that_goes_stops_the_engine(
    server: Server, front: Front
) -> None:
    """The engine behind has no event of the first, and an aborted one of the second."""
    before, ours = server.mark(), len(front.events)
    with (
        OpenAI(base_url=f"{front.url}/v1", api_key=front.key, max_retries=0) as client,
        pytest.raises(PermissionDeniedError),
    ):
        client.completions.create(model=MODEL, prompt="blockme")
    body = {"model": MODEL, "messages": PROMPT, "max_tokens": 1500, "stream": True, **EOS}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{front.url}{CHAT.decode()}", json=body, headers=front.headers, timeout=httpx.Timeout(30, read=1))
    (event,) = server.settled(1, before)
    assert isinstance(event, AuditEvent)
    assert event.status == "aborted"
    end_s = time.monotonic() + 10
    while len(front.events) < ours + 2:
        assert time.monotonic() < end_s
        time.sleep(0.05)
    assert [e.status for e in front.events[ours:]] == ["blocked_input", "aborted"]
    assert front.events[-1].response_tokens < 1500


@pytest.mark.soak
def test_hostile_http_reaches_the_real_engine_only_with_a_key_and_an_event(server: Server) -> None:
    """The cases of tests/hostile against vLLM's own app: engine requests and rejections are the events."""
    before = server.mark()
    counters = server.auditor().publisher.counters
    begun = counters.engine_requests
    sent = [
        case._replace(raw=case.raw.replace(b'"model": "m"', b'"model": "t"')) for case in cases(server.site.api_key)
    ]  # the length stays: the model is not there, so that nothing is generated
    good = {"model": MODEL, "messages": PROMPT, "max_tokens": 1}
    asyncio.run(send_all(int(server.url.rpartition(":")[2]), sent))
    headers = {"authorization": f"Bearer {server.site.api_key}"}
    httpx.post(f"{server.url}{CHAT.decode()}", json=good, headers=headers, timeout=60).raise_for_status()
    events = server.settled(50, before, timeout_s=20)
    worked = [event for event in events if type(event) is AuditEvent]
    assert len(worked) == counters.engine_requests - begun == 1
    assert all(event.key_id for event in worked)
    assert {event.status for event in events if type(event) is not AuditEvent} <= {"rejected", "aborted"}
