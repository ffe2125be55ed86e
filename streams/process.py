"""The life of a stream process: one event loop, a clean stop on SIGTERM, and quiet libraries."""

import asyncio
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

log = structlog.get_logger(__name__)

CHARACTERS_MAX: Final = 300
REPEAT_S: Final = 10.0
REMEMBERED_MAX: Final = 256
STOP_LIMIT_S: Final = 9.0
NOISY: Final = ("faust", "mode", "aiokafka")


class OneLine(logging.Handler):
    """A library's warning as one structlog line without its traceback; the same one again only after a while.

    A client repeats itself twenty times a second while its broker is away.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock_s = clock_s
        self._said: dict[tuple[str, str], tuple[float, int]] = {}
        """(library, message before its arguments) → (when it was told, how often since)."""

    def emit(self, record: logging.LogRecord) -> None:
        """Tells it, or counts it."""
        key, now_s = (record.name, str(record.msg)), self._clock_s()
        told_s, repeats = self._said.get(key, (now_s - REPEAT_S, 0))
        if now_s - told_s < REPEAT_S:
            self._said[key] = (told_s, repeats + 1)
            return
        if len(self._said) >= REMEMBERED_MAX:
            self._said.clear()
        self._said[key] = (now_s, 0)
        said = " ".join(record.getMessage().split())[:CHARACTERS_MAX]
        log.log(record.levelno, "library says", library=record.name, said=said, repeats=repeats)


def quiet_libraries(level: int = logging.WARNING) -> None:
    """From now on Faust, mode and aiokafka speak through structlog, one line each, from `level` on."""
    handler = OneLine()
    for name in NOISY:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def run_until_stopped(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Runs `main(stop)`; SIGTERM and SIGINT set `stop`. What `main` raises is raised here.

    A library that hangs at the end, as clients of an absent broker may, is left behind after `STOP_LIMIT_S`: the
    process then ends at once. Every role of ours survives SIGKILL, so nothing is lost by that.
    """

    async def running() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def stopping() -> None:
            stop.set()
            _leave_in_time(leaving, 0, "told to stop")

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping)
        try:
            await main(stop)
        except Exception as error:
            _leave_in_time(leaving, 1, str(error) or type(error).__name__)
            raise

    quiet_libraries()
    # Records live for one batch: collecting less often spares a quarter of the time (measured 23 to 55 %).
    gc.set_threshold(100_000, 50, 1000)
    leaving: list[threading.Timer] = []
    try:
        asyncio.run(running())
    finally:
        # A library's thread that still runs would hold up the end of the interpreter: then the timer stays.
        if all(thread.daemon or thread is threading.main_thread() for thread in threading.enumerate()):
            for timer in leaving:
                timer.cancel()


def _leave_in_time(leaving: list[threading.Timer], status: int, reason: str) -> None:
    if leaving:
        return

    def leave() -> None:
        log.warning("libraries did not stop in time, leaving them", limit_s=STOP_LIMIT_S, reason=reason)
        os._exit(status)

    timer = threading.Timer(STOP_LIMIT_S, leave)
    timer.daemon = True
    timer.start()
    leaving.append(timer)
