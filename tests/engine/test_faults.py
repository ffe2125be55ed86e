"""The faults of an inference host, on the real engine, one after the other: in the end every request has one event.

Broker away, clock jumping, disk full, engine killed with 40 requests in flight, server killed, server crashed. Every
prompt holds a canary: it is in nothing that the host writes, and a crash leaves no dump that could hold it.
"""

import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from collector.event import AuditEvent, decode
from collector.signing import create_signing_key
from collector.trust import TrustedKeys
from collector.verification import Verification
from tests.conftest import ROOT, RunningBroker
from tests.engine.conftest import Site, make_site
from tests.engine.serving import Process
from tests.engine.test_process import CANARY, REQUEST_ID, journalled, stream

IN_FLIGHT = 40
HOURS_2_NS = 7_200_000_000_000
CLOCK = """\
import pathlib, sys, time
if __name__ == "__main__":  # the engine's own processes run this file too
    real_ns = time.time_ns
    file = pathlib.Path(sys.argv.pop(1))
    time.time_ns = lambda: real_ns() + int(file.read_text() or 0)
    from inferwatch.cli import main
    main()
"""
"""`inferwatch` under a clock that is as wrong as a file says."""

pytestmark = pytest.mark.soak


@pytest.fixture
def away(tmp_path: Path) -> Iterator[RunningBroker]:
    """A broker of this test's own, that may be killed."""
    broker = RunningBroker(tmp_path / "kafka")
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("a small file system can't be mounted here: that needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[[Site], Process]]:
    """Starts a server whose clock is wrong by what the file `wrong` says; whatever still runs at the end is killed."""
    started: list[Process] = []
    program = tmp_path / "clocked.py"
    program.write_text(CLOCK)
    (tmp_path / "wrong").write_text("0")

    def begin(site: Site) -> Process:
        entry = [str(program), str(tmp_path / "wrong")]
        started.append(Process(site, model, entry=entry))
        started[-1].wait_ready(600)
        return started[-1]

    yield begin
    for process in started:
        process.kill()


@dataclass
class Story:
    """One host, and what was asked of it so far."""

    site: Site
    away: RunningBroker
    disk: Path
    wrong: Path
    start: Callable[[Site], Process]
    process: Process
    answered: int = 0

    def ask(self, **fields: Any) -> int:
        """The status of one short answer; 0 where there was none."""
        status = 0
        with self.process.client() as client, suppress(httpx.HTTPError):
            body = {**stream(4), "stream": False, **fields}
            status = client.post("/v1/chat/completions", json=body).status_code
        self.answered += status == 200
        return status

    def events(self) -> list[AuditEvent]:
        """All but those of self-tests; none of them twice."""
        events = [event for event in self.site.events() if event.operation != "selftest"]
        assert [i for i, n in Counter(event.http_request_id for event in events).items() if n > 1] == []
        return events

    def wait_for(self, count: int) -> list[AuditEvent]:
        """All events, once there are so many."""
        until(lambda: len(self.events()) >= count, f"there are not {count} events")
        return self.events()

    def journalled(self) -> set[str]:
        """The ids of the requests that the journal knows."""
        return {match.decode() for match in REQUEST_ID.findall(journalled(self.site))}

    def in_flight(self) -> tuple[set[str], list[threading.Thread]]:
        """40 requests begun at once that the stopped engine will not answer: their ids, and who waits for them."""
        known = self.journalled()
        self.process.freeze_engine()
        threads = [threading.Thread(target=self.ask, kwargs={"max_tokens": 200}, daemon=True) for _ in range(IN_FLIGHT)]
        for thread in threads:
            thread.start()
        until(lambda: len(self.journalled() - known) == IN_FLIGHT, "40 requests did not begin")
        return self.journalled() - known, threads

    def ends(self, ids: set[str]) -> dict[str, str]:
        """The status of each of these requests, once all have their event."""
        until(lambda: ids <= {event.http_request_id for event in self.events()}, "requests have no event")
        return {event.http_request_id: event.status for event in self.events() if event.http_request_id in ids}


def until(true: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Waits; fails with `what`."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def broker_away(story: Story) -> None:
    """Kafka is away: requests go on, their events wait on disk."""
    story.away.kill9()
    assert [story.ask() for _ in range(3)] == [200, 200, 200]
    story.away.start()
    story.wait_for(story.answered)


def clock_jumps(story: Story) -> None:
    """Two hours back and four forward: time in the lanes never goes back, and no latency is the clock's."""
    for wrong_ns in (-HOURS_2_NS, HOURS_2_NS, 0):
        story.wrong.write_text(str(wrong_ns))
        assert story.ask() == 200
    assert all(0 <= event.latency_ms < 600_000 for event in story.wait_for(story.answered))
    for partition in story.site.logs().values():
        times = [decode(raw).timestamp for raw, _, _ in partition]
        assert times == sorted(times)


def disk_full(story: Story) -> None:
    """Requests are refused, none is answered unaudited; with room again they are answered."""
    ballast = story.disk / "ballast"
    with suppress(OSError), ballast.open("wb") as out:
        while True:
            out.write(bytes(65536))
            out.flush()
    assert [story.ask() for _ in range(40)][-1] == 503
    ballast.unlink()
    until(lambda: story.ask() == 200, "with room again nothing was answered")
    until(lambda: sum(e.status == "ok" for e in story.events()) == story.answered, "events of answers are missing")


def engine_killed(story: Story) -> None:
    """40 requests in flight: an event each, `ok` only where an answer came; vLLM ends the server of a dead engine."""
    answered = story.answered
    ids, threads = story.in_flight()
    story.process.kill_engine()
    for thread in threads:
        thread.join(60)
    story.process.process.wait(60)
    story.process = story.start(story.site)
    ends = Counter(story.ends(ids).values())
    assert ends.pop("ok", 0) == story.answered - answered  # what the engine had sent before it was stopped
    assert ends.keys() <= {"error", "aborted", "lost"}


def server_crashed(story: Story) -> None:
    """A crash that would dump its memory: no dump, and what was in flight is `lost`."""
    ids, _ = story.in_flight()
    story.process.process.send_signal(signal.SIGSEGV)
    assert story.process.process.wait(60) == -signal.SIGSEGV
    story.process.kill()
    story.process = story.start(story.site)
    assert story.ends(ids) == dict.fromkeys(ids, "lost")
    assert [file for place in (ROOT, story.site.folder) for file in place.glob("core*") if file.is_file()] == []


def test_after_every_fault_each_request_has_one_event_and_no_text_is_left(
    away: RunningBroker, disk: Path, tmp_path: Path, start: Callable[[Site], Process]
) -> None:
    """One story in one test, since each start of a real server takes half a minute."""
    folder = tmp_path / "site"
    folder.mkdir()
    signer = create_signing_key(folder / "signing.key")
    site = make_site(folder, away.bootstrap, f'[collector.evidence]\nsigning_key_file = "{folder}/signing.key"')
    site.config_file.write_text(site.config_file.read_text().replace(f"{folder}/journal", f"{disk}/journal"))
    (folder / "journal").symlink_to(disk / "journal")
    story = Story(site, away, disk, tmp_path / "wrong", start, start(site))
    assert story.ask() == 200
    for fault in (broker_away, clock_jumps, disk_full, engine_killed, server_crashed):
        fault(story)

    seen = journalled(site)
    with story.process.client() as client:
        seen += client.get("/metrics").content
    story.process.process.send_signal(signal.SIGTERM)
    assert story.process.process.wait(60) == 0
    seen += journalled(site) + site.raw_topics() + story.process.log.read_bytes()
    assert CANARY.encode() not in seen
    verification = Verification(TrustedKeys([signer.public_key]))
    for partition, records in site.logs().items():
        verification.feed(partition, [raw for raw, _, _ in records], range(len(records)))
    report = verification.report()
    assert (report.problems, report.verdict) == ([], "sound")
