"""Reconciliation: the engine's own count of finished requests against what the wrapper let in.

The wrapper says `begun` for each request it hands to the engine, the engine's stat logger says `finished` for each it
has completed, by the same id. What finished and was never begun went round the wrapper: it is counted as `unaudited`,
goes out in heartbeats, and is a finding. Aborted requests never finish in the engine's statistics, so they count for
nothing here; n choices are n finished requests with one id.

Memory: one entry a request in flight, and `CLOSED_MAX` more, since the engine may count a request after its answer has
been read. Thread-safe. What it can't see: a request that is put into the engine's core past its output processor.
"""

import threading
from collections import OrderedDict
from typing import Final

CLOSED_MAX: Final = 8192


class Tally:
    """What was begun through the wrapper, and what the engine finished."""

    def __init__(self) -> None:
        self.finished = 0
        """Requests, choices apart, that the engine's statistics say are complete."""
        self.unaudited = 0
        """Of those the ones that nobody began."""
        self._open: dict[str, int] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, request_id: str) -> None:
        """The wrapper hands a request to the engine. Clients may use one id for several."""
        with self._lock:
            self._open[request_id] = self._open.get(request_id, 0) + 1

    def close(self, request_id: str) -> None:
        """Its event is written; the engine's count may still come."""
        with self._lock:
            left = self._open.get(request_id, 0) - 1
            if left > 0:
                self._open[request_id] = left
                return
            self._open.pop(request_id, None)
            self._closed[request_id] = None
            self._closed.move_to_end(request_id)
            if len(self._closed) > CLOSED_MAX:
                self._closed.popitem(last=False)

    def finish(self, request_id: str | None) -> None:
        """The engine has finished a request of this id."""
        with self._lock:
            self.finished += 1
            if request_id is None or (request_id not in self._open and request_id not in self._closed):
                self.unaudited += 1
