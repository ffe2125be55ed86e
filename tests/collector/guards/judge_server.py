"""A small server of OpenAI's API on a loopback port that refuses what the real ones refuse: stands in for a judge.

It answers by a rule of the test's. A request of another shape, model or key gets the status that vLLM and hosted
servers give, so that a guard which asks wrongly fails its test. With `fault` it misbehaves instead.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["", "redirect", "hang", "drip", "huge", "gzip", "nan", "not json", "no choices", "cut", "500", "drop"]
Rule = Callable[[Sequence[Mapping[str, Any]]], str]
KNOWN = frozenset(
    {"model", "messages", "prompt", "temperature", "max_tokens", "logprobs", "top_logprobs", "response_format"}
)


@dataclass
class JudgeServer:
    """What it does, and what it saw."""

    rule: Rule
    url: str = ""
    key: str = ""
    model: str = "judge"
    fault: Fault = ""
    classify: Callable[[str], Any] | None = None
    """What `POST /classify` answers to a text."""
    unsafe_share: float | None = None
    """P(unsafe) to tell as log-probabilities; unset: as the rule answers."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    connections: int = 0


def text_of(message: Mapping[str, Any]) -> str:
    """The words of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


@contextmanager
def serving(rule: Rule, **settings: Any) -> Iterator[JudgeServer]:
    """The server, on a free port of this host."""
    judge = JudgeServer(rule, **settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            judge.connections += 1
            super().setup()

        def do_POST(self) -> None:
            try:
                _answer(self, judge)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield judge
        server.shutdown()
        thread.join()


def _answer(handler: BaseHTTPRequestHandler, judge: JudgeServer) -> None:
    raw = handler.rfile.read(int(handler.headers["Content-Length"]))
    judge.paths.append(handler.path)
    if _misbehaves(handler, judge.fault):
        return
    status, told = _reply(handler, judge, raw)
    _send(handler, status, json.dumps(told).encode())


def _send(handler: BaseHTTPRequestHandler, status: int, said: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(said)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(said)


def _misbehaves(handler: BaseHTTPRequestHandler, fault: Fault) -> bool:
    plain: dict[str, tuple[int, bytes, dict[str, str]]] = {
        "redirect": (307, b"", {"Location": "http://127.0.0.1:9/elsewhere"}),
        "huge": (200, b'"' + b"a" * 400_000 + b'"', {}),
        "gzip": (200, b"\x1f\x8b\x08", {"Content_Encoding": "gzip"}),
        "nan": (200, b'{"choices": [{"message": {"content": NaN}, "finish_reason": "stop"}]}', {}),
        "not json": (200, b"<html>a proxy's page</html>", {}),
        "no choices": (200, b'{"choices": []}', {}),
        "500": (500, b"the prompt was: canary-8842", {}),
    }
    if fault in plain:
        status, said, headers = plain[fault]
        _send(handler, status, said, **headers)
    elif fault == "hang":
        time.sleep(1.5)
        handler.close_connection = True
    elif fault == "drop":
        handler.close_connection = True
    elif fault == "drip":
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(30):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
        handler.close_connection = True
    else:
        return False
    return True


def _reply(  # noqa: PLR0911 - a refusal is a return
    handler: BaseHTTPRequestHandler, judge: JudgeServer, raw: bytes
) -> tuple[int, dict[str, Any]]:
    """Status and answer, as the real ones give them."""
    try:
        body = json.loads(raw.decode("utf-8"))
    except ValueError:
        return 400, {"error": "not JSON"}
    judge.bodies.append(body)
    if judge.key and handler.headers.get("Authorization") != f"Bearer {judge.key}":
        return 401, {"error": "no such key"}
    if body.get("model") != judge.model:
        return 404, {"error": "no such model"}
    if handler.path == "/classify" and judge.classify is not None:
        return 200, judge.classify(body["input"])
    if set(body) - KNOWN or not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
        return 400, {"error": "a field that is not known"}
    if handler.path == "/v1/completions":
        if not isinstance(body.get("prompt"), str) or isinstance(body.get("logprobs", 1), bool):
            return 400, {"error": "prompt"}
        return 200, {"choices": [_old_choice(judge, judge.rule([{"role": "user", "content": body["prompt"]}]))]}
    if handler.path != "/v1/chat/completions":
        return 404, {"error": "no such route"}
    if "top_logprobs" in body and body.get("logprobs") is not True:
        return 400, {"error": "top_logprobs needs logprobs"}
    if not _alternates(body.get("messages")):
        return 400, {"error": "Conversation roles must alternate user/assistant"}
    return 200, {"choices": [_choice(judge, judge.rule(body["messages"]))]}


def _alternates(messages: Any) -> bool:
    if not isinstance(messages, list) or not messages:
        return False
    roles = [each["role"] for each in messages if each["role"] != "system"]
    return roles == [("user", "assistant")[place % 2] for place in range(len(roles))]


def _likely(judge: JudgeServer, said: str) -> dict[str, float]:
    share = judge.unsafe_share if judge.unsafe_share is not None else 0.97 if said.startswith("unsafe") else 0.02

    return {"unsafe": math.log(share), "safe": math.log(1 - share)}


def _choice(judge: JudgeServer, said: str) -> dict[str, Any]:
    finish = "length" if judge.fault == "cut" else "stop"
    tops = [{"token": token, "logprob": value} for token, value in _likely(judge, said).items()]
    blank = {"token": "\n\n", "logprob": 0.0, "top_logprobs": []}
    content = [blank, {"token": said.split("\n", maxsplit=1)[0], "logprob": tops[0]["logprob"], "top_logprobs": tops}]
    return {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": finish,
            "logprobs": {"content": content}}  # fmt: skip


def _old_choice(judge: JudgeServer, said: str) -> dict[str, Any]:
    likely = [{"\n\n": 0.0}, _likely(judge, said)]
    finish = "length" if judge.fault == "cut" else "stop"
    return {"index": 0, "text": said, "finish_reason": finish,
            "logprobs": {"tokens": ["\n\n", said.split("\n", maxsplit=1)[0]], "top_logprobs": likely}}  # fmt: skip
