"""The threads that prompts and answers are judged on, off the event loop, and how many may wait for one.

A request that is to be judged may be refused: where too many wait, or where it has waited too long once it is its turn.
An answer may not: there are no more of them than requests that were let in. Memory: what waits, at most `waiting_max`
requests and the answers under way.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Crowded(Exception):
    """The request can't be judged in time. The message is for the client."""

    def __init__(self) -> None:
        super().__init__("Too many requests are being judged. Try again later.")


class JudgingThreads:
    """`workers` threads; used from one event loop."""

    def __init__(
        self,
        workers: int,
        waiting_max: int,
        wait_s_max: float,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="inferwatch-judge")
        self._jobs_max, self._wait_s_max, self._monotonic_s = workers + waiting_max, wait_s_max, monotonic_s
        self.jobs = 0
        """Under way or waiting."""

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Run blocking work on one of the threads, whenever one is free."""
        self.jobs += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        finally:
            self.jobs -= 1

    async def admit(self, work: Callable[..., T], *arguments: object) -> T:
        """The same for a request that has not been let in yet. Raises Crowded."""
        if self.jobs >= self._jobs_max:
            raise Crowded
        asked_s = self._monotonic_s()

        def in_time() -> T:
            if self._monotonic_s() - asked_s > self._wait_s_max:
                raise Crowded
            return work(*arguments)

        return await self.run(in_time)

    def shutdown(self) -> None:
        """What has begun ends; what waits is cancelled."""
        self._pool.shutdown(wait=False, cancel_futures=True)
