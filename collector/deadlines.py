"""Deadlines that are hardly ever met: one timer for all that wait, where `asyncio.timeout` sets one for each.

All of them have the same length, so they end in the order in which they began. A timer looks every so often which are
past and cancels their tasks; it rests while nobody waits. For one event loop.
"""

import asyncio
from collections.abc import Awaitable
from typing import Final, TypeVar

T = TypeVar("T")
LATE_SHARE: Final = 0.1
"""A deadline is kept at most so much of its length too late."""


class _Wait:
    __slots__ = ("cancelling", "end_s", "over", "task")

    def __init__(self, task: "asyncio.Task[object]", end_s: float) -> None:
        self.task, self.end_s, self.over = task, end_s, False
        self.cancelling = task.cancelling()
        """How often others had asked it to end when the wait began."""


class Deadlines:
    """Deadlines of one length."""

    def __init__(self, length_s: float) -> None:
        self.length_s = length_s
        self._waits: dict[int, _Wait] = {}
        """By a running number: in order of their ends."""
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    async def within(self, work: Awaitable[T]) -> T:
        """What `work` gives. Raises TimeoutError where it is not there in time."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None  # noqa: S101 - a coroutine of an event loop runs in a task
        self._count = number = self._count + 1
        wait = self._waits[number] = _Wait(task, loop.time() + self.length_s)
        if self._timer is None:
            self._timer = loop.call_later(self.length_s * LATE_SHARE, self._look, loop)
        try:
            return await work
        except asyncio.CancelledError:
            if wait.over and task.uncancel() <= wait.cancelling:
                raise TimeoutError from None
            raise
        finally:
            del self._waits[number]

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        for wait in self._waits.values():
            if wait.end_s > now_s:
                break
            if not wait.over:
                wait.over = True
                wait.task.cancel()
        self._timer = loop.call_later(self.length_s * LATE_SHARE, self._look, loop) if self._waits else None
