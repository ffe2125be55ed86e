"""`inferwatch lookup` and `keys shred` end to end: a real store behind its face, a real Kafka for the record."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from collector.epochs import epochs, rotate
from collector.identity import Pseudonyms, create_key_file, load_key
from collector.kafka import KafkaConfig, read_topic
from detectors.commands import AnyCommand, Lookup, Shred
from inferwatch.cli import app
from inferwatch.config import load
from inferwatch.operators import create_operator_key
from inferwatch.record_cli import signed
from sinks.clickhouse.face import Face
from sinks.clickhouse.store import open_store
from sinks.config import FaceConfig, StoreConfig
from streams.commands import send_command
from tests.sinks.samples import START, event, stored

TEXT = "Please summarise the attached quarterly report of the canary-4f7e department in two sentences."
LIKE = TEXT.replace("two", "three")
OTHER = "Write a poem about the sea and the wind over the dunes at night."


class Host:
    """An inference host with two epochs, a store with events of both, and a configuration that names all."""

    def __init__(self, folder: Path, kafka: KafkaConfig, port: int) -> None:
        self.folder, self.kafka = folder, kafka
        create_key_file(folder / "keys" / "default.key")
        create_key_file(folder / "keys" / "acme.key")
        self.epochs = rotate(folder / "keys", "default", now_s=0, age_min_s=-1e12)
        os.utime(folder / "keys" / "default.key", (0, 0))  # all collectors have long seen it
        self.names = [Pseudonyms(load_key(each.path)) for each in epochs(folder / "keys", "default")]
        self.acme = Pseudonyms(load_key(folder / "keys" / "acme.key"))
        _, self.public = create_operator_key(folder / "data" / "operators", "alice")
        (folder / "inferwatch.toml").write_text(
            f"""\
data_dir = "{folder}/data"
[kafka]
bootstrap_servers = "{kafka.bootstrap_servers}"
topic_prefix = "{kafka.topic_prefix}"
[collector.identity]
key_dir = "{folder}/keys"
epoch_overlap_s = 0
[store.face]
port = {port}
[detect.commands.operators]
alice = "{self.public}"
"""
        )

    def events(self) -> list[Any]:
        """What was asked: the text in both epochs, one like it, another, and the same of another tenant; and something
        with a MinHash that is none, as whoever can write to the topic may make it."""
        rows: list[tuple[str, Pseudonyms, str, str, bool]] = [
            ("default", self.names[0], TEXT, "bob", True),
            ("default", self.names[1], TEXT, "bob", False),
            ("default", self.names[1], TEXT, "carol", False),
            ("default", self.names[1], LIKE, "dora", False),
            ("default", self.names[1], OTHER, "dora", False),
            ("acme", self.acme, TEXT, "eve", False),
            ("default", self.names[1], "", "mallory", False),
        ]
        return [
            stored(
                event(
                    n,
                    tenant=tenant,
                    user_id=names.user(user),
                    blocked=blocked,
                    timestamp=START + timedelta(seconds=n),
                    prompt_hash=names.digest(f"<|user|>{text}"),
                    turn_hash=names.digest(text),
                    minhash=names.minhash(text) if text else "!!!",
                    key_epoch=names.epoch,
                ),
                n,
            )
            for n, (tenant, names, text, user, blocked) in enumerate(rows)
        ]

    def lookup(self, text: str | bytes, *options: str) -> Result:
        """The command, in this process, with the text on its standard input."""
        words = ["lookup", "--reason", "incident 7", "--config", str(self.folder / "inferwatch.toml"), *options]
        return CliRunner().invoke(app, words, input=text)

    def commands(self) -> list[AnyCommand]:
        """What `inferwatch record` shows."""
        done, refused = asyncio.run(signed(load(self.folder / "inferwatch.toml")))
        assert refused == 0
        return done


async def _messages(kafka: KafkaConfig) -> list[Any]:
    return [message async for message in read_topic(kafka, "commands")]


@pytest.fixture
def port(tmp_path: Path) -> Iterator[tuple[int, Any]]:
    """Of a store's face, served in a thread; and the store."""
    config = StoreConfig(url=str(tmp_path / "store"), face=FaceConfig(port=0))
    store = open_store(config)
    loop, ports, stop, up = asyncio.new_event_loop(), [0], asyncio.Event(), threading.Event()

    async def serve() -> None:
        async with Face(config) as face:
            ports[0] = int(face.url.rpartition(":")[2])
            up.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert up.wait(60)
    yield ports[0], store
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()
    store.close()


@pytest.fixture
def host(kafka_config: KafkaConfig, tmp_path: Path, port: tuple[int, Any]) -> Host:
    """The host, with what was asked in its store."""
    made = Host(tmp_path, kafka_config, port[0])
    port[1].insert_events(made.events(), token="t")
    return made


def _answer(result: Result) -> Any:
    """The last line is the answer; logs stand before it where the process has not set them aside."""
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.kafka
def test_a_text_and_texts_like_it_are_found_across_epochs_and_the_question_is_on_record(host: Host) -> None:
    """Counts, users and similarity by epoch; another tenant's events are not seen; the record is signed and exact."""
    answer = host.lookup(TEXT + "\n", "--json")
    assert answer.exit_code == 0, answer.exception
    found = _answer(answer)
    old, new = found["epochs"]
    assert (found["exact"], found["similar"], [old["epoch"], new["epoch"]]) == (3, 1, list(host.epochs))
    assert (old["exact"]["events"], old["exact"]["blocked"], old["similar"]) == (1, 1, [])
    assert (new["exact"]["events"], new["exact"]["users"]) == (2, 2)
    assert [(each["events"], each["similarity"] > 0.7, each["turn_hash"]) for each in new["similar"]] == [
        (1, True, host.names[1].digest(LIKE))
    ]
    (record,) = host.commands()
    assert record == Lookup(
        id=found["command"],
        tenant="default",
        by="alice",
        at_us=record.at_us,
        reason="incident 7",
        digest=host.names[1].digest(TEXT),
        epochs=list(host.epochs),
        exact=3,
        similar=1,
    )
    whole = host.lookup(f"<|user|>{TEXT}", "--json", "--similar", "1")
    assert _answer(whole)["exact"] == 3, "the engine's whole input is found too"
    nothing = host.lookup("something that nobody ever asked here")
    assert nothing.stdout.splitlines()[-1] == ("Neither this text nor one like it is among the events in the store.")
    assert [command.exact for command in host.commands() if isinstance(command, Lookup)] == [3, 3, 0]
    told = "".join(each.output for each in (answer, whole, nothing))
    assert "canary" not in told
    assert all(b"canary" not in message.value for message in asyncio.run(_messages(host.kafka)))


@pytest.mark.kafka
def test_after_shredding_nothing_of_the_epoch_is_found_and_that_is_on_record(host: Host) -> None:
    """The record is written before the key is touched; the other epoch answers as before."""
    words = ["keys", "shred", "default", host.epochs[0], "--reason", "13 months", "--yes"]
    done = CliRunner().invoke(app, [*words, "--config", str(host.folder / "inferwatch.toml")])
    assert done.exit_code == 0, done.exception
    assert [each.name for each in epochs(host.folder / "keys", "default")] == [host.epochs[1]]
    (record,) = host.commands()
    (message,) = asyncio.run(_messages(host.kafka))
    asyncio.run(send_command(host.kafka, "default", message.value))
    assert host.commands() == [record], "what somebody writes again was done once"
    assert isinstance(record, Shred)
    assert (record.epoch, record.by, record.reason) == (host.epochs[0], "alice", "13 months")
    config = ["--config", str(host.folder / "inferwatch.toml")]
    shown = CliRunner().invoke(app, ["record", "--kind", "shred", *config]).stdout.splitlines()[-1]
    assert shown.endswith(f"shred  default  alice: 13 months  (epoch {host.epochs[0]})")
    asyncio.run(send_command(host.kafka, "default", b'{"payload":"{}","signature":""}'))
    assert "1 records are not signed" in CliRunner().invoke(app, ["record", *config]).output
    found = _answer(host.lookup(TEXT, "--json"))
    assert (found["exact"], [each["epoch"] for each in found["epochs"]]) == (2, [host.epochs[1]])


def test_without_record_store_operator_or_text_there_is_no_answer(tmp_path: Path, port: tuple[int, Any]) -> None:
    """Each is one sentence without the text, and nothing is told: Kafka is away all the time here."""
    host = Host(tmp_path, KafkaConfig(bootstrap_servers="127.0.0.1:9"), port[0])
    port[1].insert_events(host.events(), token="t")
    file = host.folder / "inferwatch.toml"
    good = file.read_text() + "[streams]\nbroker_timeout_s = 0.2\n"

    def problem(config: str, text: str | bytes = TEXT, *options: str) -> str:
        file.write_text(config)
        answer = host.lookup(text, *options)
        assert answer.stdout == ""
        assert "canary" not in str(answer.exception)
        return str(answer.exception)

    assert "no Kafka at 127.0.0.1:9" in problem(good)
    assert "there is no text to look up" in problem(good, "\n")
    assert "is not UTF-8" in problem(good, b"canary \xff")
    assert "nobody.key: no such key file" in problem(good, TEXT, "--tenant", "nobody")
    assert "the configuration knows no operator alice" in problem(good.replace("alice =", "bob ="))
    away = problem(good.replace("port = ", "port = 1 # "))
    assert away == "the store at http://127.0.0.1:1 does not answer: ConnectionRefusedError"
    assert "give it a port" in problem(good.replace("port = ", "port = 0 # "))
    (tmp_path / "secret").write_text("wrong")
    locked = good.replace("[store.face]", f'[store.face]\npassword_file = "{tmp_path}/secret"')
    assert problem(locked).endswith("refused, with status 403 and ClickHouse's code 516")


def test_the_command_needs_nothing_that_an_engine_host_lacks() -> None:
    """Only the base install: no Faust, no ClickHouse or HTTP client, no vLLM."""
    missing = ("faust", "clickhouse_connect", "chdb", "aiohttp", "httpx", "standardwebhooks", "grafana_foundation_sdk")
    code = (
        f"import sys\nfor name in {missing!r}: sys.modules[name] = None\n"
        "import inferwatch.cli, inferwatch.lookup, inferwatch.lookup_cli, inferwatch.keys, inferwatch.keys_cli\n"
        "import collector.epochs, inferwatch.commands\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
