"""Looks for a canary word, sent as prompt, user and session, in everything that the pipe has written or shows.

Topics are read as a consumer sees them (on disk they are compressed), the store and the pages over HTTP, logs, journals
and delivered findings as bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx

from collector.kafka import KafkaConfig, TopicName, read_topic

TOPICS: Final[tuple[TopicName, ...]] = ("events", "rollups", "findings", "deadletter", "status")
TABLES: Final = ("events", "events_1m", "findings", "process_reports")
PAGES: Final = ("/", "/events")
FILES: Final = ("logs", "journal", "findings.ocsf.jsonl")


async def find(canary: str, kafka: KafkaConfig, folder: Path, *, face_url: str, view_url: str) -> list[str]:
    """The places that hold the canary; none, if all is well. Reads only, and reads everything: for demos and tests."""
    needle = canary.encode()
    places = [f"topic {name}" for name in TOPICS if needle in await _topic(kafka, name)]
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        for table in TABLES:
            sql = f"SELECT * FROM {table} FORMAT JSONEachRow"  # noqa: S608  # names of our own tables
            answer = await client.post(f"{face_url}/", content=sql)
            places += [f"table {table}"] if needle in answer.raise_for_status().content else []
        for page in PAGES:
            answer = await client.get(f"{view_url}{page}")
            places += [f"page {page}"] if needle in answer.raise_for_status().content else []
    return places + [str(file) for file in _files(folder) if needle in file.read_bytes()]


def _files(folder: Path) -> Iterator[Path]:
    for name in FILES:
        place = folder / name
        yield from (file for file in (place, *place.rglob("*")) if file.is_file())


async def _topic(kafka: KafkaConfig, name: TopicName) -> bytes:
    """All keys and values that are on a topic now."""
    return b"\n".join([part or b"" async for record in read_topic(kafka, name) for part in (record.key, record.value)])
