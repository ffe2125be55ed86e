"""A stand-in for Ollama: its documented API as a real HTTP server, refusing what the real one refuses.

Follows docs.ollama.com/api and the server's own handling: Go's JSON decoder (keys in any case, the last one wins),
streams unless told otherwise, NDJSON, counts in the last line, load and unload by an empty prompt, 404 for models it
does not have. It answers with the prompt's words, so that tests see what it has read.
"""

import asyncio
import json
from typing import Any

MODELS = {"tiny:latest": "a" * 64, "small:1b": "b" * 64}
REMOTE = "huge:cloud-ish"
MOMENT = "2026-11-20T12:00:00.000000Z"


class Ollama:
    """The ASGI app. `bodies`: what arrived, as `METHOD /path` and the decoded body; `gone`: clients that left."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.models = dict(MODELS)
        self.pause_s = 0.0
        self.words = 0
        self.gone = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        raw = b""
        while scope["method"] in ("POST", "DELETE"):
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        row = f"{scope['method']} {scope['path']}"
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        body = _go(raw)
        if body is None and raw:
            await _json(send, 400, {"error": "invalid character in the body"})
            return
        self.bodies.append((row, body or {}))
        answer = asyncio.ensure_future(self._answer(row, body or {}, send))
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            self.gone += 1
            answer.cancel()
        leaving.cancel()
        await asyncio.gather(answer, leaving, return_exceptions=True)

    async def _answer(self, row: str, body: dict[str, Any], send: Any) -> None:
        if row == "GET /api/tags":
            entries = [{"name": name, "model": name, "digest": digest} for name, digest in self.models.items()]
            remote = {"name": REMOTE, "model": REMOTE, "digest": "c" * 64, "remote_host": "https://ollama.com:443"}
            await _json(send, 200, {"models": [*entries, remote]})
        elif row == "GET /api/version":
            await _json(send, 200, {"version": "0.12.6"})
        elif row in ("GET /api/ps", "GET /v1/models"):
            await _json(send, 200, {"models": [], "data": []})
        elif row == "POST /api/show":
            await _json(send, 200, {"modelfile": "FROM tiny", "system": "a secret of the operator"})
        elif row == "POST /api/pull":
            await self._lines(send, [{"status": "pulling manifest"}, {"status": "success"}])
        elif body.get("model", "").partition(":")[0] not in {name.partition(":")[0] for name in self.models}:
            await _json(send, 404, {"error": f"model '{body.get('model')}' not found"})
        elif row in ("POST /api/embed", "POST /api/embeddings"):
            inputs = body.get("input", body.get("prompt"))
            count = len(inputs) if isinstance(inputs, list) else 1
            one = {"embedding": [0.5]} if row.endswith("embeddings") else {"embeddings": [[0.5]] * count}
            await _json(send, 200, {"model": body["model"], **one, "prompt_eval_count": 3 * count})
        elif row in ("POST /api/generate", "POST /api/chat"):
            await self._generate(row, body, send)
        else:
            await _json(send, 404, {"error": "404 page not found"})

    async def _generate(self, row: str, body: dict[str, Any], send: Any) -> None:
        messages = body.get("messages") or []
        prompt = str(messages[-1].get("content", "")) if messages else str(body.get("prompt", ""))
        said = [f"{word} " for word in prompt.split()] + ["word "] * self.words

        def chunk(text: str, **more: Any) -> dict[str, Any]:
            part = {"message": {"role": "assistant", "content": text}} if row.endswith("chat") else {"response": text}
            return {"model": body["model"], "created_at": MOMENT, **part, "done": False, **more}

        counts = {"total_duration": 5, "prompt_eval_count": len(prompt.split()) + 4, "eval_count": len(said)}
        if not said:
            await _json(send, 200, chunk("", done=True, done_reason="load"))
        elif body.get("stream", True) is False:
            await _json(send, 200, chunk("".join(said), done=True, done_reason="stop", **counts))
        else:
            last = chunk("", done=True, done_reason="stop", **counts)
            await self._lines(send, [*map(chunk, said), last])

    async def _lines(self, send: Any, lines: list[dict[str, Any]]) -> None:
        headers = [(b"content-type", b"application/x-ndjson"), (b"server", b"ollama/0.12.6")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for line in lines:
            await send({"type": "http.response.body", "body": json.dumps(line).encode() + b"\n", "more_body": True})
            await asyncio.sleep(self.pause_s)
        await send({"type": "http.response.body", "body": b""})


def _go(raw: bytes) -> dict[str, Any] | None:
    """As Go's encoding/json fills a struct: keys in any case, of several the last."""
    try:
        pairs = json.loads(raw or b"null", object_pairs_hook=list)
    except ValueError:
        return None
    return _folded(pairs) if isinstance(pairs, list) else None


def _folded(value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(entry, tuple) for entry in value):
        return {key.casefold(): _folded(entry) for key, entry in value}
    return [_folded(entry) for entry in value] if isinstance(value, list) else value


async def _json(send: Any, status: int, body: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json; charset=utf-8"), (b"server", b"ollama/0.12.6")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
