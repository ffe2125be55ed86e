"""How a server and its guards' sidecar speak: frames with a length, an id and a MessagePack body of a known shape.

A frame is 4 bytes of length, 8 bytes of id (big-endian) and the body. Nothing is ever unpickled; a body that is not of
the expected shape, or longer than is allowed where it comes from, ends the connection (`Garbled`). Texts travel as
UTF-8 with lone surrogates as they are, for guards judge those too.
"""

import hmac
import struct
from collections.abc import Iterator
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from collector.event import Stage

PROTOCOL: Final = 1
HEADER: Final = struct.Struct(">IQ")
HELLO_BYTES_MAX: Final = 4_096
"""Until a client has shown who it is, it may send so much."""
ANSWER_BYTES_MAX: Final = 1_048_576
"""What a sidecar may send in one frame."""
NONCE_BYTES: Final = 16
BUDGET_MS_MAX: Final = 3_600_000

Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Proof = Annotated[bytes, Meta(min_length=32, max_length=32)]
Word = Annotated[str, Meta(max_length=64, pattern="^[A-Za-z0-9_.-]*$")]
Label = Annotated[str, Meta(max_length=256)]
Version = Annotated[str, Meta(max_length=128)]


class Garbled(Exception):
    """What came is no frame of this protocol."""


class Greeting(Struct, frozen=True, array_like=True, gc=False):
    """The sidecar's first word."""

    protocol: int
    nonce: Nonce


class Hello(Struct, frozen=True, array_like=True, gc=False):
    """The client's first word: it knows the token."""

    protocol: int
    nonce: Nonce
    proof: Proof


class ProbeTold(Struct, frozen=True, array_like=True, gc=False, repr_omit_defaults=True):
    """A self-test of a guard: texts that are in the package."""

    text: Annotated[bytes, Meta(max_length=65_536)]
    stage: Stage
    block: bool
    system: Annotated[bytes, Meta(max_length=65_536)] = b""
    prompt: Annotated[bytes, Meta(max_length=65_536)] = b""


class GuardTold(Struct, frozen=True, array_like=True):
    """What a guard of the sidecar is."""

    name: Word
    version: Version
    stages: frozenset[Stage]
    labels: Annotated[frozenset[Label], Meta(max_length=4_096)]
    many: bool
    """It judges several texts together."""
    reads: frozenset[Word]
    """What it reads of the context."""
    window_chars: Annotated[int, Meta(ge=0)]
    """What it has to see of an answer in one piece; 0: the whole."""
    probes: Annotated[tuple[ProbeTold, ...], Meta(max_length=64)]


class Welcome(Struct, frozen=True, array_like=True):
    """The sidecar knows the token too; said again, with an empty proof, whenever a guard has changed."""

    proof: Annotated[bytes, Meta(max_length=32)]
    frame_bytes_max: int
    guards: Annotated[tuple[GuardTold, ...], Meta(max_length=64)]


class AskHead(Struct, frozen=True, array_like=True, gc=False):
    """What the sidecar itself reads of a question."""

    guard: Word
    budget_ms: Annotated[float, Meta(ge=0, le=BUDGET_MS_MAX)]


class Ask(Struct, frozen=True, array_like=True, gc=False):
    """One text for one guard. `budget_ms`: after so long nobody waits for the answer any more."""

    guard: Word
    budget_ms: float
    stage: Stage
    text: bytes
    tenant: str = ""
    route: str = ""
    system: bytes = b""
    prompt: bytes = b""

    def __repr__(self) -> str:
        return f"Ask({self.guard}, {self.stage}, {len(self.text)} bytes)"


class Answer(Struct, frozen=True, array_like=True, gc=False):
    """The judgement, or the class of what went wrong."""

    score: float
    label: Label
    block: bool
    error: Word = ""


class Ready(Struct, frozen=True, array_like=True):
    """A worker's first word: its guards, or why there are none."""

    guards: tuple[GuardTold, ...]
    refused: str = ""


encode: Final = msgspec.msgpack.Encoder().encode
greeting_of: Final = msgspec.msgpack.Decoder(Greeting).decode
hello_of: Final = msgspec.msgpack.Decoder(Hello).decode
welcome_of: Final = msgspec.msgpack.Decoder(Welcome).decode
ask_head_of: Final = msgspec.msgpack.Decoder(AskHead).decode
ask_of: Final = msgspec.msgpack.Decoder(Ask).decode
answer_of: Final = msgspec.msgpack.Decoder(Answer).decode
ready_of: Final = msgspec.msgpack.Decoder(Ready).decode
BAD_BODY: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What the decoders raise."""


def frame(number: int, body: bytes) -> bytes:
    """One frame."""
    return HEADER.pack(len(body), number) + body


class Frames:
    """Cuts a stream into frames. Memory: one frame of at most `body_bytes_max`, and what came with it."""

    __slots__ = ("_buffer", "body_bytes_max")

    def __init__(self, body_bytes_max: int) -> None:
        self.body_bytes_max = body_bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(id, body) of each frame that is whole now. Raises Garbled where one is announced longer than allowed."""
        buffer, at = self._buffer, 0
        buffer += data
        try:
            while len(buffer) - at >= HEADER.size:
                length, number = HEADER.unpack_from(buffer, at)
                if length > self.body_bytes_max:
                    raise Garbled
                end = at + HEADER.size + length
                if len(buffer) < end:
                    break
                body = bytes(memoryview(buffer)[at + HEADER.size : end])
                at = end
                yield number, body
        finally:
            del buffer[:at]


def proof(token: bytes, who: bytes, greeting: Greeting, client_nonce: bytes) -> bytes:
    """That `who` (client or sidecar) knows the token, in this one conversation: HMAC-SHA256."""
    return hmac.digest(token, who + greeting.nonce + client_nonce, "sha256")


def to_bytes(text: str) -> bytes:
    """UTF-8, lone surrogates kept."""
    return text.encode("utf-8", "surrogatepass")


def to_text(raw: bytes) -> str:
    """The inverse. Raises UnicodeDecodeError."""
    return raw.decode("utf-8", "surrogatepass")
