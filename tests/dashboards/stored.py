"""A real chDB store in a process of its own, since one process can open only one folder at a time."""

import multiprocessing
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from detectors.finding import Finding
from sinks.clickhouse.rows import StoredEvent

START_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 60


class QueryFailed(RuntimeError):
    """What the store said, as a dashboard would see it."""


def _serve(folder: str, pipe: Connection) -> None:
    from sinks.clickhouse.store import StoreError, open_store
    from sinks.config import StoreConfig

    store = open_store(StoreConfig(url=folder, memory_max_mb=1024))
    pipe.send(("ready", None))
    try:
        while True:
            try:
                name, arguments, options = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(("done", getattr(store, name)(*arguments, **options)))
            except StoreError as error:
                pipe.send(("failed", str(error)))
    finally:
        store.close()


class StoreProcess:
    """Opens the store at `folder`. `query` may be called from any thread; calls go one at a time."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._lock = threading.Lock()
        self._process = context.Process(target=_serve, args=(str(folder), theirs), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_TIMEOUT_S):
            self._process.kill()
            raise TimeoutError("the store's process did not open the store in time")
        self._pipe.recv()

    def _call(self, name: str, *arguments: object, **options: object) -> object:
        with self._lock:
            self._pipe.send((name, arguments, options))
            if not self._pipe.poll(ANSWER_TIMEOUT_S):
                raise TimeoutError(f"no answer to {name}")
            state, value = self._pipe.recv()
        if state == "failed":
            raise QueryFailed(value)
        return value

    def query(self, sql: str, parameters: Mapping[str, object]) -> list[dict[str, object]]:
        """As `Store.query`."""
        return self._call("query", sql, dict(parameters))  # type: ignore[return-value]  # what the store gives

    def fill(
        self,
        events: Sequence[StoredEvent] = (),
        findings: Sequence[Finding] = (),
        statuses: Sequence[Mapping[str, object]] = (),
        batch: str = "fill",
    ) -> None:
        """Inserts what is given."""
        for first in range(0, len(events), 20_000):
            self._call("insert_events", events[first : first + 20_000], token=f"{batch}:{first}")
        if findings:
            self._call("insert_findings", list(findings), token=batch)
        if statuses:
            self._call("insert_status", list(statuses), token=batch)

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._pipe.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
