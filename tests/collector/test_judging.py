"""Judging under load: how many may wait, how long, and how much one request may ask."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from collector.guards.secrets import SecretsConfig
from collector.judging import Crowded, JudgingThreads
from collector.prompt import TURNS_MAX
from collector.routes import GateConfig
from tests.collector.gating import CHAT, Site, Watch


@pytest.fixture
async def held() -> AsyncIterator[threading.Event]:
    """What keeps a thread until it is set."""
    event = threading.Event()
    yield event
    event.set()


async def begun(threads: JudgingThreads, held: threading.Event, many: int) -> list[asyncio.Task[str]]:
    """So many jobs that end when `held` is set."""
    tasks = [asyncio.create_task(threads.admit(lambda: held.wait(10) and "judged")) for _ in range(many)]
    await asyncio.sleep(0)
    return tasks


async def test_one_more_than_may_wait_is_refused_at_once_and_an_answer_never(held: threading.Event) -> None:
    """Two threads, three that wait."""
    threads = JudgingThreads(2, waiting_max=3, wait_s_max=60)
    tasks = await begun(threads, held, 5)
    with pytest.raises(Crowded):
        await threads.admit(lambda: "judged")
    answer = asyncio.create_task(threads.run(lambda: "an answer"))
    await asyncio.sleep(0)
    held.set()
    assert await asyncio.gather(*tasks, answer) == ["judged"] * 5 + ["an answer"]
    assert await threads.admit(lambda: "judged") == "judged"
    threads.shutdown()


async def test_what_has_waited_too_long_is_refused_and_not_judged(held: threading.Event) -> None:
    """Its client has given up by then, and others wait."""
    now_s = 0.0
    threads = JudgingThreads(1, waiting_max=3, wait_s_max=5, monotonic_s=lambda: now_s)
    started = threading.Event()
    first = asyncio.create_task(threads.admit(lambda: started.set() or held.wait(10)))
    (late,) = await begun(threads, held, 1)
    await asyncio.to_thread(started.wait, 10)
    now_s = 5.1
    held.set()
    assert await first
    with pytest.raises(Crowded):
        await late
    threads.shutdown()


async def test_a_crowded_gate_answers_503_and_writes_it_down() -> None:
    """One thread, one that waits; the third is told to try again."""
    site = Site(GateConfig(), threads=JudgingThreads(1, waiting_max=1, wait_s_max=60))
    body = {"messages": [{"role": "user", "content": "wait"}]}
    tasks = [asyncio.create_task(site.send("POST", CHAT, json=body)) for _ in range(2)]
    await asyncio.to_thread(site.guard.waiting.acquire, True, 30)
    for _ in range(500):
        if site.auditor.threads.jobs == 2:
            break
        await asyncio.sleep(0.01)
    answer = await site.send("POST", CHAT, json=body)
    site.guard.go_on.set()
    assert [answer.status_code, *[(await task).status_code for task in tasks]] == [503, 200, 200]
    assert site.reasons == [("busy", 503)]


async def test_bodies_count_until_they_are_judged() -> None:
    """Two that are nearly as large as all together may be: a third is not read while they wait."""
    site = Site(GateConfig(buffered_bytes_max=1_048_576), threads=JudgingThreads(2, waiting_max=9, wait_s_max=60))
    body = {"messages": [{"role": "user", "content": "wait" + "a" * 500_000}]}
    tasks = [asyncio.create_task(site.send("POST", CHAT, json=body)) for _ in range(2)]
    for _ in tasks:
        await asyncio.to_thread(site.guard.waiting.acquire, True, 30)
    refused = await site.send("POST", CHAT, json=body)
    site.guard.go_on.set()
    assert [(await task).status_code for task in tasks] == [200, 200]
    assert (refused.status_code, site.reasons) == (503, [("busy", 503)])
    assert (await site.send("POST", CHAT, json=body)).status_code == 200


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 400)])
async def test_one_request_has_so_many_messages_at_most(more: int, status: int) -> None:
    """Each is judged by itself: a body of a hundred thousand would hold a thread for minutes."""
    site = Site(GateConfig())
    answer = await site.send("POST", CHAT, json={"messages": ["a"] * (TURNS_MAX + more)})
    assert answer.status_code == status
    assert site.reasons == [("too_many", 400)] * more


async def test_marked_spans_beyond_that_are_refused_where_they_could_be_taken_out() -> None:
    """They lie in one message."""
    site = Site(GateConfig(markers=(("<d>", "</d>"),)), policy=SecretsConfig(stages=Watch.stages, poisoned="drop"))
    answer = await site.send("POST", CHAT, json={"messages": [{"role": "user", "content": "<d>a</d>" * 5000}]})
    assert (answer.status_code, site.reasons) == (400, [("too_many", 400)])
