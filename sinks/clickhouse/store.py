"""The store: events, findings and process health in ClickHouse or chDB, written at least once, read in SQL.

Guarantee: when an insert returns, the rows survive SIGKILL (with `fsync`, power loss). The same batch under the same
token leaves the same rows and the same minute counters, however often it is inserted, across restarts and crashes in
between, as long as at most 10,000 inserts into the table came since. A batch cut at other offsets doubles no row of
`events` for good (the table replaces by offset when it merges), but would count twice in `events_1m`: so the caller
keeps the boundaries of a batch until it is acknowledged.
"""

import hashlib
import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Final

import structlog
from clickhouse_connect.driver.exceptions import ClickHouseError

from detectors.finding import Finding
from sinks.clickhouse.clients import Client, Clients, StoreAway, StoreError, StoreInUse, clients_of, one_line
from sinks.clickhouse.rows import (
    Columns,
    StoredEvent,
    StoredRecord,
    event_columns,
    finding_columns,
    lane_columns,
    record_of,
    status_columns,
)
from sinks.config import StoreConfig

__all__ = ["BATCH_ROWS_MAX", "Store", "StoreAway", "StoreError", "StoreInUse", "StoredEvent", "open_store", "record_of"]

log = structlog.get_logger(__name__)

BATCH_ROWS_MAX: Final = 100_000
"""Rows an insert may have: a batch must stay one block, or its token would not cover it."""
_ENGINE_OF: Final = "SELECT engine_full FROM system.tables WHERE database = currentDatabase() AND name = '{}'"


def open_store(config: StoreConfig) -> "Store":
    """The store at `config.url`, with its tables made or brought up to date.

    Call it in the main thread of the one process that owns a chDB folder. Raises `StoreInUse` naming the other
    process, `StoreAway` when no server answers, `StoreError` for anything else; each message is one sentence.
    """
    store = Store(config, clients_of(config))
    try:
        store.prepare()
    except StoreError:
        store.close()
        raise
    return store


class Store:
    """One writer and a few readers. Thread-safe: inserts go one at a time, queries up to `config.readers` at once."""

    def __init__(self, config: StoreConfig, clients: Clients) -> None:
        self._config = config
        self._clients = clients
        self._writer: Client | None = None
        self._writing = threading.Lock()
        self._types: dict[str, dict[str, object]] = {}
        self._readers: queue.LifoQueue[Client | None] = queue.LifoQueue()
        self._closed = False
        for _ in range(config.readers):
            self._readers.put(None)

    def prepare(self) -> None:
        """Makes the tables, and sets retention and fsync as configured. Idempotent."""
        config = self._config
        for statement in schema(config):
            self._command(statement)
        fsync = f"fsync_after_insert = {int(config.fsync)}"
        for table, moment, days in (
            ("events", "append_time", config.events_days),
            ("lane_records", "append_time", config.events_days),
            ("events_1m", "minute", config.rollup_days),
            ("findings", "updated", config.findings_days),
            ("process_reports", "at", config.status_days),
        ):
            made = str(self._command(_ENGINE_OF.format(table)))
            if f"toIntervalDay({days})" not in made:
                log.info("retention changes", table=table, days=days)
                self._command(f"ALTER TABLE {table} MODIFY TTL toDateTime({moment}) + toIntervalDay({days})")
            if fsync not in made and (config.fsync or "fsync_after_insert" in made):
                self._command(f"ALTER TABLE {table} MODIFY SETTING {fsync}")

    def insert_events(self, rows: Sequence[StoredEvent], *, token: str) -> None:
        """Stores events. `token` names the batch, as `TOPIC:PARTITION:FIRST-LAST`.

        The rows' ids and offsets are part of the token in effect: other rows under a token used before (a topic made
        anew begins at offset 0 again) are stored, not dropped as a repetition. Raises `StoreError`: insert again.
        """
        keys = (f"{row.event.event_id}:{row.partition}:{row.offset}" for row in rows)
        self._insert("events", event_columns(rows) if rows else {}, token, keys)

    def insert_records(self, rows: Sequence[StoredRecord], *, token: str) -> None:
        """Stores records of lanes as they were on the wire; by offset, so that the same one twice is one."""
        keys = (f"{row.partition}:{row.offset}" for row in rows)
        self._insert("lane_records", lane_columns(rows) if rows else {}, token, keys)

    def insert_findings(self, findings: Sequence[Finding], *, token: str) -> None:
        """Stores revisions of findings. The same revision twice is one row once merged, and one in `findings_now`."""
        keys = (f"{finding.uid}:{finding.revision}" for finding in findings)
        self._insert("findings", finding_columns(findings) if findings else {}, token, keys)

    def insert_status(self, records: Sequence[Mapping[str, object]], *, token: str) -> None:
        """Stores health records as they are on iw.status; only the newest of each process is kept.

        Raises `msgspec.ValidationError` for a record without process_id, role or time.
        """
        keys = (f"{record['process_id']}:{record['at']}" for record in records)
        self._insert("process_reports", status_columns(records) if records else {}, token, keys)

    def query(self, sql: str, parameters: Mapping[str, object] | None = None) -> list[dict[str, object]]:
        """The rows of one SELECT with `{name:Type}` parameters; moments are aware, in UTC.

        Can't write; stopped after `query_timeout_s`, refused above `result_rows_max` rows. Blocks: in an event loop,
        call it in a thread. Raises `StoreError`.
        """
        try:
            reader = self._readers.get(timeout=self._config.query_timeout_s)
        except queue.Empty:
            raise StoreError(f"all {self._config.readers} readers of the store stayed busy: try again") from None
        try:
            if self._closed:
                raise StoreError("the store is closed")
            reader = reader or self._clients.reader()
            result = reader.query(sql, parameters=dict(parameters or {}))
            return [dict(row) for row in result.named_results()]
        except ClickHouseError as error:
            _drop(reader)
            reader = None
            raise StoreError(f"the query failed: {one_line(error)}") from None
        finally:
            self._readers.put(reader)

    def close(self) -> None:
        """Waits for what runs (its time is limited) and closes all clients; the folder is free then."""
        self._closed = True
        for reader in [self._readers.get() for _ in range(self._config.readers)]:
            _drop(reader)
            self._readers.put(None)
        with self._writing:
            _drop(self._writer)
            self._writer = None

    def _insert(self, table: str, columns: Columns, token: str, keys: Iterable[str]) -> None:
        if not columns:
            return
        rows = len(next(iter(columns.values())))
        if rows > BATCH_ROWS_MAX:
            raise ValueError(f"{rows} rows in one insert: at most {BATCH_ROWS_MAX} can be stored as one block")
        digest = hashlib.blake2b("\n".join(keys).encode(), digest_size=12).hexdigest()
        settings = {"insert_deduplication_token": f"{token}:{digest}"}
        with self._writing:
            try:
                writer = self._open_writer()
                types = self._types.get(table) or self._types.setdefault(table, _types_of(writer, table))
                writer.insert(
                    table,
                    list(columns.values()),
                    column_names=list(columns),
                    column_types=[types[name] for name in columns],
                    column_oriented=True,
                    settings=settings,
                )
            except ClickHouseError as error:
                self._forget_writer()
                raise StoreError(f"{rows} rows could not be stored in {table}: {one_line(error)}") from None

    def _command(self, sql: str) -> object:
        with self._writing:
            try:
                return self._open_writer().command(sql)
            except ClickHouseError as error:
                self._forget_writer()
                raise StoreError(f"the store's tables can't be made: {one_line(error)}") from None

    def _open_writer(self) -> Client:
        if self._closed:
            raise StoreError("the store is closed")
        if self._writer is None:
            self._writer = self._clients.writer()
        return self._writer

    def _forget_writer(self) -> None:
        _drop(self._writer)
        self._writer = None


def _types_of(writer: Client, table: str) -> dict[str, object]:
    """Column name -> type object, asked once instead of at every insert."""
    context = writer.create_insert_context(table)
    return dict(zip(context.column_names, context.column_types, strict=True))


def _drop(client: Client | None) -> None:
    """Closes a client, whatever state it is in."""
    if client is not None:
        with suppress(ClickHouseError):
            client.close()


def schema(config: StoreConfig) -> list[str]:
    """The statements of `schema.sql` with the configured retention."""
    text = (files("sinks.clickhouse") / "schema.sql").read_text(encoding="utf-8")
    for name in ("events_days", "rollup_days", "findings_days", "status_days"):
        text = text.replace(f":{name}", str(getattr(config, name)))
    plain = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("--"))
    return [statement.strip() for statement in plain.split(";\n") if statement.strip()]
