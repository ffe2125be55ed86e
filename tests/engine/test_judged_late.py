"""Prompts that no gate has judged and that take guards their time: judged on a thread, begun only after that."""

import asyncio
from collections.abc import AsyncGenerator
from http import HTTPStatus

import pytest

pytest.importorskip("vllm")

from vllm.exceptions import GracefulHTTPError

from collector.audit import Audit, EngineRequest
from collector.engine.online import judged_first
from collector.routes import GateConfig
from tests.collector.gating import Site

LONG = "a" * 70_000


class Engine:
    """Stands in for what the engine does with a request that was begun."""

    def __init__(self) -> None:
        self.begun = 0

    def __call__(self, audit: Audit) -> AsyncGenerator[str, None]:
        self.begun += 1
        audit.close("ok", http_status=200)
        return self._outputs()

    async def _outputs(self) -> AsyncGenerator[str, None]:
        yield "an output"


async def test_the_event_loop_goes_on_while_a_long_prompt_is_judged() -> None:
    """The engine has it when the guards are done, and not before."""
    site, engine = Site(GateConfig()), Engine()
    outputs = judged_first(site.auditor, EngineRequest("generate", f"wait {LONG}"), engine)
    step = asyncio.create_task(anext(outputs))
    await asyncio.to_thread(site.guard.waiting.acquire, True, 30)
    assert engine.begun == 0
    site.guard.go_on.set()
    assert await step == "an output"
    assert engine.begun == 1


async def test_a_long_prompt_that_is_blocked_never_reaches_the_engine() -> None:
    """403 at the first step."""
    site, engine = Site(GateConfig()), Engine()
    with pytest.raises(GracefulHTTPError) as refused:
        await anext(judged_first(site.auditor, EngineRequest("generate", f"attack {LONG}"), engine))
    assert (refused.value.http_status, engine.begun) == (HTTPStatus.FORBIDDEN, 0)


async def test_a_short_prompt_is_judged_at_once() -> None:
    """So a stream that is blocked is still answered 403, not broken off."""
    site, engine = Site(GateConfig()), Engine()
    outputs = judged_first(site.auditor, EngineRequest("generate", "hello"), engine)
    assert engine.begun == 1
    assert [output async for output in outputs] == ["an output"]
