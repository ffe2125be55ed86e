"""A server with an engine that answers at once, bare or behind the collector: what is left is what the audit costs.

    python -m tests.bench.standin_server bare|wrapped PORT

One uvicorn process, one small ASGI app in the place of vLLM's: it reads a chat, asks `AsyncLLM.generate` for the answer
and writes it as JSON or as a stream of events. `AsyncLLM.generate` itself is replaced by a generator that yields ready
outputs before the plugin wraps it, so the wrapper, the gate, the journal and the producer are the deployed ones. It
reports what it finished to the plugin's stat logger, as vLLM does. With `wrapped`, `INFERWATCH_CONFIG` names the
configuration.
"""

import gc
import itertools
import json
import sys
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import uvicorn
from vllm.v1.engine.async_llm import AsyncLLM

_LETTERS_A_TOKEN = 4


_numbers = itertools.count()
_loggers: list[Any] = []
"""The plugin's stat logger; none in the bare server."""


async def _generate(_self: AsyncLLM, _prompt: Any, params: Any, request_id: str) -> AsyncGenerator[Any, None]:
    """What the engine yields: one output for a whole answer, one for each token of a stream."""
    for logger in _loggers:
        logger.record(None, SimpleNamespace(finished_requests=[SimpleNamespace(request_id=request_id)]))
    if params.output_kind.name == "DELTA":
        for place in range(params.max_tokens):
            yield _output([0], "a", finished=place == params.max_tokens - 1)
    else:
        yield _output([0] * params.max_tokens, "a" * params.max_tokens, finished=True)


async def _tasks(_self: AsyncLLM) -> tuple[str, ...]:
    return ("generate",)


def _tokenizer(_self: AsyncLLM) -> Any:
    return SimpleNamespace(encode=lambda text: [0] * len(text), decode=lambda ids: "a" * len(ids))


def _output(token_ids: list[int], text: str, *, finished: bool) -> Any:
    reason = "length" if finished else None
    choice = SimpleNamespace(index=0, text=text, token_ids=token_ids, finish_reason=reason, logprobs=None)
    metrics = SimpleNamespace(
        num_generation_tokens=len(token_ids),
        queued_ts=1.0,
        scheduled_ts=1.001,
        first_token_ts=1.01,
        last_token_ts=1.02,
        first_token_latency=0.01,
    )
    return SimpleNamespace(outputs=[choice], finished=finished, metrics=metrics)


class App:
    """The server behind the gate: as little as can be between the socket and the engine."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.state = SimpleNamespace(engine_client=engine)
        self.routes: tuple[Any, ...] = ()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One ASGI connection."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        raw, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        if not raw:
            await _answer(send, [b"{}"], b"application/json")
            return
        body = json.loads(raw)
        text = "".join(f"<|user|>{message['content']}<|end|>" for message in body["messages"])
        kind = SimpleNamespace(name="DELTA" if body["stream"] else "FINAL_ONLY")
        params = SimpleNamespace(max_tokens=body["max_tokens"], n=1, output_kind=kind, detokenize=True)
        prompt = {"type": "token", "prompt_token_ids": [0] * (len(text) // _LETTERS_A_TOKEN), "prompt": text}
        outputs = self.state.engine_client.generate(prompt, params, f"chatcmpl-{next(_numbers)}")
        if body["stream"]:
            await send(_start(b"text/event-stream"))
            async for output in outputs:
                piece = b"data: " + json.dumps({"text": output.outputs[0].text}).encode() + b"\n\n"
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
            return
        answers = [json.dumps({"text": output.outputs[0].text}).encode() async for output in outputs]
        await _answer(send, answers, b"application/json")


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
        gc.collect()
        gc.freeze()  # as vLLM does at this point: its large heap is not looked through again


def _start(content_type: bytes) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]}


async def _answer(send: Any, pieces: list[bytes], content_type: bytes) -> None:
    await send(_start(content_type))
    await send({"type": "http.response.body", "body": b"".join(pieces)})


def main() -> None:
    """Serve until SIGTERM."""
    kind, port = sys.argv[1], int(sys.argv[2])
    for name, stand_in in {"generate": _generate, "get_supported_tasks": _tasks, "get_tokenizer": _tokenizer}.items():
        setattr(AsyncLLM, name, stand_in)
    engine = object.__new__(AsyncLLM)
    engine.model_config = SimpleNamespace(  # type: ignore[assignment]  # what `identify` reads of it
        served_model_name="stand-in", model="stand-in", revision=None, tokenizer="stand-in"
    )
    app: Any = App(engine)
    outer = app
    if kind == "wrapped":
        from collector.engine.counting import EngineCount
        from inferwatch.vllm import Gate, register

        register()
        _loggers.append(EngineCount(None))
        engine.logger_manager = SimpleNamespace(  # type: ignore[assignment]  # where the plugin looks for its logger
            stat_loggers=[SimpleNamespace(per_engine_stat_loggers=_loggers)]
        )
        outer = Gate(app)

    async def served(scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = app
        await outer(scope, receive, send)

    uvicorn.run(served, host="127.0.0.1", port=port, log_level="warning", access_log=False, lifespan="on")


if __name__ == "__main__":
    main()
