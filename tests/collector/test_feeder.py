"""What the loop that feeds Kafka does when something beside the feeding goes wrong. No broker is needed for it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from collector.checkpoints import Checkpoints
from collector.config import EvidenceConfig, JournalConfig, PublisherConfig
from collector.event import AuditEvent, Checkpoint
from collector.feeder import Feeder
from collector.journal import JournalFull
from collector.kafka import KafkaConfig
from collector.lanes import Book
from collector.signing import Signer, create_signing_key
from collector.tickets import Counters, Meta
from tests.collector.booking import KNOWN, Clock, open_book, written


class Site:
    """A feeder, and a book that it signs."""

    def __init__(self, folder: Path) -> None:
        self.key_file, clock = folder / "signing.key", Clock()
        create_signing_key(self.key_file)
        self.book: Book = open_book(folder / "journal", clock, segment_bytes=1_000_000, bytes_max=10_000_000)
        self.checkpoints = Checkpoints(self.book, Signer.load(self.key_file))
        evidence = EvidenceConfig(signing_key_file=self.key_file, checkpoint_ms=100)
        parts = (KafkaConfig(), PublisherConfig(), JournalConfig(dir=folder / "journal"), evidence)
        meta, counters = Meta("host-1", "tiny@1"), Counters()
        self.feeder = Feeder(*parts, meta=meta, boot="b", config_digest="", counters=counters, clock_us=clock)
        self.feeder._book = self.book

    @asynccontextmanager
    async def signing(self) -> AsyncIterator[None]:
        """The task that signs, running."""
        task = asyncio.ensure_future(self.feeder._sign(self.checkpoints))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    def ask(self) -> None:
        """One more event."""
        self.book.finish(self.book.begin("u_1", 0, KNOWN), AuditEvent, {"status": "ok"})

    @property
    def signed(self) -> list[str]:
        """The keys that signed, checkpoint by checkpoint."""
        return [record.key_id for _, _, record in written(self.book.journal) if isinstance(record, Checkpoint)]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Not started."""
    return Site(tmp_path)


async def seen(what: Callable[[], bool]) -> None:
    """Until it is so."""
    for _ in range(1_000):
        if what():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never was")


async def test_a_key_file_that_became_bad_does_not_end_the_signing(site: Site) -> None:
    """The key in hand goes on; the health record says what is wrong, and that it is well again."""
    good = site.key_file.read_text()
    async with site.signing():
        await seen(lambda: bool(site.signed))
        site.key_file.unlink()
        before = len(site.signed)
        site.ask()
        await seen(lambda: len(site.signed) > before)
        await seen(lambda: site.feeder._health()["why"] == "reading the signing key failed: SigningKeyProblem")
        assert site.feeder._health()["ready"] is False
        site.key_file.write_text(good)
        site.key_file.chmod(0o600)
        await seen(lambda: site.feeder._health()["ready"] is True)
    assert set(site.signed) == {Signer.load(site.key_file).key_id}


async def test_a_full_disk_is_told_as_long_as_it_is_full(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints go on when there is room again, and readiness comes back."""

    def full() -> bool:
        raise JournalFull("full")

    async with site.signing():
        await seen(lambda: bool(site.signed))
        with monkeypatch.context() as patched:
            patched.setattr(site.checkpoints, "make", full)
            await seen(lambda: site.feeder._health()["why"] == "signing a checkpoint failed: JournalFull")
        before = len(site.signed)
        site.ask()
        await seen(lambda: len(site.signed) > before)
        await seen(lambda: site.feeder._health()["ready"] is True)
