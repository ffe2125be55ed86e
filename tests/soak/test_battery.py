"""The crash battery: both stages on a real broker, real processes, real signals, round after round on one log.

Each round sends a minute of events while one thing goes wrong: workers are killed, join, leave, are killed while they
recover, are suspended beyond their session and go on as zombies; the broker is killed. After each round every user's
totals over the whole run are exact, and rollups and findings are those of undisturbed engines, byte for byte.

`INFERWATCH_SOAK_ROUNDS` says how many rounds (22: each fault twice; 11 in CI), `INFERWATCH_SOAK_SEED` in which order
and when. Every round prints its seed.
"""

import asyncio
import os
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from collector.event import Heartbeat, Hello, encode
from collector.kafka import BrokerAway, KafkaConfig, KafkaError, ensure_topics
from detectors.config import DetectConfig, LifecycleConfig, ProbingConfig
from tests.conftest import RunningBroker
from tests.soak.ledger import Ledger
from tests.streams import traffic
from tests.streams.traffic import SECOND_US, Collector
from tests.streams.worker import Worker, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.soak]

ROUNDS = int(os.environ.get("INFERWATCH_SOAK_ROUNDS", "22"))
SEED = int(os.environ.get("INFERWATCH_SOAK_SEED", "1"))
DETECT = DetectConfig(
    lifecycle=LifecycleConfig(quiet_s=20, update_s=5),
    probing=ProbingConfig(threshold=5.0, cold_extra=0, cold_clients_max=100),
)
"""Findings in every round: they open, change and close within a minute of events."""
SESSION_S = 2.0
ROUND_EVENTS_S = 60
CAUGHT_UP_S = 90


class Battery:
    """The processes, the collector and the books."""

    def __init__(self, broker: RunningBroker, folder: Path, seed: int) -> None:
        self.broker, self.seed = broker, seed
        self.kafka = KafkaConfig(bootstrap_servers=broker.bootstrap, topic_prefix=f"t{uuid.uuid4().hex[:10]}")
        self.chance = random.Random(seed)  # noqa: S311  # repeatable, no secret
        self.ledger = Ledger(self.kafka, DETECT)
        self.collector = Collector(4, boot=f"boot-{seed}", at_us=int((time.time() - 86_400) * 1e6))
        options = {"batch_records_max": 50, "tick_after_s": 300, "session_timeout_s": SESSION_S}
        self.one, self.other, self.two, self.another = (
            Worker(role, self.kafka, folder, name=name, detect=DETECT, **options)
            for role, name in (("stage1", "one"), ("stage1", "other"), ("stage2", "two"), ("stage2", "another"))
        )
        self.faults: dict[str, Callable[[], Awaitable[None]]] = {
            "stage 1 killed": lambda: self._killed(self.one),
            "stage 2 killed": lambda: self._killed(self.two),
            "both killed": self._both_killed,
            "killed as it joins": self._killed_joining,
            "joined, the first killed": self._taken_over,
            "joined and left": self._joined_and_left,
            "stage 1 a zombie": lambda: self._zombie(self.one, self.other),
            "stage 2 a zombie": lambda: self._zombie(self.two, self.another),
            "broker killed": self._broker_killed,
            "killed as it recovers": self._killed_recovering,
            "broker killed as one joins": self._broker_killed_joining,
        }

    async def start(self) -> None:
        """Topics, one worker of each stage, and the first records."""
        await ensure_topics(self.kafka)
        await self._send([(key, encode(record), p) for key, record, p in self.collector.control(Hello)])
        self.one.start()
        self.two.start()
        await self._until(lambda: self.one.metric("ready") == self.two.metric("ready") == 1, "both stages are ready")

    async def round(self, fault: str) -> list[str]:
        """One fault under load; what is wrong afterwards."""
        sending = asyncio.create_task(self._traffic())
        await self._pause(0.1, 1.5)
        await self.faults[fault]()
        await sending
        return await self.ledger.compare(CAUGHT_UP_S)

    async def _traffic(self) -> None:
        """A minute of events within some seconds, the last third with an attack; sent again where in doubt."""
        made: list[tuple[bytes, bytes, int]] = []
        for second in range(ROUND_EVENTS_S):
            for _ in range(12):
                self.collector.at_us += SECOND_US // 12
                attack = second >= 40 and self.chance.random() < 0.6
                user = f"attacker-{self.chance.randrange(9)}" if attack else f"user-{self.chance.randrange(50)}"
                blocked = attack or self.chance.random() < 0.01
                event = self.collector.event(user, blocked=blocked, latency_ms=self.chance.uniform(80, 120))
                made.append((event[0], encode(event[1]), event[2]))
            made += [(key, encode(record), p) for key, record, p in self.collector.control(Heartbeat)]
            if self.chance.random() < 0.3:
                await self._send(made)
                made = []
                await self._pause(0, 0.6)
        self.collector.at_us += 2 * SECOND_US
        made += [(key, encode(record), p) for key, record, p in self.collector.control(Heartbeat)]
        await self._send(made)  # closes the last second, so that all of it counts

    async def _send(self, made: list[tuple[bytes, bytes, int]]) -> None:
        self.ledger.send([value for _, value, _ in made])
        while True:
            try:
                async with asyncio.timeout(20):
                    await traffic.send(self.kafka, made)
            except (BrokerAway, KafkaError, OSError, TimeoutError):
                await asyncio.sleep(0.5)  # all of it again: what was written is a duplicate, and must not count
            else:
                return

    async def _killed(self, worker: Worker) -> None:
        for _ in range(self.chance.choice((1, 1, 2))):
            worker.kill9()
            await self._pause(0, 0.5)
            worker.start()
            await self._pause(0.5, 4)

    async def _both_killed(self) -> None:
        for worker in (self.one, self.two):
            worker.kill9()
        for worker in (self.two, self.one):
            worker.start()

    async def _killed_recovering(self) -> None:
        """Killed, and killed again just as it reads its state."""
        self.one.kill9()
        self.one.start()
        await self._until((self.one.folder / "url").exists, "it begins")
        await self._pause(0, 2)
        self.one.kill9()
        self.one.start()

    async def _killed_joining(self) -> None:
        """A second worker is killed while it joins and recovers."""
        self.other.start()
        await self._until((self.other.folder / "url").exists, "it begins")
        await self._pause(0, 2)
        self.other.kill9()

    async def _taken_over(self) -> None:
        self.other.start()
        await self._until(lambda: self.other.metric("partitions") == 2, "the second worker has its share")
        await self._pause(0, 1)
        self.one.kill9()
        await self._pause(0, SESSION_S)
        self.one, self.other = self.other, self.one

    async def _joined_and_left(self) -> None:
        self.other.start()
        await self._until(lambda: self.other.metric("partitions") == 2, "the second worker has its share")
        await self._pause(0, 1)
        assert await asyncio.to_thread(self.other.stop) == 0

    async def _zombie(self, victim: Worker, heir: Worker) -> None:
        """Suspended beyond its session; the other takes over and works; then both go on, and one leaves."""
        heir.start()
        await self._until(lambda: heir.metric("ready") == 1, "the heir has joined")
        await self._pause(0, 0.5)
        victim.send(signal.SIGSTOP)
        try:
            owned = float(self.kafka.count("events"))
            await self._until(lambda: heir.metric("partitions") == owned, "the heir owns all")
            await self._pause(0, 1)
        finally:
            victim.send(signal.SIGCONT)
        await self._until(lambda: victim.metric("partitions") + heir.metric("partitions") == owned, "they share")
        assert await asyncio.to_thread(heir.stop) == 0

    async def _broker_killed(self) -> None:
        await asyncio.to_thread(self.broker.kill9)
        await self._pause(0, 3)
        await asyncio.to_thread(self.broker.start)

    async def _broker_killed_joining(self) -> None:
        """The group is in the middle of dealing out partitions when its coordinator dies; then the new one dies too."""
        self.other.start()
        await self._until((self.other.folder / "url").exists, "it begins")
        await self._pause(0, 1.5)
        await self._broker_killed()
        await self._pause(0, 3)
        self.other.kill9()

    async def _pause(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self.chance.uniform(least_s, most_s))

    async def _until(self, true: Callable[[], bool], what: str) -> None:
        await asyncio.to_thread(wait_until, true, f"{what} (seed {self.seed})", 60)

    def stop(self) -> None:
        """Ends what still runs."""
        for worker in (self.one, self.other, self.two, self.another):
            worker.__exit__()

    def logs(self) -> str:
        """The ends of all logs."""
        workers = (self.one, self.other, self.two, self.another)
        return "\n".join(f"== {w.folder.name}\n{w.log.read_text()[-2000:]}" for w in workers if w.log.exists())


@pytest.fixture
def battery(broker: RunningBroker, tmp_path: Path) -> Iterator[Battery]:
    """A battery that has not begun."""
    made = Battery(broker, tmp_path, SEED)
    yield made
    made.stop()


async def test_no_fault_changes_a_total_or_a_finding(battery: Battery) -> None:
    """Round after round: one fault under load, then exact totals of all users and byte-identical findings."""
    await battery.start()
    kinds = list(battery.faults)
    done: Counter[str] = Counter()
    began_s = time.monotonic()
    for number in range(ROUNDS):
        if number % len(kinds) == 0:
            battery.chance.shuffle(kinds)
        fault = kinds[number % len(kinds)]
        round_s = time.monotonic()
        wrong = await battery.round(fault)
        done[fault] += 1
        ledger = battery.ledger
        print(
            f"seed {battery.seed} round {number + 1}: {fault}, {time.monotonic() - round_s:.1f} s; "
            f"{ledger.records} records, {len(ledger.found[0])} rollups, {len(ledger.found[1])} findings",
            flush=True,
        )
        assert not wrong, f"seed {battery.seed}, round {number + 1} ({fault}): {wrong}\n{battery.logs()}"
    assert battery.ledger.found[1]
    print(f"{ROUNDS} rounds exact in {time.monotonic() - began_s:.0f} s: {dict(done)}")
