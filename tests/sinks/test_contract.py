"""What every sink must do, run over all that the configuration knows: a new one is picked up by its name."""

import asyncio
import inspect
import json
import re
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sinks.config import SinksConfig
from sinks.registry import build_sink, build_sinks
from tests.sinks.receivers import SECRETS, arrived, hook_server, syslog_server
from tests.sinks.samples import HOSTILE, delivery_of, finding, hostile

_SYSLOG_IDS = re.compile(rb'\[finding@1 uid="([^"]*)" revision="([0-9]+)"\]')
NAMES = [name for name in SinksConfig.model_fields if name != "delivery"]


@asynccontextmanager
async def serving(name: str, folder: Path):
    """The `[sinks]` table for one sink, and a function that gives UID.REVISION of what has arrived."""
    if name == "file":
        path = folder / "findings.jsonl"
        yield (
            {"path": str(path)},
            lambda: [json.loads(line)["metadata"]["uid"] for line in path.read_bytes().splitlines()],
        )
    elif name == "webhook":
        files = []
        for number, secret in enumerate(SECRETS):
            (folder / f"secret-{number}").write_text(secret)
            files.append(str(folder / f"secret-{number}"))
        async with hook_server() as hook:
            yield {"url": hook.url, "secret_files": files}, lambda: [message_id for message_id, _ in hook.messages]
    else:
        async with syslog_server() as server:
            table = {"host": "127.0.0.1", "port": server.port, "tls": False, "enterprise_number": 1}
            yield table, lambda: [_syslog_id(message) for message in server.messages]


def _syslog_id(message: bytes) -> str:
    match = _SYSLOG_IDS.search(message)
    assert match is not None
    return f"{match[1].decode()}.{match[2].decode()}"


@pytest.mark.parametrize("name", NAMES)
async def test_a_sink_delivers_in_order_and_once(name, tmp_path):
    """Open, update and close of several findings arrive in order; what is given twice arrives once."""
    findings = [finding(uid, revision) for revision in (1, 2, 3) for uid in ("a", "b")]
    async with serving(name, tmp_path) as (table, given):
        sink = build_sink(SinksConfig(**{name: table}), name)
        letters = []
        made = delivery_of(sink, letters)
        await made.deliver(findings)
        await made.deliver(findings)
        assert await arrived(given, 6) == ["a.1", "b.1", "a.2", "b.2", "a.3", "b.3"]
        assert (letters, made.totals) == (
            [],
            {"delivered": 6, "retried": 0, "refused": 0, "skipped": 6, "quiet": 0, "joined": 0},
        )
        await made.close()
        await made.close()
    assert sink.name == name
    assert sink.batch_max >= 1


@pytest.mark.parametrize("name", NAMES)
async def test_a_sink_takes_hostile_values(name, tmp_path):
    """No value makes a sink refuse, break or hold up the finding after it."""
    async with serving(name, tmp_path) as (table, given):
        letters = []
        made = delivery_of(build_sink(SinksConfig(**{name: table}), name), letters)
        evil = [hostile(value) for value in HOSTILE.values()]
        await made.deliver(
            [*(type(found)(**{**_fields(found), "uid": f"e{n}"}) for n, found in enumerate(evil)), finding("z")]
        )
        assert (await arrived(given, len(evil) + 1))[-1] == "z.1"
        assert letters == []
        await made.close()


def _fields(found):
    return {name: getattr(found, name) for name in found.__struct_fields__}


@pytest.mark.parametrize("name", NAMES)
def test_a_sink_says_what_it_guarantees(name):
    """Its file begins with what it is for and states its delivery guarantee; every setting is described."""
    sink = build_module(name)
    assert "Guarantee" in (sink.__doc__ or "")
    assert inspect.signature(sink.build).return_annotation.lower().endswith("sink")
    table = SinksConfig.model_fields[name].annotation.__args__[0]
    assert [field for field, info in table.model_fields.items() if not info.description] == []


def build_module(name):
    from importlib import import_module

    return import_module(f"sinks.{name}")


async def test_a_dead_sink_holds_up_nobody_else(tmp_path):
    """The file gets its findings while the webhook beside it is away, and the webhook its own once it is back."""
    async with serving("webhook", tmp_path) as (table, given), serving("file", tmp_path) as (file_table, lines):
        config = SinksConfig(webhook=table, file=file_table)
        sinks = {sink.name: sink for sink in build_sinks(config)}
        assert list(sinks) == ["file", "webhook"]
        down = asyncio.Event()
        send = sinks["webhook"].send

        async def send_when_up(findings):
            if not down.is_set():
                raise ConnectionRefusedError("away")
            await send(findings)

        sinks["webhook"].send = send_when_up
        letters = []
        deliveries = {name: delivery_of(sink, letters) for name, sink in sinks.items()}
        waiting = asyncio.create_task(deliveries["webhook"].deliver([finding("a"), finding("b")]))
        await deliveries["file"].deliver([finding("a"), finding("b")])
        assert (lines(), given(), waiting.done()) == (["a.1", "b.1"], [], False)
        assert deliveries["webhook"].why == "ConnectionRefusedError: away"
        down.set()
        await waiting
        assert (given(), letters) == (["a.1", "b.1"], [])
        for made in deliveries.values():
            await made.close()
