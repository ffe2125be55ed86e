"""`inferwatch record`: what people did, as they signed it: commands, look-ups of prompts, destroyed keys."""

import asyncio
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from inferwatch.config import Config, load
from inferwatch.options import ConfigOption, JsonOption

if TYPE_CHECKING:  # the command loads its own room
    from detectors.commands import AnyCommand


_TOLD = ("kind", "id", "tenant", "by", "at_us", "reason")


def record(
    kind: Annotated[str, typer.Option(help="Only these: lookup, shred, suppress, …")] = "",
    tenant: Annotated[str, typer.Option(help="Only of this tenant.")] = "",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what people did, oldest first: who, when, why. What is not signed by a known operator is only counted.

    Example: inferwatch record --kind lookup
    """
    from collector.event import from_timestamp_us  # noqa: PLC0415

    done, refused = asyncio.run(signed(load(config)))
    wanted = [each for each in done if kind in ("", _kind(each)) and tenant in ("", each.tenant)]
    for each in wanted:
        if as_json:
            typer.echo(msgspec.json.encode(each).decode())
            continue
        more = msgspec.to_builtins(each)
        said = ", ".join(
            f"{k} {v}" for k, v in more.items() if k not in ("kind", "id", "tenant", "by", "at_us", "reason")
        )
        at = from_timestamp_us(each.at_us).isoformat(timespec="seconds")
        plain = f"{at}  {_kind(each)}  {each.tenant}  {each.by}: {each.reason}  ({said})"
        typer.echo(
            "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in plain)
        )
    if refused:
        typer.echo(f"{refused} records are not signed by an operator of this configuration.", err=True)


async def signed(config: Config) -> "tuple[list[AnyCommand], int]":
    """The commands on iw.commands by time of signing, each once, and how many records are none. Raises BrokerAway."""
    from collector.kafka import ensure_topics, read_topic, wait_for_broker  # noqa: PLC0415
    from detectors.commands import BadCommand, public_keys, verify  # noqa: PLC0415

    await wait_for_broker(config.kafka, config.streams.broker_timeout_s)
    await ensure_topics(config.kafka)
    settings = config.detect.commands
    keys, done, refused = public_keys(settings), dict[bytes, "AnyCommand"](), 0
    async for message in read_topic(config.kafka, "commands"):
        try:
            command = verify(message.value or b"", message.timestamp, keys, settings)
            done[msgspec.json.encode(command)] = command  # whoever can write to the topic can write it again
        except BadCommand:
            refused += 1
    return sorted(done.values(), key=lambda each: (each.at_us, each.id)), refused


def _kind(command: "AnyCommand") -> str:
    return str(command.__struct_config__.tag)
