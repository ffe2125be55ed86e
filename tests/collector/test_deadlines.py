"""Deadlines with one timer: late waits end, others do not notice, and whoever else cancels is believed."""

import asyncio

import pytest

from collector.deadlines import Deadlines


async def test_what_comes_in_time_is_given_and_the_timer_rests() -> None:
    """The value passes; once nobody waits no timer is set any more, and a later wait sets it again."""
    deadlines = Deadlines(0.1)
    for _ in range(2):
        assert await deadlines.within(asyncio.sleep(0, "here")) == "here"
        assert deadlines._timer is not None
        await asyncio.sleep(0.05)
        assert (deadlines._timer, deadlines._waits) == (None, {})


async def test_late_waits_end_and_no_other() -> None:
    """Only those past their deadline raise TimeoutError, each once; a task goes on after it as if nothing was."""
    deadlines = Deadlines(0.2)

    async def late() -> str:
        with pytest.raises(TimeoutError):
            await deadlines.within(asyncio.sleep(60))
        await asyncio.sleep(0.05)
        return await deadlines.within(asyncio.sleep(0, "again"))

    first = [asyncio.create_task(late()) for _ in range(3)]
    await asyncio.sleep(0.15)
    second = asyncio.create_task(deadlines.within(asyncio.sleep(0.15, "later")))
    assert await asyncio.gather(*first, second) == ["again", "again", "again", "later"]


async def test_a_cancelled_task_is_cancelled() -> None:
    """A cancellation from outside is no TimeoutError, even in a wait that is late by then."""
    deadlines = Deadlines(0.05)
    early = asyncio.create_task(deadlines.within(asyncio.sleep(60)))
    await asyncio.sleep(0)
    early.cancel()
    with pytest.raises(asyncio.CancelledError):
        await early
    both = asyncio.create_task(deadlines.within(asyncio.sleep(60)))
    await asyncio.sleep(0)
    next(iter(deadlines._waits.values())).over = True
    both.cancel()
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both
