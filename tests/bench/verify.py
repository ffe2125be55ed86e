"""How fast a log is verified: hash, chain, checkpoint, Merkle root and signature, on one core.

    .venv/bin/python -m tests.bench.verify --json

A log of four lanes is written by the collector's own book, with a signed checkpoint every 4,096 records of a lane, and
exported. `files_per_cpu_s`: as `inferwatch verify FILES`, reading included. `memory_per_cpu_s`: the records at hand.
`decode_us` is the cost of decoding one such event, for comparison with other machines. The last line printed is JSON.
"""

import argparse
import json
import os
import platform
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from collector.checkpoints import Checkpoints
from collector.config import JournalConfig
from collector.event import AuditEvent, Hello, decode
from collector.journal import RECORD, RECORD_HEAD, Journal, Reader
from collector.lanes import Book
from collector.publisher import system_clock_us
from collector.signing import Signer
from collector.trust import TrustedKeys
from collector.verification import Verification
from inferwatch.config import Config
from inferwatch.evidence import verify_files
from tests.bench.publisher import KNOWN, LEARNT, spread

SIGNER = Signer(bytes(range(32)))
LANES = 4


def write(folder: Path, events: int) -> dict[int, list[bytes]]:
    """A whole boot's records, by partition."""
    journal = Journal(JournalConfig(dir=folder, bytes_max=8 * 2**30, segment_bytes=2**30), uuid.uuid4().hex)
    book = Book(journal, collector_id="bench", model_version="tiny@1", clock_us=system_clock_us)
    for partition in range(LANES):
        book.control(partition, Hello)
    checkpoints = Checkpoints(book, SIGNER)
    for turn in range(events):
        book.finish(book.begin(f"u_{turn % 97}", turn % LANES, KNOWN), AuditEvent, LEARNT)
        if turn % (4096 * LANES) == 0:
            checkpoints.make()
    checkpoints.end()
    log: dict[int, list[bytes]] = {}
    for entry in Reader(journal.folder, lambda: journal.end).entries():
        if entry.body[0] == RECORD:
            _, key_length, partition, _ = RECORD_HEAD.unpack_from(entry.body)
            log.setdefault(partition, []).append(entry.body[RECORD_HEAD.size + key_length :])
    journal.close()
    return log


def measure(folder: Path, events: int, runs: int) -> dict[str, Any]:
    """All figures, interleaved."""
    log = write(folder / "journal", events)
    files = []
    for partition, raws in log.items():
        files.append(folder / f"events-{partition}.jsonl")
        files[-1].write_bytes(b"\n".join(raws) + b"\n")
    records = sum(map(len, log.values()))
    config = Config(evidence={"signing_keys": [SIGNER.public_key]})  # type: ignore[arg-type]  # pydantic makes it
    from_files, from_memory, decoding = [], [], []
    for _ in range(runs):
        cpu_s = time.process_time()
        report = verify_files(config, files)
        from_files.append(records / (time.process_time() - cpu_s))
        cpu_s = time.process_time()
        verification = Verification(TrustedKeys([SIGNER.public_key]))
        for partition, raws in log.items():
            verification.feed(partition, raws, range(len(raws)))
        again = verification.report()
        from_memory.append(records / (time.process_time() - cpu_s))
        if (report.verdict, again.verdict, report.records) != ("sound", "sound", records):
            raise RuntimeError(f"the log is not sound: {report.problems[:3]}")
        cpu_s = time.process_time()
        for raw in log[0][1:5001]:
            decode(raw)
        decoding.append((time.process_time() - cpu_s) / 5000 * 1e6)
    goal = {"figure": "verify", "goal": ">= 300k events/s on a core", "measured": round(max(from_files))}
    return {
        "bench": "verify",
        "records": records,
        "record_bytes": round(sum(len(raw) for raws in log.values() for raw in raws) / records),
        "runs": runs,
        "files_per_cpu_s": spread(from_files, 0),
        "memory_per_cpu_s": spread(from_memory, 0),
        "decode_us": spread(decoding, 2),
        "versions": {"python": platform.python_version()},
        "cores": os.cpu_count(),
        "goals": [goal | {"met": max(from_files) >= 300_000, "why": "the quietest run; others shared the machine"}],
    }


def main() -> None:
    """Print the figures; the last line is the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=7)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measure(Path(name), asked.events, asked.runs)))


if __name__ == "__main__":
    main()
