"""The offline road: `LLMEngine.add_request` begins, `step` ends, `abort_request` ends early. For `LLM` and its methods.

There is no gate here: prompts are judged as rendered, under the gate's tenant and nobody's name. A blocked request
raises `Blocked` from `LLM.generate` and its like, and vLLM aborts what it had added of the same call.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

from collector.answers import Answer
from collector.audit import Audit
from collector.auditor import Auditor
from collector.engine.calls import Call, engine_request
from collector.engine.counting import aborted_tokens
from collector.engine.online import ENDS, answer_for, close_quietly, timing_of
from collector.engine.process import current
from collector.engine.steps import part_of
from collector.event import Status


class _Running(NamedTuple):
    audit: Audit
    answer: Answer | None
    """None for pooling."""


_running: dict[tuple[int, str], _Running] = {}
"""By engine and the caller's request id."""


def wrap_add_request(original: Callable[..., str]) -> Callable[..., str]:
    """`LLMEngine.add_request`. Raises Blocked, Unaudited."""

    @functools.wraps(original)
    def add_request(self: Any, request_id: str, prompt: Any, params: Any, *rest: Any, **more: Any) -> str:
        if part_of.get() is not None:
            return original(self, request_id, prompt, params, *rest, **more)
        auditor = current.auditor or current.open(self)
        pooling = not hasattr(params, "max_tokens")
        lora_request = rest[1] if len(rest) > 1 else more.get("lora_request")
        request = engine_request(
            self, "encode" if pooling else "generate", Call(prompt, params, request_id, lora_request)
        )
        audit = auditor.open(request)
        _running[id(self), request_id] = _Running(audit, None if pooling else answer_for(self, params, auditor))
        try:
            return original(self, request_id, prompt, params, *rest, **more)
        except BaseException as error:
            del _running[id(self), request_id]
            close_quietly(audit, "error", reason=type(error).__name__[:64])
            raise

    return add_request


def wrap_step(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """`LLMEngine.step`: outputs that finish a request leave once its event is written."""

    @functools.wraps(original)
    def step(self: Any) -> list[Any]:
        try:
            outputs = original(self)
        except BaseException as error:
            _end_all(self, "error", type(error).__name__[:64])
            raise
        if part_of.get() is not None:
            return outputs
        return [passed for output in outputs for passed in _passed(self, output)]

    return step


def _passed(engine: Any, output: Any) -> Iterable[Any]:
    running = _running.get((id(engine), output.request_id))
    if running is None or current.auditor is None:
        return [output]
    auditor, answer = current.auditor, running.answer
    if answer is None:
        if output.finished:
            del _running[id(engine), output.request_id]
            running.audit.close("ok", http_status=200)
        return [output]
    answer.see(output)
    if not output.finished:
        if "output" in auditor.stages and auditor.gate.hold_streams:
            answer.held.append(output)
            return []
        return [output]
    del _running[id(engine), output.request_id]
    return [*_finish(auditor, running.audit, answer, output)]


def _finish(auditor: Auditor, audit: Audit, answer: Answer, output: Any) -> list[Any]:
    verdicts, blocked = audit.judge(answer.texts()) if "output" in auditor.stages else ([], False)
    last = answer.withhold(output, auditor.gate.blocked_text) if blocked else output
    status, code = ("blocked_output", 200) if blocked else ENDS.get(answer.finish_reason, ("ok", 200))
    timing = timing_of(output.metrics)
    audit.close(cast(Any, status), answer=answer, verdicts=verdicts, timing=timing, http_status=code)
    return [*answer.held, last]


def wrap_abort_request(original: Callable[..., None]) -> Callable[..., None]:
    """`LLMEngine.abort_request`: the ids may be the caller's or the engine's own."""

    @functools.wraps(original)
    def abort_request(self: Any, request_ids: list[str], internal: bool = False) -> None:
        original(self, request_ids, internal)
        for owner, request_id in list(_running):
            if owner == id(self) and (generated := aborted_tokens(request_id)) is not None:
                running = _running.pop((owner, request_id))
                close_quietly(running.audit, "aborted", answer=running.answer, generated=generated, reason="aborted")

    return abort_request


def _end_all(engine: Any, status: Status, reason: str) -> None:
    """The engine has died: every request that it worked on has its event."""
    for owner, request_id in list(_running):
        if owner == id(engine):
            running = _running.pop((owner, request_id))
            close_quietly(running.audit, status, answer=running.answer, reason=reason)
