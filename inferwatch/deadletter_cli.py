"""`inferwatch deadletter`: look at the records that could not be used, and send again what can be used by now."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from inferwatch.config import Config, load
from inferwatch.options import ConfigOption, JsonOption

if TYPE_CHECKING:  # each command loads its own room
    from streams.deadletter import Letter
    from streams.letters import Found, Outcome

app = typer.Typer(no_args_is_help=True, help=__doc__)

ReasonOption = Annotated[str, typer.Option(help="Only letters whose reason holds this, in any case.")]
TopicOption = Annotated[str, typer.Option(help="Only letters from this topic: events, iw.events, …")]
LimitOption = Annotated[int, typer.Option(min=1, max=1000, help="At most so many letters, the newest.")]


@app.command("list")
def show_all(
    reason: ReasonOption = "",
    topic: TopicOption = "",
    limit: LimitOption = 50,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, newest first: the place, who could not use it and why, its size, and whether it was replayed.

    Example: inferwatch deadletter list --reason "schema version" --limit 20
    """
    settings = load(config)
    found = asyncio.run(_find(settings, _filter(settings, reason, topic), limit))
    if as_json:
        typer.echo(orjson.dumps([_told(one) for one in found]).decode())
        return
    for one in found:
        told = one.letter
        head = f"{told.place}  {one.written}  {told.by}  {told.size_bytes} bytes  {one.state}"
        typer.echo(f"{_plain(head)}\n    {_plain(told.reason)}")
    if not found:
        typer.echo("No dead letters.")


@app.command()
def show(
    place: Annotated[str, typer.Argument(help="TOPIC-PARTITION-OFFSET, as the list shows it.")],
    out: Annotated[Path | None, typer.Option(help="Write the record's bytes there, readable by you alone.")] = None,
    config: ConfigOption = None,
) -> None:
    """Show all that is known of one letter. Its bytes may hold text: they go to a file and nowhere else.

    Example: inferwatch deadletter show iw.events-2-4711 --out record.json
    """
    settings = load(config)
    asyncio.run(_show(settings, place, out))


@app.command()
def replay(
    places: Annotated[list[str] | None, typer.Argument(help="TOPIC-PARTITION-OFFSET, as the list shows it.")] = None,
    reason: ReasonOption = "",
    topic: TopicOption = "",
    limit: LimitOption = 50,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also what was replayed before.")] = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Append records to their partitions again, where they can be used by now, for instance after an update.

    The record is read from its place, or unsealed; it is decoded, and sent only if that succeeds. It comes after its
    time, and the time rules treat it so. An event whose lane went on is a duplicate to them, one whose second is
    closed is late: both are stored with that mark and can be searched and counted, but no detector sees them. A
    finding goes to every sink again. A record over 64 KiB that its topic no longer keeps can't be replayed.

    Exit status 1 where a letter could not be replayed.

    Example: inferwatch deadletter replay --reason "schema version 2" --dry-run
    """
    if not (places or reason or topic):
        raise typer.BadParameter("name places, or choose by --reason or --topic")
    settings = load(config)
    outcomes = asyncio.run(
        _replay(settings, set(places or ()), _filter(settings, reason, topic), limit, dry_run=dry_run, again=again)
    )
    if as_json:
        typer.echo(orjson.dumps([outcome._asdict() for outcome in outcomes]).decode())
    else:
        for outcome in outcomes:
            head = f"sent again at offset {outcome.to_offset}" if outcome.done else "not sent"
            typer.echo(_plain(f"{outcome.place}: {head}: {outcome.effect}"))
    raise typer.Exit(0 if dry_run or all(outcome.done for outcome in outcomes) else 1)


def _plain(said: str) -> str:
    """A letter may be anybody's who can write to the topic: what a terminal would obey is left out."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in said)


def _filter(config: Config, reason: str, topic: str) -> "Callable[[Letter], bool]":
    full = (
        topic
        if not topic or topic.startswith(f"{config.kafka.topic_prefix}.")
        else f"{config.kafka.topic_prefix}.{topic}"
    )

    def wanted(told: "Letter") -> bool:
        return full in ("", told.topic) and reason.lower() in told.reason.lower()

    return wanted


async def _find(config: Config, wanted: "Callable[[Letter], bool]", limit: int) -> "list[Found]":
    from collector.kafka import wait_for_broker  # noqa: PLC0415
    from streams.letters import find  # noqa: PLC0415

    await wait_for_broker(config.kafka)
    return await find(config.kafka, wanted, limit)


def _told(one: "Found") -> dict[str, object]:
    told = one.letter
    return {
        "place": told.place,
        "topic": told.topic,
        "partition": told.partition,
        "offset": told.offset,
        "appended": told.appended,
        "written": one.written,
        "by": told.by,
        "reason": told.reason,
        "size_bytes": told.size_bytes,
        "sealed": bool(told.sealed),
        "truncated": told.truncated,
        "state": one.state,
        "replayed_to": [note.to_offset for note in one.notes if note.replay == "done"],
    }


async def _show(config: Config, place: str, out: Path | None) -> None:
    from streams.deadletter import Unusable, letter_seal  # noqa: PLC0415
    from streams.letters import content, usable  # noqa: PLC0415

    found = await _find(config, lambda told: told.place == place, 10)
    if not found:
        raise ValueError(f"there is no dead letter for {place}")
    for one in found:
        said = _told(one)
        try:
            _, raw = await content(config.kafka, one.letter, letter_seal(config.kafka))
            said["content"] = "there"
            if out is not None:
                _write_private(out, raw)
            usable(config.kafka, one.letter, raw)
            said["usable_now"] = True
        except Unusable as error:
            said.setdefault("content", str(error))
            said["usable_now"] = False
            said["why"] = str(error)
        typer.echo(orjson.dumps(said, option=orjson.OPT_INDENT_2).decode())


def _write_private(file: Path, raw: bytes) -> None:
    with open(file, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
        out.write(raw)


async def _replay(
    config: Config, asked: set[str], chosen: "Callable[[Letter], bool]", limit: int, *, dry_run: bool, again: bool
) -> "list[Outcome]":
    from streams.letters import replay as send_again  # noqa: PLC0415

    found = await _find(config, lambda told: chosen(told) and (not asked or told.place in asked), limit)
    missing = asked - {one.letter.place for one in found}
    if missing:
        raise ValueError(f"there is no dead letter for {', '.join(sorted(missing))}")
    once = list({one.letter.place: one for one in reversed(found)}.values())  # oldest first, each place once
    return await send_again(config.kafka, once, dry_run=dry_run, again=again)
