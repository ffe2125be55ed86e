"""Asks the store over ClickHouse's plain HTTP protocol, with the standard library alone: for hosts that have no client.

For a server or for the read-only face of chDB, whichever `[store]` names. It only reads.
"""

import http.client
import ssl
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias
from urllib.parse import unquote, urlencode, urlsplit

import orjson

from sinks.config import StoreConfig

Row: TypeAlias = dict[str, object]
Ask: TypeAlias = Callable[[str, Mapping[str, str]], list[Row]]
"""(SQL, parameters) to rows. Raises `NotAnswered`."""

ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024


class NotAnswered(ConnectionError):
    """The store could not be asked or refused; the message is one sentence and holds no parameter."""


def asking(config: StoreConfig) -> Ask:
    """How to ask the store. Raises NotAnswered where its password can't be read."""
    url = urlsplit(config.url if config.url.startswith(("http://", "https://")) else _face_url(config))
    database = url.path.strip("/") or "default"
    headers = {"X-ClickHouse-User": unquote(url.username or "default"), "X-ClickHouse-Key": _password(config)}
    port = url.port or (8443 if url.scheme == "https" else 8123)

    def ask(sql: str, parameters: Mapping[str, str]) -> list[Row]:
        named = {f"param_{name}": value for name, value in parameters.items()}
        target = "/?" + urlencode({"database": database, "default_format": "JSONEachRow", **named})
        connection = (
            http.client.HTTPSConnection(
                url.hostname or "", port, timeout=config.query_timeout_s, context=ssl.create_default_context()
            )
            if url.scheme == "https"
            else http.client.HTTPConnection(url.hostname or "", port, timeout=config.query_timeout_s)
        )
        place = f"{url.scheme}://{url.hostname}:{port}"
        try:
            connection.request("POST", target, sql.encode(), headers)
            answer = connection.getresponse()
            body = answer.read(ANSWER_BYTES_MAX + 1)
        except (OSError, http.client.HTTPException) as error:
            raise NotAnswered(f"the store at {place} does not answer: {type(error).__name__}") from None
        finally:
            connection.close()
        if answer.status != http.client.OK:
            code = answer.headers.get("X-ClickHouse-Exception-Code", "none")
            raise NotAnswered(f"the store at {place} refused, with status {answer.status} and ClickHouse's code {code}")
        if len(body) > ANSWER_BYTES_MAX:
            raise NotAnswered(f"the store at {place} gave more than {ANSWER_BYTES_MAX} bytes: ask for less")
        return [orjson.loads(line) for line in body.splitlines()]

    return ask


def _face_url(config: StoreConfig) -> str:
    face = config.face
    if not face.port:
        raise NotAnswered("store.face.port is 0, so nobody knows where the store is to be asked: give it a port")
    return f"http://{face.user}@{face.host}:{face.port}"


def _password(config: StoreConfig) -> str:
    server = config.url.startswith(("http://", "https://"))
    path = config.password_file if server else config.face.password_file
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NotAnswered(f"the store's password file {path} can't be read: {type(error).__name__}") from None
