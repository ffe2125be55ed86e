"""A model behind an HTTP address that judges for a guard: one POST, one bounded JSON answer, one moment to be done by.

Settings, client and exceptions are shared by the guards that ask a model elsewhere. What the model is asked holds the
text that is judged, so: TLS is verified, plain HTTP goes to this host only unless it is allowed, no redirect is
followed, no proxy of the environment is used, and nothing of question or answer gets into an exception, a log or a
repr. A connection is kept for the next question; where the server has closed it meanwhile, it is asked once more.
"""

import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Self
from urllib.parse import urlsplit

import msgspec
from pydantic import BaseModel, ConfigDict, Field, model_validator

from collector.event import Stage
from collector.guards.protocol import GuardPolicy, GuardRefused, Probe, TextTooLong, windows
from collector.identity import KeyProblem
from collector.secret_file import read_secret

ANSWER_BYTES_MAX: Final = 256 * 1024
CONNECTIONS_MAX: Final = 16
"""Idle connections kept; more questions at once have more, which are closed after."""


class EndpointFailed(Exception):
    """The endpoint could not be asked: away, too slow, refused, redirected."""


class BadAnswer(Exception):
    """The endpoint's answer is not what a judge says: prose, another shape, too long. Never read as an allow."""


class ProbeSpec(BaseModel):
    """A text whose answer you know of your own model: part of the self-test."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(min_length=1, max_length=20_000, repr=False, description="The text.")
    stage: Stage = Field("input", description="Where it would stand.")
    block: bool = Field(description="Whether it must be blocked or must pass.")

    def probe(self) -> Probe:
        return Probe(self.text, self.stage, self.block)


class EndpointConfig(BaseModel):
    """Where a judge is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(
        min_length=8,
        max_length=2048,
        description="Base of the API, as https://guard.example/v1 or http://127.0.0.1:8001/v1.",
    )
    model: str = Field(min_length=1, max_length=256, description="The model's name at that server.")
    api_key_file: Path | None = Field(None, description="File with the API key, sent as a bearer token; mode 0600.")
    ca_file: Path | None = Field(None, description="CA certificates to trust instead of the system's, PEM.")
    plaintext_allowed: bool = Field(
        False, description="Plain HTTP to another host than this. The prompts then cross that network unencrypted."
    )

    @model_validator(mode="after")
    def _address(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("url is http://HOST or https://HOST with a path at most")
        if parts.username or parts.password:
            raise ValueError("url holds a password; put the API key into a file (api_key_file)")
        if parts.scheme == "http" and not self.plaintext_allowed and not _is_here(parts.hostname):
            raise ValueError("url is plain HTTP to another host; use https, or set plaintext_allowed")
        return self


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class EndpointPolicy(GuardPolicy):
    """What the tables of all guards that ask an endpoint can say."""

    deadline_ms: float = Field(
        10_000,
        gt=0,
        le=600_000,
        description="Time for one text, all its questions together; then the verdict is error.",
    )
    endpoint: EndpointConfig | None = Field(None, description="Where the model is asked; the guard needs one.")
    chars_max: int = Field(
        100_000,
        ge=1_000,
        le=10_000_000,
        description="A longer text is not asked about: the verdict is error TextTooLong.",
    )
    window_chars: int = Field(
        12_000, ge=1_000, le=1_000_000, description="A longer text is asked about in overlapping parts of this size."
    )
    probes: dict[str, ProbeSpec] = Field(
        default_factory=dict,
        max_length=64,
        description="Self-test of your own, by name: one text to block and one to pass at least. Unset: ours.",
    )

    def open(self, whose: str) -> "Endpoint":
        """The endpoint. Raises `GuardRefused`."""
        if self.endpoint is None:
            raise GuardRefused(f"the {whose} guard did not start: it needs guards.{whose}.endpoint with url and model")
        return Endpoint(self.endpoint, whose)

    def parts(self, text: str) -> list[str]:
        """The text in windows to its very end. Raises `TextTooLong`."""
        if len(text) > self.chars_max:
            raise TextTooLong
        step = self.window_chars - self.window_chars // 10
        return [text[start:end] for start, end in windows(len(text), self.window_chars, step)]

    def until_s(self, text: str) -> float:
        """When all questions about a text must be answered, on `time.monotonic`: a tenth before the stack gives up."""
        return time.monotonic() + 0.9 * (self.deadline_ms + self.deadline_ms_per_kchar * len(text) / 1000) / 1000

    def asked(self) -> object:
        """What decides a verdict, for the version: no key, no address."""
        shown = self.model_dump(
            mode="json", exclude={"endpoint", "deadline_ms", "sample", "tenants", "routes", "probes"}
        )
        return (shown, None if self.endpoint is None else self.endpoint.model)


class Endpoint:
    """Asks. Thread-safe. Raises `GuardRefused` at once where key or certificates can't be read."""

    def __init__(self, config: EndpointConfig, whose: str) -> None:
        self._idle: list[http.client.HTTPConnection] = []
        parts = urlsplit(config.url)
        self._host, self._path = parts.hostname or "", parts.path.rstrip("/")
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls: ssl.SSLContext | None = None
        try:
            if parts.scheme == "https":
                self._tls = ssl.create_default_context(cafile=config.ca_file)
            key = read_secret(config.api_key_file, f"the {whose} guard's API key")
        except KeyProblem as problem:
            raise GuardRefused(str(problem)) from None
        except OSError:
            raise GuardRefused(f"{config.ca_file}: no readable CA certificates (guards.{whose}.ca_file)") from None
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Endpoint({self._host}:{self._port})"

    def __del__(self) -> None:
        for connection in self._idle:
            connection.close()

    def ask(self, path: str, body: object, until_s: float) -> Any:
        """The parsed JSON answer to a POST of `body`, by `until_s` of `time.monotonic`.

        Raises `EndpointFailed` or `BadAnswer`, without a cause that could tell what was asked.
        """
        raw = msgspec.json.encode(body)
        kept = self._kept()
        try:
            try:
                return self._exchange(kept or self._connect(until_s), path, raw, until_s)
            except (http.client.RemoteDisconnected, ConnectionError):
                if kept is None:
                    raise
                return self._exchange(self._connect(until_s), path, raw, until_s)
        except (OSError, http.client.HTTPException):
            raise EndpointFailed from None

    def _kept(self) -> http.client.HTTPConnection | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _connect(self, until_s: float) -> http.client.HTTPConnection:
        left_s = _left_s(until_s)
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=left_s)
        return http.client.HTTPSConnection(self._host, self._port, timeout=left_s, context=self._tls)

    def _exchange(self, connection: http.client.HTTPConnection, path: str, raw: bytes, until_s: float) -> Any:
        """One question and its answer; the connection is kept only after a whole one."""
        whole = False
        try:
            if connection.sock is not None:
                connection.sock.settimeout(_left_s(until_s))
            connection.response_class = partial(_response, until_s)  # type: ignore[assignment]  # it is only called
            connection.request("POST", self._path + path, raw, self._headers)
            response = connection.getresponse()
            said = response.read(ANSWER_BYTES_MAX + 1)
            whole = response.isclosed()
            if response.status != 200:
                raise EndpointFailed
        finally:
            with self._lock:
                kept = whole and len(self._idle) < CONNECTIONS_MAX
                if kept:
                    self._idle.append(connection)
            if not kept:
                connection.close()
        return _parsed(said, response)


def _response(until_s: float, sock: socket.socket, *_: object, **named: Any) -> http.client.HTTPResponse:
    return http.client.HTTPResponse(_Wire(sock, until_s), method=named.get("method"))  # type: ignore[arg-type]


class _TopLogprob(msgspec.Struct):
    token: str
    logprob: float


class _TokenLogprob(msgspec.Struct):
    token: str
    top_logprobs: list[_TopLogprob] = []


class _Logprobs(msgspec.Struct):
    content: list[_TokenLogprob] | None = None


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str
    logprobs: _Logprobs | None = None


class _Chat(msgspec.Struct):
    choices: list[_Choice]


class Said(NamedTuple):
    """What a chat model said."""

    text: str
    tokens: Sequence[tuple[str, Mapping[str, float]]]
    """Each token, and the log-probabilities of what could have stood there; empty where the server tells none."""

    def __repr__(self) -> str:
        return f"Said({len(self.text)} characters)"


def chat(answer: object) -> Said:
    """The one whole message in a chat completion. Raises `BadAnswer`."""
    try:
        (choice,) = msgspec.convert(answer, _Chat).choices
    except (msgspec.ValidationError, ValueError):
        raise BadAnswer from None
    if choice.finish_reason != "stop":
        raise BadAnswer
    content = (choice.logprobs and choice.logprobs.content) or []
    return Said(
        choice.message.content,
        [(each.token, {top.token: top.logprob for top in each.top_logprobs}) for each in content],
    )


def _parsed(said: bytes, response: http.client.HTTPResponse) -> Any:
    if len(said) > ANSWER_BYTES_MAX or response.headers.get("Content-Encoding", "identity") != "identity":
        raise BadAnswer
    try:
        return msgspec.json.decode(said)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadAnswer from None


def _left_s(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


class _Wire(io.RawIOBase):
    """A socket's reading side that is done by a moment, however slowly the bytes drip."""

    def __init__(self, sock: socket.socket, until_s: float) -> None:
        self._sock, self._until_s = sock, until_s

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left_s(self._until_s))
        return self._sock.recv_into(buffer)
