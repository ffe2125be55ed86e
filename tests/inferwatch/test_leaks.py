"""The search for a canary finds it wherever it is, and nowhere else."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from collector.kafka import BatchWriter, KafkaConfig, ensure_topics, make_producer
from inferwatch import leaks

pytestmark = pytest.mark.kafka
CANARY = "canary0123"


@pytest.fixture
async def pages() -> AsyncIterator[dict[str, str]]:
    """A server whose answers to table names and paths can be set; its address is under `url`."""
    said: dict[str, str] = {}

    async def answer(request: web.Request) -> web.Response:
        sql = (await request.text()).split()
        return web.Response(text=said.get(sql[3] if sql else request.path, "nothing here"))

    app = web.Application()
    app.router.add_route("*", "/{any:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    said["url"] = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield said
    await runner.cleanup()


async def test_every_place_is_searched(kafka_config: KafkaConfig, pages: dict[str, str], tmp_path: Path) -> None:
    """Nothing at first; then a key on a topic, a row, a page and a line in a log are each named."""
    await ensure_topics(kafka_config)

    async def found() -> list[str]:
        return await leaks.find(CANARY, kafka_config, tmp_path, face_url=pages["url"], view_url=pages["url"])

    assert await found() == []
    producer = make_producer(kafka_config, client_id="leak")
    await producer.start()
    writer = BatchWriter(producer, kafka_config.topic("status"))
    await writer.append(f"key {CANARY}".encode(), b"{}", 0)
    await writer.flush()
    await producer.stop()
    pages["findings"] = f'{{"summary":"{CANARY}"}}'
    pages["/events"] = f"<p>{CANARY}</p>"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "engine.log").write_text(f"a prompt: {CANARY}")
    log = str(tmp_path / "logs" / "engine.log")
    assert await found() == ["topic status", "table findings", "page /events", log]
