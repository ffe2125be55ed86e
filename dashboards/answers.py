"""Asks the store on behalf of the pages: in threads, with a time limit, each question once however many pages ask it.

A question that fails says so in one sentence and harms no other. Bounds: `queries_parallel` threads, `query_timeout_s`
a question, ANSWERS_MAX answers remembered for up to `FRESH_S`. The store has a limit of its own for a query that runs
on after we stopped waiting; until then its thread is busy, and what can't start in time is told as `busy`.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog

from dashboards.config import DashboardsConfig
from dashboards.panel import Row

log = structlog.get_logger(__name__)

Query = Callable[[str, Mapping[str, object]], list[dict[str, object]]]
"""ClickHouse SQL with `{name:Type}` parameters → rows. Blocks; is called in threads; raises anything."""

FRESH_S: Final = 2.0
ANSWERS_MAX: Final = 256
_Key = tuple[str, str]


class Trouble(Exception):
    """A question without an answer; the message is a sentence for the page, free of SQL and data."""


class Answers:
    """One for each application. Use inside one event loop; `close` when it ends."""

    def __init__(
        self, query: Query, config: DashboardsConfig, *, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        self._query = query
        self._timeout_s = config.query_timeout_s
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(config.queries_parallel, thread_name_prefix="dashboard-query")
        self._asked: OrderedDict[_Key, tuple[float, asyncio.Task[list[Row]]]] = OrderedDict()

    async def rows(self, sql: str, parameters: Mapping[str, object]) -> list[Row]:
        """The rows of one SELECT. Raises `Trouble`."""
        key = (sql, repr(sorted(parameters.items())))
        now_s = self._seconds()
        at_s, task = self._asked.get(key, (-FRESH_S, None))
        if task is None or now_s - at_s >= FRESH_S or (task.done() and (task.cancelled() or task.exception())):
            task = asyncio.create_task(self._ask(sql, parameters))
            # The exception is read here once, so that a page closed meanwhile leaves no "never retrieved" behind.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._asked[key] = (now_s, task)
            self._asked.move_to_end(key)
            while len(self._asked) > ANSWERS_MAX:
                self._asked.popitem(last=False)
        return await asyncio.shield(task)

    async def _ask(self, sql: str, parameters: Mapping[str, object]) -> list[Row]:
        loop = asyncio.get_running_loop()
        started: list[bool] = []

        def run() -> list[dict[str, object]]:
            started.append(True)
            return self._query(sql, parameters)

        try:
            async with asyncio.timeout(self._timeout_s):
                return list(await loop.run_in_executor(self._threads, run))
        except TimeoutError:
            if started:
                raise Trouble(f"The store took longer than {self._timeout_s:g} s; try a shorter time range.") from None
            raise Trouble("The store is busy with earlier questions; this panel tries again by itself.") from None
        except Exception as error:  # noqa: BLE001  # whatever the store raises, the page says so and lives on
            log.warning("panel not answered", error=type(error).__name__, missing_table="UNKNOWN_TABLE" in str(error))
            raise Trouble(_sentence(error, self._timeout_s)) from None

    def close(self) -> None:
        """Lets the threads end; does not wait for a query that hangs."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _sentence(error: Exception, timeout_s: float) -> str:
    """What went wrong, as far as it helps a reader; never the message itself, which quotes SQL."""
    text = str(error)
    if "TIMEOUT_EXCEEDED" in text or "max_execution_time" in text:
        return f"The store stopped this query after its time limit (asked for at most {timeout_s:g} s)."
    if "UNKNOWN_TABLE" in text:
        return "The store has no such table yet: is it older than this inferwatch?"
    if "MEMORY_LIMIT_EXCEEDED" in text:
        return "This query needs more memory than the store may take; try a shorter time range."
    return f"The store could not answer ({type(error).__name__}); this panel tries again by itself."
