"""The server's road: `AsyncLLM.generate` and `encode`, one event for each call, and adapters that are loaded."""

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, cast

from vllm.exceptions import GracefulHTTPError, VLLMClientError

from collector.answers import Answer, Kind
from collector.audit import Audit, EngineRequest, Timing, Unaudited
from collector.auditor import Auditor
from collector.context import Claim
from collector.engine.calls import Call, decode, engine_request, refusing
from collector.engine.counting import aborted_tokens
from collector.engine.process import current
from collector.engine.steps import part_of
from collector.event import GuardResult, Status
from collector.watch import Watch

Generator = AsyncGenerator[Any, None]
KINDS: Final[Mapping[str, Kind]] = {"DELTA": "delta", "FINAL_ONLY": "final"}
ENDS: Final[Mapping[str, tuple[Status, int]]] = {"abort": ("aborted", 0), "error": ("error", 500)}
"""Of the engine's finish reasons those that are no answer."""
UNDECODED_CHARS_MAX: Final = 16
"""Token ids and probabilities can be this far ahead of the text beside them: bytes that are no whole character yet. And
by as much as a stop string is long, whose beginning vLLM keeps until it knows."""


def wrap_generate(original: Callable[..., Generator]) -> Callable[..., Generator]:
    """`AsyncLLM.generate`: judged, begun, answered, its event written before the last output goes on."""

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Generator:
        inner = original(self, *args, **kwargs)
        with refusing:
            call = Call.of("sampling_params", args, kwargs)
            if (search := part_of.get()) is not None:
                return search.step(inner, call.request_id)
            auditor = current.auditor or current.open(self)
            answer = answer_for(self, call.params, auditor)

            def begun(audit: Audit) -> Generator:
                audit.begin_in_engine(current.tally, call.request_id)
                return answered(inner, audit, answer, auditor)

            return judged_first(auditor, engine_request(self, "generate", call), begun)

    return generate


def judged_first(auditor: Auditor, request: EngineRequest, begun: Callable[[Audit], Generator]) -> Generator:
    """What `begun` gives, once the request is judged and begun: at once, or, where guards take their time for a prompt
    that the gate has not judged, at the first step, on a thread. Raises `Blocked`, `Unaudited`, now or then.
    """
    claim = auditor.claim(request.text)
    if auditor.at_once(request.text, claim):
        audit = auditor.open(request, auditor.judged(request.text, claim))
        return Audited(begun(audit), audit)
    return _judged_late(auditor, request, claim, begun)


async def _judged_late(
    auditor: Auditor, request: EngineRequest, claim: Claim, begun: Callable[[Audit], Generator]
) -> Generator:
    """Dropped before its first step, it leaves nothing: neither journal nor engine have heard of it."""
    in_context = contextvars.copy_context().run
    with refusing:
        judged = await auditor.threads.run(in_context, auditor.judged, request.text, claim)
        audit = auditor.open(request, judged)
    async with contextlib.aclosing(begun(audit)) as outputs:
        async for output in outputs:
            yield output


def answer_for(engine: Any, params: Any, auditor: Auditor) -> Answer:
    """Keeps what the output guards need."""
    text = None if params.detokenize else functools.partial(decode, engine)
    kind, stop = KINDS.get(params.output_kind.name, "cumulative"), getattr(params, "stop", None) or ()
    slack = UNDECODED_CHARS_MAX + max(map(len, [stop] if isinstance(stop, str) else stop), default=0)
    return Answer(kind, keep_text="output" in auditor.stages, decode=text, slack=slack)


def wrap_encode(original: Callable[..., Generator]) -> Callable[..., Generator]:
    """`AsyncLLM.encode`: embeddings, pooling, scores and classes."""

    @functools.wraps(original)
    def encode(self: Any, *args: Any, **kwargs: Any) -> Generator:
        inner = original(self, *args, **kwargs)
        with refusing:
            auditor = current.auditor or current.open(self)
            call = Call.of("pooling_params", args, kwargs)

            def begun(audit: Audit) -> Generator:
                audit.begin_in_engine(current.tally, call.request_id)
                return _pooled(inner, audit)

            return judged_first(auditor, engine_request(self, "encode", call), begun)

    return encode


def wrap_add_lora(original: Callable[..., Awaitable[bool]]) -> Callable[..., Awaitable[bool]]:
    """`AsyncLLM.add_lora`: raises AdapterRefused for one that the server was not started with."""

    @functools.wraps(original)
    async def add_lora(self: Any, lora_request: Any) -> bool:
        await asyncio.to_thread(current.adapters.admit, str(lora_request.lora_path))
        return await original(self, lora_request)

    return add_lora


class Audited(AsyncGenerator[Any, None]):
    """The generator that the server gets. Dropped before its first step, it closes the audit as aborted."""

    __slots__ = ("_audit", "_inner", "_started")

    def __init__(self, inner: Generator, audit: Audit) -> None:
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
            close_quietly(self._audit, "aborted", reason="never started")


def answered(inner: Generator, audit: Audit, answer: Answer, auditor: Auditor) -> Generator:
    """The engine's outputs as the client may have them; the event is written before the last of them goes out."""
    judged = "output" in auditor.stages
    return _judged(inner, audit, answer, auditor) if judged else _passed(inner, audit, answer)


async def _judged(inner: Generator, audit: Audit, answer: Answer, auditor: Auditor) -> Generator:
    watch: Watch[Any] = Watch(
        auditor,
        audit,
        cumulative=answer.kind != "delta",
        windows=answer.in_pieces,
        slack=answer.slack,
    )
    try:
        async for output in inner:
            answer.see(output)
            if answer.kind != "final":
                audit.saw_tokens()
            if not output.finished:
                watch.put(output, answer.pieces(output), ended=answer.ended(output))
                for earlier in await watch.ready():
                    yield earlier
                if not watch.blocked:
                    continue
                await inner.aclose()  # the engine need not go on
                audit.generated = aborted_tokens(audit.request_id)
            late = watch.blocked
            verdicts, blocked = await watch.judge(answer.texts())
            last = answer.withhold(output, auditor.gate.blocked_text, watch.held) if blocked else output
            status, code = ("blocked_output", 200) if blocked else ENDS.get(answer.finish_reason, ("ok", 200))
            timing, told = timing_of(output.metrics), watch.told
            audit.close(cast(Any, status), answer=answer, verdicts=verdicts, timing=timing, http_status=code, told=told)
            for earlier in [] if blocked else watch.held:
                yield earlier
            yield last
            if late:
                break
    except BaseException as error:  # noqa: BLE001 - cancellation and closing have their events too
        with contextlib.suppress(BaseException):
            await inner.aclose()  # the engine says only now how many tokens it had generated
        raise failed(audit, error, answer, watch.verdicts) from None
    finally:
        await inner.aclose()


async def _passed(inner: Generator, audit: Audit, answer: Answer) -> Generator:
    try:
        async for output in inner:
            answer.see(output)
            if answer.kind != "final":
                audit.saw_tokens()
            if output.finished:
                status, code = ENDS.get(answer.finish_reason, ("ok", 200))
                audit.close(status, answer=answer, timing=timing_of(output.metrics), http_status=code)
            yield output
    except BaseException as error:  # noqa: BLE001 - as above
        with contextlib.suppress(BaseException):
            await inner.aclose()
        raise failed(audit, error, answer) from None
    finally:
        await inner.aclose()


async def _pooled(inner: Generator, audit: Audit) -> Generator:
    try:
        async for output in inner:
            if output.finished:
                audit.close("ok", http_status=200)
            yield output
    except BaseException as error:  # noqa: BLE001 - as above
        raise failed(audit, error, None) from None
    finally:
        await inner.aclose()


def failed(
    audit: Audit, error: BaseException, answer: Answer | None, verdicts: Sequence[GuardResult] = ()
) -> BaseException:
    """Write the event of a request that ended otherwise than by its answer; returns what the server is to see.

    `verdicts`: on what had been judged of the answer.
    """
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        generated = aborted_tokens(audit.request_id)
        told = {"answer": answer, "verdicts": verdicts, "generated": generated}
        close_quietly(audit, "aborted", reason="client gone", **told)
    elif isinstance(error, Unaudited):
        refusal: BaseException = GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE)
        return refusal
    else:
        code = 400 if isinstance(error, VLLMClientError) else 500
        code = int(error.http_status) if isinstance(error, GracefulHTTPError) else code
        close_quietly(audit, "error", answer=answer, reason=type(error).__name__[:64], http_status=code)
    return error


def close_quietly(audit: Audit, status: Status, **fields: Any) -> None:
    """Close where no answer is at stake any more: a failure has been logged, and the begin in the journal stays."""
    with contextlib.suppress(Unaudited):
        audit.close(status, **fields)


def timing_of(metrics: Any) -> Timing:
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
