"""What people tell the lifecycle: acknowledge, false positive, suppress, maintenance, change, revoke; each one signed.

Two kinds command nothing: that somebody looked a prompt up, and that a key was destroyed. They are kept with the rest,
so that there is one signed record of what people did.

On the wire a command is `{"payload": TEXT, "signature": BASE64}`: TEXT is the command as JSON, signed as it stands
(Ed25519, RFC 8032) by the operator it names. Refused, and never applied: what is unsigned or badly signed, an unknown
operator, a time too far from when the broker took it, an end that is past or too far off. Unknown fields are refused
too: one that narrows a suppression must not be passed over.

Pure: the broker's append time is the clock, so a replay decides alike. What was refused is never quoted.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Final, TypeAlias

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta, Struct

from detectors.config import CommandsConfig
from detectors.finding import Entity, Severity
from detectors.time import SECOND_US

COMMAND_BYTES_MAX: Final = 16 * 1024
_DOMAIN: Final = b"inferwatch command 1\n"
"""Signed before the text, so that no other signature of the same key can pass for a command's."""
_MOMENT_MAX: Final = 253_402_300_799 * SECOND_US

Text = Annotated[str, Meta(min_length=1, max_length=500)]
Name = Annotated[str, Meta(max_length=1024)]
Moment = Annotated[int, Meta(ge=0, le=_MOMENT_MAX)]
"""Microseconds since the epoch, UTC."""
Epoch = Annotated[str, Meta(pattern="^e_[0-9a-f]{8}$")]
Uid = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]


class _Head(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="kind"):
    id: Annotated[str, Meta(pattern="^[0-9a-f-]{32,36}$")]
    tenant: Annotated[str, Meta(min_length=1, max_length=1024)]
    by: Annotated[str, Meta(min_length=1, max_length=64)]
    at_us: Moment
    reason: Text


class Acknowledge(_Head, frozen=True, kw_only=True, tag="acknowledge"):
    """Somebody sees to this finding: it is told again when it gets worse than `severity`."""

    uid: Uid
    severity: Severity
    """As the operator saw it."""


class FalsePositive(_Head, frozen=True, kw_only=True, tag="false_positive"):
    """As `Acknowledge`, and counted against the detector's budget."""

    uid: Uid
    severity: Severity


class Suppress(_Head, frozen=True, kw_only=True, tag="suppress"):
    """Holds back what one detector says of one entity, up to `severity`, until it ends."""

    detector: Annotated[str, Meta(min_length=1, max_length=256)]
    entity: Entity
    severity: Severity
    until_us: Moment
    known: Annotated[list[Name], Meta(max_length=64)] = []
    """Who was behind it when the operator looked, where the entity stands for many."""


class Maintenance(_Head, frozen=True, kw_only=True, tag="maintenance"):
    """Holds back what is said of a tenant, or of one model or by one detector of it, up to severity high."""

    from_us: Moment
    until_us: Moment
    model: Name = ""
    detector: Name = ""


class Change(_Head, frozen=True, kw_only=True, tag="change"):
    """A planned change, at `from_us`: findings that open after it name it."""

    from_us: Moment
    model: Name = ""


class Revoke(_Head, frozen=True, kw_only=True, tag="revoke"):
    """Ends an earlier command."""

    command: Annotated[str, Meta(pattern="^[0-9a-f-]{32,36}$")]


class Lookup(_Head, frozen=True, kw_only=True, tag="lookup"):
    """Somebody asked whether a text was seen, and was told so many events."""

    digest: Annotated[str, Meta(pattern="^hmac:[0-9a-f]{64}$")]
    """Of the text, under the newest key."""
    epochs: Annotated[list[Epoch], Meta(min_length=1, max_length=1_000)]
    exact: Annotated[int, Meta(ge=0, le=2**53)]
    similar: Annotated[int, Meta(ge=0, le=2**53)]


class Shred(_Head, frozen=True, kw_only=True, tag="shred"):
    """Somebody destroys the key of an epoch of the tenant."""

    epoch: Epoch


AnyCommand: TypeAlias = Acknowledge | FalsePositive | Suppress | Maintenance | Change | Revoke | Lookup | Shred


class _Signed(Struct, frozen=True, forbid_unknown_fields=True):
    payload: str
    signature: str


class BadCommand(ValueError):
    """The command is refused; the message says why and never quotes it."""


def sign(command: AnyCommand, key: Ed25519PrivateKey) -> bytes:
    """The record for iw.commands."""
    payload = _encoder.encode(command)
    signature = base64.b64encode(key.sign(_DOMAIN + payload)).decode()
    return _encoder.encode(_Signed(payload.decode(), signature))


def public_keys(config: CommandsConfig) -> dict[str, Ed25519PublicKey]:
    """Operator to key."""
    return {name: Ed25519PublicKey.from_public_bytes(base64.b64decode(key)) for name, key in config.operators.items()}


def verify(raw: bytes, append_ms: int, keys: Mapping[str, Ed25519PublicKey], config: CommandsConfig) -> AnyCommand:
    """The command in a record that the broker took at `append_ms`. Raises `BadCommand`."""
    if not 0 < len(raw) <= COMMAND_BYTES_MAX:
        raise BadCommand(f"a command has 1 to {COMMAND_BYTES_MAX} bytes")
    try:
        signed = _envelope.decode(raw)
        command = _decoder.decode(signed.payload)
        signature = base64.b64decode(signed.signature, validate=True)
    except (msgspec.DecodeError, UnicodeError, binascii.Error, RecursionError) as error:
        raise BadCommand(f"no signed command: {type(error).__name__}") from None
    key = keys.get(command.by)
    if key is None:
        raise BadCommand("its operator is not in detect.commands.operators")
    try:
        key.verify(signature, _DOMAIN + signed.payload.encode())
    except InvalidSignature:
        raise BadCommand("its signature is not that of its operator") from None
    _check_times(command, append_ms * 1000, config)
    if not command.reason.isprintable():
        raise BadCommand("its reason is not one line of printable characters")
    return command


def _check_times(command: AnyCommand, append_us: int, config: CommandsConfig) -> None:
    if command.at_us < append_us - config.age_max_s * SECOND_US:
        raise BadCommand(f"it was signed more than {config.age_max_s} s before Kafka took it")
    if command.at_us > append_us + config.ahead_max_s * SECOND_US:
        raise BadCommand(f"it was signed more than {config.ahead_max_s} s after Kafka took it: look at the clocks")
    if isinstance(command, Suppress | Maintenance):
        begin_us = command.at_us if isinstance(command, Suppress) else command.from_us
        limit_s = config.suppress_max_s if isinstance(command, Suppress) else config.maintenance_max_s
        if command.until_us <= max(begin_us, command.at_us):
            raise BadCommand("it ends before it begins")
        if command.until_us > begin_us + limit_s * SECOND_US:
            raise BadCommand(f"it lasts longer than the {limit_s} s allowed")
    if isinstance(command, Maintenance | Change) and command.from_us > append_us + config.ahead_plan_max_s * SECOND_US:
        raise BadCommand(f"it begins more than {config.ahead_plan_max_s} s ahead")


_encoder: Final = msgspec.json.Encoder()
_envelope: Final = msgspec.json.Decoder(_Signed)
_decoder: Final[msgspec.json.Decoder[AnyCommand]] = msgspec.json.Decoder(AnyCommand)
