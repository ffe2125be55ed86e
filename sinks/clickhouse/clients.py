"""Opens clients of a ClickHouse server or of chDB, the embedded engine, and keeps chDB's rules for its host process.

Rules of chDB that were measured, not guessed: one process per folder; after its import a SIGSEGV or SIGABRT anywhere
hangs the process for five minutes unless the signals are set back; naive times are read in the process's time zone;
a setting made read-only on a handle stays so for the handle's life.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

import clickhouse_connect
import structlog
from clickhouse_connect.driver.exceptions import ClickHouseError

from sinks.config import StoreConfig

log = structlog.get_logger(__name__)

Client = Any
"""A client of clickhouse-connect, which publishes no types."""

_CRASH_SIGNALS: Final = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS", "SIGTSTP")
DATABASE: Final = "inferwatch"
"""Where the tables are in a chDB folder; a server's database is named in its URL."""
_WRITE_TIMEOUT_S: Final = 300
_MIB: Final = 1024 * 1024


class StoreError(RuntimeError):
    """The store refused or failed; the message is one sentence. What was asked was not done, or may be tried again."""


class StoreInUse(StoreError):
    """Another process owns the chDB folder."""


class StoreAway(StoreError):
    """No server answers, or it doesn't let us in."""


def folder_of(config: StoreConfig) -> Path | None:
    """The chDB folder that `config.url` names; None for a server."""
    scheme, separator, rest = config.url.partition("://")
    if not separator:
        return Path(config.url).resolve()
    return Path(unquote(rest)).resolve() if scheme == "chdb" else None


class Clients(NamedTuple):
    """How to open a client that writes, and one that can only read; each is for one thread at a time."""

    writer: Callable[[], Client]
    reader: Callable[[], Client]


def clients_of(config: StoreConfig) -> Clients:
    """Prepares the folder or server. A client after a failed query must be replaced: chDB's may still hold its rows.

    Raises `StoreInUse`, `StoreAway`, or `StoreError` where the folder can't be used; so do the functions returned.
    """
    folder = folder_of(config)
    if folder is None:
        return _server_clients(config)
    _prepare_process()
    first = _open_folder(folder, config, None)
    try:
        _restore_signals()
        _close_overlay(first, folder)
        # The engine lives as long as a client is open, and only its start brings signals and overlay back.
        kept = _open_folder(folder, config, DATABASE)
    finally:
        first.close()
    waiting = [kept]

    def writer() -> Client:
        return waiting.pop() if waiting else _open_folder(folder, config, DATABASE)

    return Clients(writer, lambda: _limit(_open_folder(folder, config, DATABASE), config))


def _close_overlay(client: Client, folder: Path) -> None:
    """Makes our database, and replaces chDB's `default`, in which a table's name may be the path of any file.

    chDB brings that back at every start. Raises `StoreError` where somebody keeps tables in it.
    """
    client.command(f"CREATE DATABASE IF NOT EXISTS {DATABASE} ENGINE = Atomic")
    if client.command("SELECT engine FROM system.databases WHERE name = 'default'") != "Overlay":
        return
    if client.command("SELECT count() FROM system.tables WHERE database = 'default'"):
        raise StoreError(f"the chDB folder {folder} holds tables of another program: give the store its own folder")
    client.command("DROP DATABASE default SYNC")
    client.command("CREATE DATABASE default ENGINE = Atomic")


def _prepare_process() -> None:
    """UTC, then chDB's import: 339 MB of memory, so only the owner of a folder pays for it."""
    os.environ["TZ"] = "UTC"
    time.tzset()
    import chdb  # noqa: F401, PLC0415  # only once UTC is set


def _restore_signals() -> None:
    """The crash signals back at their defaults: chDB takes them when its engine starts, and then a crash hangs."""
    if threading.current_thread() is not threading.main_thread():
        log.warning("chDB was opened outside the main thread, so a crash may hang this process for minutes")
        return
    faulthandler.disable()
    for name in _CRASH_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})
    faulthandler.enable(file=2)


def _open_folder(folder: Path, config: StoreConfig, database: str | None) -> Client:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as error:
        raise StoreError(f"the store's folder {folder} can't be made: {error.strerror}") from None
    options = {"max_server_memory_usage": config.memory_max_mb * _MIB}
    try:
        return clickhouse_connect.get_client(
            interface="chdb",
            path=str(folder),
            database=database,
            chdb_options=options,
            tz_mode="aware",
            settings=_write_settings(config),
        )
    except ClickHouseError as error:
        pid = owner_pid(folder)
        if pid is not None:
            raise StoreInUse(
                f"the store at {folder} is open in process {pid}, and chDB allows one process a folder: "
                "stop that one, or read through its HTTP face"
            ) from None
        raise StoreError(f"the store at {folder} can't be opened: {one_line(error)}") from None


def owner_pid(folder: Path) -> int | None:
    """The live process that `folder/status` names, other than this one. The file outlives a crash; the pid doesn't."""
    try:
        first = (folder / "status").read_text(encoding="ascii", errors="replace").split("\n", 1)[0]
        pid = int(first.removeprefix("PID:"))
    except (OSError, ValueError):
        return None
    return pid if pid != os.getpid() and Path(f"/proc/{pid}").exists() else None


def _server_clients(config: StoreConfig) -> Clients:
    url = urlsplit(config.url)
    database = url.path.strip("/") or "default"
    if not database.replace("_", "").isalnum():
        raise StoreError(f"{config.url}: the database's name has letters, digits and _ only")
    access: dict[str, Any] = {
        "host": url.hostname,
        "port": url.port or (8443 if url.scheme == "https" else 8123),
        "secure": url.scheme == "https",
        "username": unquote(url.username or "default"),
        "password": _password(config),
        "tz_mode": "aware",
        "autogenerate_session_id": False,
        "send_receive_timeout": _WRITE_TIMEOUT_S,
    }
    try:
        first = clickhouse_connect.get_client(**access)
        if database != "default" and not first.command(
            "SELECT count() FROM system.databases WHERE name = {name:String}", parameters={"name": database}
        ):
            first.command(f"CREATE DATABASE IF NOT EXISTS `{database}`")
        first.close()
    except ClickHouseError as error:
        raise StoreAway(f"no store at {url.scheme}://{url.hostname}:{access['port']}: {one_line(error)}") from None
    reading = {**_read_settings(config), "readonly": 2}
    return Clients(
        lambda: clickhouse_connect.get_client(**access, database=database, settings=_write_settings(config)),
        lambda: clickhouse_connect.get_client(**access, database=database, settings=reading),
    )


def _password(config: StoreConfig) -> str:
    if config.password_file is None:
        return ""
    try:
        return config.password_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"store.password_file {config.password_file} can't be read: {type(error).__name__}") from None


def _write_settings(config: StoreConfig) -> dict[str, object]:
    return {
        "max_execution_time": _WRITE_TIMEOUT_S,
        "max_threads": config.threads_max,
        "max_partitions_per_insert_block": 0,
        "insert_deduplicate": 1,
        "deduplicate_blocks_in_dependent_materialized_views": 1,
        "async_insert": 0,
    }


def _read_settings(config: StoreConfig) -> dict[str, object]:
    return {
        "max_execution_time": config.query_timeout_s,
        "max_threads": config.threads_max,
        "max_memory_usage": config.memory_max_mb * _MIB // 2,
        "max_result_rows": config.result_rows_max,
        "result_overflow_mode": "throw",
    }


def _limit(client: Client, config: StoreConfig) -> Client:
    """Limits a chDB handle for good: `readonly` last, since nothing can be set after it."""
    for name, value in {**_read_settings(config), "readonly": 1}.items():
        client.command(f"SET {name} = {value!r}")
    return client


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error on one line, cut: for messages of ours."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}…"
