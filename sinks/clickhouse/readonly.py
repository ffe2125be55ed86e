"""Runs other people's queries on the owner's chDB so that they can read the store's tables and nothing else.

The engine's own `readonly` is not enough: it lets SQL read files, write files, kill and stop. So each query is first
rewritten by the engine into its canonical form (no comments, no tricks of spelling), and that very text is judged and
run: one statement that the engine classes as reading; a syntax tree of known kind, with tables from a list, table
functions from a list, no function that reaches outside, no settings. Then it runs on a fresh handle with limits set and
`readonly = 1` last. In a store opened here no table name can be a path (`clients.open_clients`).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from sinks.clickhouse.clients import DATABASE, StoreError, folder_of, one_line
from sinks.config import StoreConfig

_MIB: Final = 1024 * 1024

_ROOTS: Final = (
    "SelectWithUnionQuery", "DescribeQuery", "ShowTables", "ShowCreateTableQuery", "ExistsTableQuery", "Explain",
)  # fmt: skip
_SYSTEM_TABLES: Final = frozenset({
    "one", "numbers", "numbers_mt", "zeros", "tables", "columns", "databases", "settings", "functions", "formats",
    "data_type_families", "parts", "detached_parts", "metrics", "asynchronous_metrics", "events", "time_zones",
})  # fmt: skip
_TABLE_FUNCTIONS: Final = frozenset({
    "numbers", "numbers_mt", "zeros", "zeros_mt", "values", "generateseries", "generate_series", "view",
})  # fmt: skip
_DATABASES: Final = frozenset({DATABASE, "information_schema", "INFORMATION_SCHEMA"})
_OUTSIDE: Final = re.compile(
    r"file|dict\w*|joinget\w*|catboost\w*|get(serverport|serversetting|macro|clienthttpheader|oskernelversion)|"
    r"(log|stack)trace|addressto\w*|filesystem\w*|hostname|fqdn|serveruuid|showcertificate|ai[a-z]+\w*|sleep\w*|eval|"
    r"executable|python|url|s3\w*|remote\w*|cluster\w*|merge\w*|input|loop"
)
"""Functions, in lower case, that read files or settings, reach over the network, or only waste time."""

_FORMAT: Final = re.compile(r"\sFORMAT\s+(\w+)$")
_NODE: Final = re.compile(r"^(?P<indent> *)(?P<kind>\w+)(?: +(?P<name>.*?))?(?: \(alias .*?\))?(?: \(children \d+\))?$")
_ESCAPES: Final = str.maketrans(
    {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\0": "\\0", "\b": "\\b", "\f": "\\f"}
)
"""A parameter's value is read with escapes, as in a tab-separated file."""
_LIMITABLE: Final = ("max_execution_time", "max_result_bytes", "max_memory_usage", "max_threads")


class Forbidden(Exception):
    """The query is refused; `code` is ClickHouse's number for the reason."""

    def __init__(self, message: str, code: int = 497) -> None:
        super().__init__(message)
        self.code = code


class Answer(NamedTuple):
    """The result in `format`."""

    body: bytes
    format: str
    read_rows: int
    read_bytes: int
    elapsed_ns: int


class ReadOnlyEngine:
    """Thread-safe; each query has its own handle, about 3 ms. Needs the store to be open in this process."""

    def __init__(self, config: StoreConfig) -> None:
        folder = folder_of(config)
        if folder is None:
            raise StoreError("the read-only face is for chDB: a ClickHouse server has its own")
        self._folder: Path = folder
        face = config.face
        self._limits: dict[str, float] = {
            "max_execution_time": face.query_timeout_s,
            "max_memory_usage": face.memory_max_mb * _MIB,
            "max_result_bytes": face.result_max_mb * _MIB,
            "max_threads": config.threads_max,
        }

    def run(self, sql: str, default_format: str, parameters: Mapping[str, str], wished: Mapping[str, str]) -> Answer:
        """Judges and runs one query. `wished`: settings; limits may be lowered, nothing else may be set.

        Raises `Forbidden`, or `RuntimeError` with the engine's message, which begins with its code.
        """
        import chdb  # noqa: PLC0415  # the process must be prepared first: `clients.clients_of`

        limits = self._lowered(wished)
        handle = chdb.connect(str(self._folder))
        try:
            handle.query(f"USE {DATABASE}")
            text, named_format = _canonical(handle, sql)
            _judge(handle, text, parameters)
            for name, value in limits.items():
                handle.query(f"SET {name} = {value:g}" if isinstance(value, float) else f"SET {name} = {value}")
            handle.query("SET readonly = 1")
            chosen = named_format or default_format
            result = handle.query(text, chosen, params=dict(parameters))
            body = bytes(result.bytes() or b"")
            return Answer(body, chosen, result.rows_read(), result.bytes_read(), int(result.elapsed() * 1e9))
        finally:
            handle.close()

    def _lowered(self, wished: Mapping[str, str]) -> dict[str, float]:
        limits = dict(self._limits)
        for name, text in wished.items():
            if name not in _LIMITABLE:
                raise Forbidden(f"setting {one_line(ValueError(name), 40)} can't be changed here", 164)
            if not re.fullmatch(r"\d{1,15}(\.\d{1,6})?", text):
                raise Forbidden(f"setting {name} wants a number", 164)
            if 0 < float(text) < limits[name]:
                limits[name] = float(text) if "." in text else int(text)
        return limits


def _canonical(handle: Any, sql: str) -> tuple[str, str]:
    """The query as the engine would write it, and the format that it names, taken off its end."""
    _classify(handle, sql)
    escaped = sql.translate(_ESCAPES)
    written = handle.query("SELECT formatQuerySingleLine({q:String})", "RawBLOB", params={"q": escaped}).bytes()
    text = bytes(written).decode()
    found = _FORMAT.search(text)
    return (text[: found.start()], found.group(1)) if found else (text, "")


def _classify(handle: Any, sql: str) -> None:
    kinds = handle._conn.classify_query(sql, DATABASE)  # chDB publishes its classifier there only
    if kinds["statement_count"] != 1 or kinds["query_class"].name != "READ_ONLY":
        raise Forbidden("this face is read-only and takes one statement", 164)


def _judge(handle: Any, text: str, parameters: Mapping[str, str]) -> None:
    """Walks the syntax tree of the canonical text. Raises `Forbidden`."""
    _classify(handle, text)
    tree = bytes(handle.query(f"EXPLAIN AST {text}", "TSV", params=dict(parameters)).bytes() or b"").decode()
    lines = tree.rstrip("\n").split("\n")
    if not lines[0].startswith(_ROOTS):
        raise Forbidden("only SELECT, DESCRIBE, EXISTS, EXPLAIN, SHOW TABLES and SHOW CREATE TABLE are answered", 164)
    parent = ""
    for line in lines:
        node = _NODE.match(line)
        if node is None:
            continue
        _judge_node(node["kind"], node["name"] or "", parent)
        parent = node["kind"]


def _judge_node(kind: str, name: str, parent: str) -> None:
    """One node; `parent` is the kind of the line before it, which for a first child is its parent."""
    if kind == "Set":
        raise Forbidden("settings can't be changed here", 164)
    if kind == "ColumnsApplyTransformer":
        raise Forbidden("APPLY is not answered here")
    names_table = kind == "TableIdentifier" or name.partition(".")[0] in ("default", "system")
    if names_table and kind in ("TableIdentifier", "Identifier"):
        _judge_table(name)
    elif kind in ("ShowTables", "ShowCreateTableQuery", "ExistsTableQuery") and "." in name:
        _judge_table(name.strip())
    elif kind == "Function":
        if parent == "TableExpression":
            if name.lower() not in _TABLE_FUNCTIONS:
                raise Forbidden(f"table function {one_line(ValueError(name), 40)} is not answered here")
        elif _OUTSIDE.fullmatch(name.lower()):
            raise Forbidden(f"function {one_line(ValueError(name), 40)} is not answered here")


def _judge_table(name: str) -> None:
    database, dot, table = name.partition(".")
    if dot and not (database in _DATABASES or (database == "system" and table.partition(".")[0] in _SYSTEM_TABLES)):
        raise Forbidden(f"table {one_line(ValueError(name), 60)} is not answered here")
