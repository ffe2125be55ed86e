"""SIGKILL, over and over: nothing begun is without its event, and the chain of every dead boot is whole and signed.

Ten times in make soak-short, `INFERWATCH_SOAK_KILLS` times (100) in make soak.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from collector.signing import create_signing_key
from collector.trust import TrustedKeys
from collector.verification import Verification
from tests.collector.publishing import ROOT, Maker, ends, folders, read, read_raw

pytestmark = pytest.mark.kafka

KILLS = int(os.environ.get("INFERWATCH_SOAK_KILLS", "100"))
SEED = int(os.environ.get("INFERWATCH_SOAK_SEED", "1"))
CHILD = r"""
import os, sys, threading
from pathlib import Path
from collector.config import EvidenceConfig, JournalConfig, PublisherConfig
from collector.kafka import KafkaConfig
from collector.publisher import Publisher
server, prefix, folder, key_file = sys.argv[1:]
publisher = Publisher(
    KafkaConfig(bootstrap_servers=server, topic_prefix=prefix), PublisherConfig(),
    JournalConfig(dir=Path(folder), segment_bytes=65536), collector_id="host-1", model_version="tiny@1",
    evidence=EvidenceConfig(signing_key_file=Path(key_file), checkpoint_ms=200, checkpoint_records=64))
publisher.start()
os.write(1, b"started\n")
open_ones = []
for turn in range(10_000_000):
    ticket = publisher.begin(key=f"u_{turn % 9}", known={"tenant": "default"})
    os.write(1, f"begun {ticket.event_id}\n".encode())
    open_ones.append(ticket)
    if len(open_ones) > 10:
        done = open_ones.pop(turn % 10)
        publisher.finish(done, status="ok")
        os.write(1, f"done {done.event_id}\n".encode())
"""


def _kill(make: Maker, key_file: Path, lines: int) -> tuple[set[str], set[str]]:
    """A loaded process, killed once it has said so much; also while it starts, settling the one before."""
    arguments = [make.kafka.bootstrap_servers, make.kafka.topic_prefix, str(make.folder), str(key_file)]
    command = [sys.executable, "-c", CHILD, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [next(process.stdout) for _ in range(lines)]
        process.kill()
        said += process.stdout.read().splitlines()
    words = [line.split() for line in said if len(line.split()) == 2 and len(line.split()[1]) == 36]
    return {i for word, i in words if word == "begun"}, {i for word, i in words if word == "done"}


def _kills(make: Maker, folder: Path, kills: int) -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)  # noqa: S311  # no secret
    key_file = folder / "signing.key"
    signer = create_signing_key(key_file)
    begun: set[str] = set()
    done: set[str] = set()
    for _ in range(kills):
        one_begun, one_done = _kill(make, key_file, chance.choice([1, 2, 50, 700, 3000]))
        begun |= one_begun
        done |= one_done
    publisher = make(evidence_signing_key_file=key_file)
    publisher.start()
    assert folders(make) == [publisher.boot]
    assert publisher.stop(30) is True
    told = ends(read(make.kafka))
    assert begun <= set(told)
    assert {told[event_id] for event_id in done} <= {"ok"}
    verification = Verification(TrustedKeys([signer.public_key]))
    for partition, raws in read_raw(make.kafka).items():
        verification.feed(partition, raws, range(len(raws)))
    report = verification.report()
    assert (report.problems, report.verdict) == ([], "sound")
    assert 1 < report.boots <= kills + 1  # some died before their hello
    assert report.unsigned_records == 0


@pytest.mark.long
def test_ten_kills_lose_nothing(make: Maker, tmp_path: Path) -> None:
    """Each request that a dead process had begun has one event, and the log is sound from end to end."""
    _kills(make, tmp_path, 10)


@pytest.mark.soak
def test_a_hundred_kills_lose_nothing(make: Maker, tmp_path: Path) -> None:
    """The same, a hundred times."""
    _kills(make, tmp_path, KILLS)
