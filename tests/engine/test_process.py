"""`inferwatch serve` as a real process: killed, restarted, stopped. Nothing begun is lost."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from collector.event import Goodbye, Hello, Rejection
from tests.engine.conftest import MODEL, Site, make_site
from tests.engine.serving import Process

CANARY = "canaryq7x9"
IN_FLIGHT = 6
REQUEST_ID = re.compile(rb'"http_request_id":"([0-9a-f-]{36})"')


@pytest.fixture(scope="module")
def site(broker: Any, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Keys, configuration and journal that outlive the processes of this file."""
    return make_site(tmp_path_factory.mktemp("process"), broker.bootstrap)


@pytest.fixture(scope="module")
def start(site: Site, model: Path) -> Iterator[Callable[[], Process]]:
    """Starts a server; whatever still runs at the end is killed."""
    started: list[Process] = []

    def begin() -> Process:
        started.append(Process(site, model))
        started[-1].wait_ready()
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def stream(max_tokens: int, text: str = CANARY) -> dict[str, Any]:
    """The body of a stream that lasts."""
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


def journalled(site: Site) -> bytes:
    """What lies in the journals now."""
    return b"".join(file.read_bytes() for file in (site.folder / "journal").rglob("*") if file.is_file())


def in_flight(process: Process, done: set[str]) -> set[str]:
    """Sends requests and returns the ids of those that were begun and are not `done`: their answers never come.

    The ids are read from the journal: a held stream shows its headers only with its end.
    """

    def ask() -> None:
        with process.client() as client, suppress(httpx.HTTPError):
            client.post("/v1/chat/completions", json=stream(200))

    process.freeze_engine()
    for _ in range(IN_FLIGHT):
        threading.Thread(target=ask, daemon=True).start()
    end = time.monotonic() + 30
    ids: set[str] = set()
    while len(ids) < IN_FLIGHT and time.monotonic() < end:
        time.sleep(0.05)
        ids = {match.decode() for match in REQUEST_ID.findall(journalled(process.site))} - done
    return ids


def wait_for(site: Site, ids: set[str], timeout_s: float = 30) -> dict[str, str]:
    """Status by request id, once all of them have an event."""
    end = time.monotonic() + timeout_s
    while True:
        found = {e.http_request_id: e.status for e in site.events() if e.http_request_id in ids}
        if found.keys() == ids or time.monotonic() > end:
            return found
        time.sleep(0.2)


def test_nothing_begun_is_lost_and_no_text_leaves(site: Site, start: Callable[[], Process]) -> None:
    """Requests before a SIGKILL keep their events, those in flight become `lost`, a stop drains and says goodbye.

    One story in one test, since each start of a real server takes half a minute. Every prompt holds a canary; at the
    end it is in no topic, journal, log or metric.
    """
    first = start()
    limits = Path(f"/proc/{first.process.pid}/limits").read_text()
    assert re.search(r"Max core file size +0 ", limits), "a crash dump would hold prompts"
    seen = b""
    with first.client() as client:
        answered = client.post("/v1/chat/completions", json={**stream(4), "stream": False})
        refused = client.post("/v1/chat/completions", json={**stream(4), "max_tokens": -1})
        seen += client.get("/metrics").content
    assert (answered.status_code, refused.status_code) == (200, 400)
    ids = in_flight(first, {answer.headers["inferwatch-request-id"] for answer in (answered, refused)})
    first.kill()
    journal = journalled(site)
    assert len(ids) == IN_FLIGHT
    assert b"inference" in journal
    seen += journal

    second = start()
    assert wait_for(site, ids) == dict.fromkeys(ids, "lost")
    others = [e for e in site.events() if e.http_request_id not in ids and e.operation != "selftest"]
    before = {e.http_request_id: (e.status, e.blocked) for e in others}
    assert before == {
        answered.headers["inferwatch-request-id"]: ("ok", False),
        refused.headers["inferwatch-request-id"]: ("rejected", False),
    }

    texts: list[str] = []

    def ask() -> None:
        with second.client() as client:
            texts.append(client.post("/v1/chat/completions", json=stream(200)).text)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(1)
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(60) == 0
    asking.join(10)
    assert texts
    assert texts[0].rstrip().endswith("[DONE]")

    records = site.records()
    boots = [record.boot for record in records if isinstance(record, Hello)]
    ends = {record.boot: record.reason for record in records if isinstance(record, Goodbye)}
    assert sorted(ends.values()) == ["recovered", "stopped"]
    assert ends.keys() == set(boots)
    left = [file for file in (site.folder / "journal").rglob("*") if file.is_file() and file.stat().st_size]
    assert [file.name for file in left] == ["ended.json"]  # where the boots ended, for the next one's checkpoint
    seen += left[0].read_bytes()
    assert sum(isinstance(record, Rejection) for record in records) == 1
    seen += site.raw_topics() + first.log.read_bytes()
    assert CANARY.encode() not in seen
    assert site.api_key.encode() not in seen
