"""The self-test: one audited request through the real engine before the gate opens.

It proves that the road is watched end to end: the wrapper began it, its event is in the journal, the engine's own count
saw it, and nothing else. The event has operation `selftest`, so that detectors take it for nobody's.
"""

import asyncio
from typing import Any, Final

import structlog
from vllm import PoolingParams, SamplingParams

from collector.auditor import Auditor
from collector.context import Exchange, exchange
from collector.engine.process import current
from collector.uuid7 import uuid7

log = structlog.get_logger(__name__)

OPERATION: Final = "selftest"
PROMPT: Final = "Hello."
_COUNT_TIMEOUT_S: Final = 10.0
_POOLING: Final = ("embed", "classify", "token_embed", "token_classify")


class SelfTestFailed(RuntimeError):
    """The engine answers and the audit does not see it, or the other way round."""


async def selftest(engine: Any, auditor: Auditor, *, timeout_s: float = 300) -> None:
    """Send the request. Raises SelfTestFailed with one sentence; the server must not open then."""
    counters, tally = auditor.publisher.counters, current.tally
    events, finished, unaudited = counters.events, tally.finished, tally.unaudited
    at_hand = Exchange("", auditor.caller(auditor.gate.tenant), route=OPERATION, operation=OPERATION)
    at_hand.started_s = auditor.clock_s()
    failure = ""
    token = exchange.set(at_hand)
    try:
        async with asyncio.timeout(timeout_s):
            async for _ in await _request(engine, f"{OPERATION}-{uuid7()}"):
                pass
    except Exception as error:  # noqa: BLE001 - what counts is whether it has its event
        failure = type(error).__name__
    finally:
        exchange.reset(token)
    if at_hand.engine_requests != 1 or counters.events != events + 1:
        raise SelfTestFailed(
            "the self-test's request through the engine made no event, so the audit is not whole: is another plugin "
            f"in the way of the engine's methods? ({failure or 'it was answered'})"
        )
    if failure:
        log.warning("the self-test was audited, and was not answered", error=failure)
        return
    end = asyncio.get_running_loop().time() + _COUNT_TIMEOUT_S
    while tally.finished == finished and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 - no event for it
        await asyncio.sleep(0.01)
    if tally.finished == finished:
        raise SelfTestFailed("the engine's own statistics did not count the self-test, so nothing can be reconciled")
    if tally.unaudited != unaudited:
        raise SelfTestFailed("the engine finished requests during the self-test that nobody audited")


async def _request(engine: Any, request_id: str) -> Any:
    tasks = await engine.get_supported_tasks()
    if "generate" in tasks:
        return engine.generate(_rendered(engine), SamplingParams(max_tokens=1), request_id)
    task = next((task for task in _POOLING if task in tasks), tasks[0])
    return engine.encode(_rendered(engine), PoolingParams(task=task), request_id)


def _rendered(engine: Any) -> dict[str, Any]:
    """The prompt as vLLM's renderers give it."""
    return {"type": "token", "prompt_token_ids": engine.get_tokenizer().encode(PROMPT), "prompt": PROMPT}
