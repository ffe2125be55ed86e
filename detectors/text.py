"""What detectors ask of an event in words, read again from its bytes when it is asked for.

The bytes were checked when they were decoded first (`collector.event`), so nothing is checked here, and what no
detector asks for is passed over: that takes less than half of the time.
"""

from typing import Final

import msgspec
from msgspec import Struct


class Verdict(Struct, gc=False):
    """What a guard said."""

    decision: str
    score: float = 0.0


class Text(Struct, gc=False):
    """An audit event without its numbers. Memory: about 1.5 KB, as long as its chunk is judged."""

    event_id: str
    tenant: str
    session_id: str
    user_id: str
    prompt_hash: str
    model_version: str
    guardrail_results: list[Verdict]
    blocked: bool
    finish_reason: str = ""
    api_key: str = ""
    client_address: str = ""
    turn_hash: str = ""
    minhash: str = ""


class _Id(Struct, gc=False):
    event_id: str


class _Actor(Struct, gc=False):
    user_id: str
    api_key: str = ""
    client_address: str = ""


def text_of(raw: bytes) -> Text:
    """Of an audit event or a rejection."""
    return _decoder.decode(raw)


def event_id_of(raw: bytes) -> str:
    """The id alone, in a third of that time."""
    return _id_decoder.decode(raw).event_id


def actor_of(raw: bytes) -> str:
    """Who sent it, as `detectors.detector.actor` says, likewise."""
    event = _actor_decoder.decode(raw)
    return event.user_id or event.api_key or event.client_address


_decoder: Final = msgspec.json.Decoder(Text)
_actor_decoder: Final = msgspec.json.Decoder(_Actor)
_id_decoder: Final = msgspec.json.Decoder(_Id)
