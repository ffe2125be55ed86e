"""The proxy before a server whose answers are broken, cut, odd or late, byte for byte as written here."""

import json
import time
from typing import Any

import httpx
import pytest

from tests.collector.proxying import BOTH, INPUT, Front, Raw, answer_of, fronting, serving_raw

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
STREAM = {**BODY, "stream": True}
GOOD = {"id": "1", "choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}
SSE = "text/event-stream"
OPEN = f"HTTP/1.1 200 OK\r\ncontent-type: {SSE}\r\n\r\n".encode()
DELTA = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'


def post(front: Front, body: dict[str, Any]) -> httpx.Response:
    """One request with a good key."""
    return httpx.post(f"{front.url}{CHAT}", json=body, headers=front.headers, timeout=30)


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        (b"", 502, "upstream_broke"),
        (b"garbage\r\n\r\n", 502, "upstream_broke"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 9\r\n\r\nhello", 502, "upstream_broke"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{", 502, "upstream_broke"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 300_000 + b"\r\n\r\n", 502, "upstream_broke"),
        (answer_of(b"not json"), 502, "upstream_garbled"),
        (answer_of([1]), 502, "upstream_garbled"),
        (answer_of(b"<html>", kind="text/html"), 502, "upstream_garbled"),
        (answer_of(GOOD, more="content-encoding: gzip\r\n"), 502, "upstream_garbled"),
        (answer_of(b"", status="204 No Content"), 502, "upstream_garbled"),
        (answer_of(b"", status="302 Found", more="location: http://127.0.0.1:1/\r\n"), 502, "upstream_redirects"),
        (answer_of(b"", status="307 Found", more="location: /v1/other\r\n"), 502, "upstream_redirects"),
        (answer_of({"choices": [{"text": "x" * 70_000}]}), 502, "upstream_too_large"),
        (answer_of({}, status="600 Odd"), 502, "upstream_garbled"),
        (answer_of({"error": "busy"}, status="429 Busy", more="retry-after: \u00b2\r\n"), 429, "upstream_refused"),
        (OPEN, 502, "upstream_broke"),
        (OPEN + b"data: {\n\n", 502, "upstream_garbled"),
        (OPEN + b"data: [1]\n\n", 502, "upstream_garbled"),
        (answer_of({"error": {"message": "no"}}, status="404 Not Found"), 404, "upstream_refused"),
        (answer_of(b"Traceback", status="500 Oops"), 500, "upstream_failed"),
        (answer_of({"error": "busy"}, status="503 Busy", more="retry-after: 3\r\n"), 503, "upstream_failed"),
    ],
)
def test_a_server_that_fails_is_a_clean_error_and_an_event(answer: bytes, status: int, told: str) -> None:
    """502, or the server's own status; never a redirect followed, never half an answer, never a second request."""
    raw = Raw(answer)
    with serving_raw(raw) as url, fronting(url, answer_bytes_max=65_536) as front:
        got = post(front, BODY)
        assert (got.status_code, raw.seen, front.told()) == (status, 1, [("error", told, status)])
        assert got.headers["content-type"] == "application/json"
        assert set(got.json()) == {"error"}
        assert b"Traceback" not in got.content
        assert got.headers.get("retry-after") == ("3" if status == 503 else None)


@pytest.mark.parametrize(("more", "told"), [(b"", "upstream_broke"), (b"data: {\n\n", "upstream_garbled")])
def test_a_stream_that_breaks_ends_with_an_error_and_an_event(more: bytes, told: str) -> None:
    """What had come is with the client; the end says that it is no end."""
    with serving_raw(Raw(OPEN + DELTA + more)) as url, fronting(url) as front:
        got = post(front, STREAM)
        assert json.loads(got.text.strip().rpartition("data: ")[2])["error"]["code"] == told
        assert front.told() == [("error", told, 502)]
        assert front.events[0].response_tokens == 1
        assert got.content.startswith(DELTA) or got.status_code == 502


@pytest.mark.parametrize(
    ("end", "told"), [(b"", ("error", "upstream_broke", 502)), (b"data: [DONE]\n\n", ("ok", "", 200))]
)
@pytest.mark.parametrize("stages", [INPUT, BOTH])
def test_a_stream_of_several_choices_ends_with_the_last_of_them(
    stages: frozenset[str], end: bytes, told: tuple[str, str, int]
) -> None:
    """One that had not come to its end is not whole, unless the server says that it is."""
    frames = [
        {"index": 0, "delta": {"content": "one"}},
        {"index": 1, "delta": {"content": "two"}},
        {"index": 0, "delta": {}, "finish_reason": "stop"},
        {"index": 1, "delta": {"content": "and"}},
    ]
    sent = b"".join(b"data: " + json.dumps({"choices": [frame]}).encode() + b"\n\n" for frame in frames)
    with serving_raw(Raw(OPEN + sent + end)) as url, fronting(url, stages=stages) as front:
        post(front, {**STREAM, "n": 2})
        assert front.told() == [told]


def test_a_servers_error_within_a_stream_is_an_error() -> None:
    """It goes on to the client, and the event says who failed."""
    error = b'data: {"error":{"message":"out of memory"}}\n\n'
    with serving_raw(Raw(OPEN + DELTA + error)) as url, fronting(url) as front:
        assert post(front, STREAM).content == DELTA + error
        assert front.told() == [("error", "upstream_failed", 200)]


@pytest.mark.parametrize("answer", [b"", OPEN, OPEN + DELTA])
def test_a_server_that_falls_silent_is_given_up(answer: bytes) -> None:
    """504, or an error at the end of what had come; the connection is closed."""
    raw = Raw(answer, hang_s=20)
    with serving_raw(raw) as url, fronting(url, silence_timeout_s=0.3) as front:
        got = post(front, STREAM)
        assert got.status_code == (200 if DELTA in answer else 504)
        assert "upstream_slow" in got.text
        assert front.told() == [("error", "upstream_slow", 504)]
        end_s = time.monotonic() + 10
        while not raw.closed:
            assert time.monotonic() < end_s
            time.sleep(0.01)
