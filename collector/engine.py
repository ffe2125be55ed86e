"""The vLLM plugin: every engine request is begun in the journal before the engine sees it and has its event after.

The only file that imports vllm. `install` wraps `AsyncLLM.generate` and `encode`, the one road that all HTTP routes of
the server take, and passes their arguments through as they come: the first three of `generate` were the same in all
versions from 0.10.2 to 0.33.0. vLLM runs plugins in each of its processes; only the one that answers HTTP ever calls
these methods, so only there an auditor is opened.

Both wrappers are plain functions: a blocked request raises before the HTTP answer has begun, for streams too. Whatever
fails in here fails the request: there is no answer without its event.
"""

import asyncio
import atexit
import contextlib
import functools
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple, cast

import structlog
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.v1.engine.async_llm import AsyncLLM

from collector.answers import Answer, Kind
from collector.audit import Audit, Auditor, Blocked, EngineRequest, Timing, Unaudited
from collector.event import Adapter, Status
from collector.weights import Model, identify

log = structlog.get_logger(__name__)

_MARK: Final = "__inferwatch__"
Opener = Callable[[Model], Auditor]
"""Opens this process's auditor: its publisher is started, its guards are up. Blocking; raises with one sentence."""


class _Process:
    """What one process holds: at most one auditor, opened on first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.opener: Opener | None = None
        self.auditor: Auditor | None = None
        self.closed = False


_process = _Process()


def install(opener: Opener) -> None:
    """Wrap the engine's methods; called again, nothing is wrapped twice."""
    _process.opener = opener
    for name, wrap in (("generate", _wrap_generate), ("encode", _wrap_encode)):
        method = getattr(AsyncLLM, name)
        if not hasattr(method, _MARK):
            wrapped = wrap(method)
            setattr(wrapped, _MARK, True)
            setattr(AsyncLLM, name, wrapped)


def active(engine: object) -> bool:
    """Whether all roads into this engine are wrapped."""
    roads = ("generate", "encode")
    return isinstance(engine, AsyncLLM) and all(hasattr(getattr(engine, road), _MARK) for road in roads)


def auditor_for(engine: object) -> Auditor:
    """This process's auditor, opened on the first call: blocking, some seconds.

    Raises RuntimeError where the plugin is not active, and what the opener raises.
    """
    if not active(engine):
        raise RuntimeError(
            "inferwatch's plugin is not active in this vLLM: set INFERWATCH_CONFIG, and let VLLM_PLUGINS, "
            "where it is set, name inferwatch; the server does not start without it"
        )
    with _process.lock:
        if _process.closed or _process.opener is None:
            raise Unaudited
        if _process.auditor is None:
            _process.auditor = _process.opener(identify(cast(Any, engine).model_config))
            atexit.register(close)
        return _process.auditor


def close() -> None:
    """Stop this process's publisher with its goodbyes. Once; engine requests after it are refused."""
    with _process.lock:
        _process.closed = True
        auditor, _process.auditor = _process.auditor, None
    if auditor is not None:
        auditor.stop()


class _Call(NamedTuple):
    """What the wrappers need of the arguments."""

    prompt: object
    params: Any
    lora_request: Any

    @classmethod
    def of(cls, params_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "_Call":
        return cls(
            args[0] if args else kwargs.get("prompt"),
            args[1] if len(args) > 1 else kwargs.get(params_name),
            args[3] if len(args) > 3 else kwargs.get("lora_request"),
        )


def _wrap_generate(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    @functools.wraps(original)
    def generate(self: AsyncLLM, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        inner = original(self, *args, **kwargs)
        with _refusing:
            auditor = _process.auditor or auditor_for(self)
            call = _Call.of("sampling_params", args, kwargs)
            kind = _KINDS.get(call.params.output_kind.name, "cumulative")
            judged = "output" in auditor.stages
            decode = None if call.params.detokenize else functools.partial(_decode, self)
            answer = Answer(kind, keep_text=judged, decode=decode)
            audit = auditor.open(_engine_request(self, "generate", call))
        return _Audited(_answered(inner, audit, answer, auditor), audit)

    return generate


_KINDS: Final[Mapping[str, Kind]] = {"DELTA": "delta", "FINAL_ONLY": "final"}


def _wrap_encode(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    @functools.wraps(original)
    def encode(self: AsyncLLM, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        inner = original(self, *args, **kwargs)
        with _refusing:
            auditor = _process.auditor or auditor_for(self)
            audit = auditor.open(_engine_request(self, "encode", _Call.of("pooling_params", args, kwargs)))
        return _Audited(_pooled(inner, audit), audit)

    return encode


class _Refusing:
    """Turns whatever fails while a request is begun into the HTTP error that the client gets: 403 or 503."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Blocked):
            raise GracefulHTTPError("This request was blocked by policy.", HTTPStatus.FORBIDDEN) from None
        if isinstance(error, Exception):
            if not isinstance(error, Unaudited):
                # By its class alone: message and trace may quote the prompt.
                log.error("the engine plugin failed and the request is refused", error=type(error).__name__)
            raise GracefulHTTPError(str(Unaudited()), HTTPStatus.SERVICE_UNAVAILABLE) from None


_refusing = _Refusing()


def _engine_request(engine: AsyncLLM, operation: str, call: _Call) -> EngineRequest:
    prompt = call.prompt.get("decoder_prompt", call.prompt) if isinstance(call.prompt, dict) else call.prompt
    token_ids: Sequence[int] = ()
    text: str | None = None
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, dict):
        token_ids, text = prompt.get("prompt_token_ids") or (), prompt.get("prompt")
        if "prompt_embeds" in prompt:
            text = None  # vectors say more than the tokens beside them
        elif text is None and token_ids:
            text = _decode(engine, token_ids)
    elif isinstance(prompt, list | tuple) and all(isinstance(token, int) for token in prompt):
        token_ids, text = prompt, _decode(engine, prompt)
    elif hasattr(prompt, "prompt_token_ids"):
        token_ids = prompt.prompt_token_ids or ()
        text = _decode(engine, token_ids) if token_ids else None
    output_kind = getattr(call.params, "output_kind", None)
    return EngineRequest(
        operation,
        text,
        prompt_tokens=len(token_ids),
        max_tokens=getattr(call.params, "max_tokens", None) or 0,
        n=getattr(call.params, "n", None) or 1,
        stream=output_kind is not None and output_kind.name == "DELTA",
        adapter=None if call.lora_request is None else Adapter(name=str(call.lora_request.lora_name)[:256]),
    )


def _decode(engine: AsyncLLM, token_ids: Sequence[int]) -> str:
    return str(engine.get_tokenizer().decode(list(token_ids)))


class _Audited(AsyncGenerator[Any, None]):
    """The generator that the server gets. Dropped before its first step, it closes the audit as aborted."""

    __slots__ = ("_audit", "_inner", "_started")

    def __init__(self, inner: AsyncGenerator[Any, None], audit: Audit) -> None:
        self._inner, self._audit, self._started = inner, audit, False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    def __anext__(self) -> Any:
        self._started = True
        return self._inner.__anext__()

    def asend(self, value: None) -> Any:
        self._started = True
        return self._inner.asend(value)

    def athrow(self, *error: Any) -> Any:
        self._drop()
        return self._inner.athrow(*error)

    def aclose(self) -> Any:
        self._drop()
        return self._inner.aclose()

    def __del__(self) -> None:
        self._drop()

    def _drop(self) -> None:
        """An async generator that never ran runs nothing when it is closed: its event is written here."""
        if not self._started:
            self._started = True
            _close(self._audit, "aborted", reason="never started")


async def _answered(
    inner: AsyncGenerator[Any, None], audit: Audit, answer: Answer, auditor: Auditor
) -> AsyncGenerator[Any, None]:
    """The engine's outputs as the client may have them; the event is written before the last of them goes out."""
    judged = "output" in auditor.stages
    try:
        async for output in inner:
            answer.see(output)
            if answer.kind != "final":
                audit.saw_tokens()
            if not output.finished:
                if judged and auditor.gate.hold_streams:
                    answer.held.append(output)
                else:
                    yield output
                continue
            verdicts, blocked = await auditor.in_thread(audit.judge, answer.texts()) if judged else ([], False)
            last = answer.withhold(output, auditor.gate.blocked_text) if blocked else output
            status, code = ("blocked_output", 200) if blocked else _ENDS.get(answer.finish_reason, ("ok", 200))
            timing = _timing(output.metrics)
            audit.close(cast(Any, status), answer=answer, verdicts=verdicts, timing=timing, http_status=code)
            for earlier in answer.held:
                yield earlier
            yield last
    except BaseException as error:  # noqa: BLE001 - cancellation and closing have their events too
        raise _failed(audit, error, answer) from None
    finally:
        await inner.aclose()


_ENDS: Final[Mapping[str, tuple[Status, int]]] = {"abort": ("aborted", 0), "error": ("error", 500)}
"""Of the engine's finish reasons those that are no answer."""


async def _pooled(inner: AsyncGenerator[Any, None], audit: Audit) -> AsyncGenerator[Any, None]:
    try:
        async for output in inner:
            if output.finished:
                audit.close("ok", http_status=200)
            yield output
    except BaseException as error:  # noqa: BLE001 - as above
        raise _failed(audit, error, None) from None
    finally:
        await inner.aclose()


def _failed(audit: Audit, error: BaseException, answer: Answer | None) -> BaseException:
    """Write the event of a request that ended otherwise than by its answer; returns what the server is to see."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        _close(audit, "aborted", answer=answer, reason="client gone")
    elif isinstance(error, Unaudited):
        refusal: BaseException = GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE)
        return refusal
    else:
        code = 400 if isinstance(error, VLLMClientError) else 500
        code = int(error.http_status) if isinstance(error, GracefulHTTPError) else code
        _close(audit, "error", answer=answer, reason=type(error).__name__[:64], http_status=code)
    return error


def _close(audit: Audit, status: Status, **fields: Any) -> None:
    """Close where no answer is at stake any more: a failure has been logged, and the begin in the journal stays."""
    with contextlib.suppress(Unaudited):
        audit.close(status, **fields)


def _timing(metrics: Any) -> Timing:
    """The engine's own measurements; with n > 1 they are of one of the choices."""
    if metrics is None:
        return Timing()
    tokens = metrics.num_generation_tokens
    span_s = metrics.last_token_ts - metrics.first_token_ts
    return Timing(
        ttft_ms=metrics.first_token_latency * 1000 or None,
        queue_ms=(metrics.scheduled_ts - metrics.queued_ts) * 1000,
        ms_per_output_token=span_s * 1000 / (tokens - 1) if tokens > 1 else None,
    )


def run_command_line() -> None:
    """vLLM's own command line, as `sys.argv` has it; returns when the server has ended."""
    from vllm.entrypoints.cli.main import main  # noqa: PLC0415 - it loads the whole server

    main()
