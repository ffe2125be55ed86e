"""Whatever is done to a log of signed records is found, and the first record concerned is named."""

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from collector.chain import origin, part_hash, record_hash, root_from_path, signed_bytes
from collector.checkpoints import Checkpoints
from collector.event import AuditEvent, Checkpoint, Goodbye, Heartbeat, Hello, decode, encode
from collector.journal import Journal
from collector.lanes import Book
from collector.signing import Signer, create_signing_key, rotate_signing_key, signed_by
from collector.trust import TrustedKeys
from collector.verification import Verification
from tests.collector.booking import KNOWN, Clock, config_in
from tests.collector.signed_log import PARTITIONS, SIGNER, Log, chance, raws, verify, write_boot, write_log

SEEDS = range(3)
STRANGER = Signer(bytes(range(1, 33)))


def _pick(records: list[bytes], randomness: random.Random, kinds: tuple[bytes, ...] = (b"inf",)) -> int:
    """The place of a record of these kinds, not the last two of its boot."""
    return randomness.choice([at for at, raw in enumerate(records[:-2]) if raw[9:12] in kinds])


def _rehash(records: list[bytes], start: int, *, renumber: bool = False) -> list[bytes]:
    """What a careful forger does after `start`: every later record of the boot names what is now before it."""
    done = records[:start]
    boot = decode(records[start - 1]).boot
    for at in range(start, len(records)):
        record = decode(records[at])
        if record.boot == boot:
            before = [raw for raw in done if decode(raw).boot == boot]
            beat = isinstance(record, Heartbeat)
            same = [raw for raw in before if isinstance(decode(raw), Heartbeat) == beat]
            link = record_hash(same[-1]).hex() if same else origin("host-1", boot, 0)
            seq = decode(before[-1]).seq + 1 if renumber else record.seq
            record = msgspec.structs.replace(record, chain=link, seq=seq)
        done.append(encode(record))
    return done


def _changed(raw: bytes) -> bytes:
    return encode(msgspec.structs.replace(decode(raw), user_id="u_" + "f" * 32))


def _id(raw: bytes) -> str:
    return decode(raw).event_id


def _change(records: list[bytes], at: int) -> tuple[list[bytes], str]:
    return [*records[:at], _changed(records[at]), *records[at + 1 :]], _id(records[at])


def _change_and_rehash(records: list[bytes], at: int) -> tuple[list[bytes], str]:
    changed, name = _change(records, at)
    return _rehash(changed, at + 1), name


def _unlink(records: list[bytes], at: int) -> tuple[list[bytes], str]:
    record = encode(msgspec.structs.replace(decode(records[at]), chain="0" * 64))
    return [*records[:at], record, *records[at + 1 :]], _id(record)


def _insert(records: list[bytes], at: int) -> tuple[list[bytes], str]:
    """A made-up event that links to the one before it, with the next one's number."""
    copy = msgspec.structs.replace(decode(records[at]), event_id="019a0000-0000-7000-8000-00000000dead")
    return [*records[:at], encode(copy), *records[at:]], copy.event_id


def _insert_and_rehash(records: list[bytes], at: int) -> tuple[list[bytes], str]:
    inserted, name = _insert(records, at)
    return _rehash(inserted, at + 1, renumber=True), name


def _swap(records: list[bytes], at: int) -> tuple[list[bytes], str]:
    after = next(i for i in range(at + 1, len(records)) if records[i][9:12] != b"hea")
    swapped = list(records)
    swapped[at], swapped[after] = swapped[after], swapped[at]
    return swapped, _id(records[after])


NAMED: dict[str, Callable[[list[bytes], int], tuple[list[bytes], str]]] = {
    "changed": _change,
    "changed, all later ones hashed anew": _change_and_rehash,
    "its link changed": _unlink,
    "inserted": _insert,
    "inserted, all later ones hashed anew": _insert_and_rehash,
    "two swapped": _swap,
}


@pytest.mark.parametrize("seed", SEEDS)
def test_an_untouched_log_is_sound(tmp_path: Path, seed: int) -> None:
    """Also where records were sent twice, as a sender that never saw the acknowledgement does."""
    log = write_log(tmp_path, seed)
    for records in log.values():
        at = chance(seed).randrange(5, len(records) - 5)
        records[at:at] = records[at - 5 : at]
    report = verify(log)
    assert (report.verdict, report.problems, report.notes) == ("sound", [], [])
    assert (report.repeats, report.lanes, report.boots, report.unsigned_records) == (5 * PARTITIONS, 4, 2, 0)


@pytest.mark.parametrize("what", NAMED)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_bad_record_is_named(tmp_path: Path, seed: int, what: str) -> None:
    """Change, insertion, reordering; also by somebody who can hash, but not sign."""
    log = write_log(tmp_path, seed)
    log[0], name = NAMED[what](log[0], _pick(log[0], chance(seed)))
    report = verify(log)
    assert report.verdict == "broken"
    assert (report.problems[0].event_id, report.problems[0].partition) == (name, 0), (what, seed, report.problems[:3])


@pytest.mark.parametrize("rehash", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_removed_record_is_told_where_it_was(tmp_path: Path, seed: int, rehash: bool) -> None:
    """Its number is named; where later ones were renumbered, the first that is not what was signed there."""
    log = write_log(tmp_path, seed)
    records = log[0]
    at = _pick(records, chance(seed))
    gone = decode(records[at])
    rest = [*records[:at], *records[at + 1 :]]
    log[0] = _rehash(rest, at, renumber=True) if rehash else rest
    if rehash:  # heartbeats behind it got its number first
        gone = next(decode(raw) for raw in log[0][at:] if raw[9:12] != b"hea")
    report = verify(log)
    assert report.verdict == "broken"
    first = report.problems[0]
    assert first.seq == gone.seq, (seed, report.problems[:3])
    assert first.what in ({"changed", "removed"} if rehash else {"removed"})


@pytest.mark.parametrize("seed", SEEDS)
def test_heartbeats_are_guarded_too(tmp_path: Path, seed: int) -> None:
    """Their counters say what was not audited: a changed, removed or added heartbeat is found, hashed anew or not."""
    whole = write_log(tmp_path, seed)
    at = _pick(whole[0], chance(seed), (b"hea",))
    beat = msgspec.structs.replace(decode(whole[0][at]), engine_requests=7)
    changed = [*whole[0][:at], encode(beat), *whole[0][at + 1 :]]
    removed = [*whole[0][:at], *whole[0][at + 1 :]]
    added = [*whole[0][:at], encode(beat), *whole[0][at:]]
    for records in (changed, removed, added):
        assert verify({**whole, 0: records}).verdict == "broken"
        assert verify({**whole, 0: _rehash(records, at + 1, renumber=True)}).verdict == "broken"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cut_end_is_told(tmp_path: Path, seed: int) -> None:
    """Wherever a lane is cut, also where a made-up goodbye hides the cut."""
    whole = write_log(tmp_path, seed)
    boots = [decode(raw).boot for raw in whole[0]]
    for cut in range(boots.index("boot-2") + 1, len(boots) - 2, 7):
        short = whole[0][:cut]
        last, same = decode(short[-1]), [raw for raw in short if raw[9:12] != b"hea"]
        fields = {name: getattr(last, name) for name in ("schema_version", "event_id", "timestamp")}
        fields |= {"collector_id": "host-1", "boot": "boot-2", "chain": record_hash(same[-1]).hex()}
        goodbye = encode(Goodbye(**fields, seq=last.seq + 1))
        for records in (short, [*short, goodbye]):
            assert "truncated" in {problem.what for problem in verify({**whole, 0: records}).problems}, (seed, cut)


def test_a_missing_boot_or_lane_is_told(tmp_path: Path) -> None:
    """The next boot names it; the boot's other lanes say how many there are."""
    whole = write_log(tmp_path, 1)
    second = {p: [raw for raw in records if decode(raw).boot == "boot-2"] for p, records in whole.items()}
    assert verify(second).notes == ["boot boot-1 ended before this log begins"]
    other, _ = write_boot(tmp_path, "boot-0", Clock(), chance(1))
    report = verify({p: other[p] + second[p] for p in second})
    assert [(p.what, p.lane) for p in report.problems] == [("truncated", "host-1/boot-1")]
    one_lane = {0: whole[0], 1: [raw for raw in whole[1] if decode(raw).boot == "boot-1"]}
    assert [p.why for p in verify(one_lane).problems] == ["its boot has 2 lanes, and 1 are here"]


def test_a_lane_in_another_partition_is_told(tmp_path: Path) -> None:
    """A lane's first record names the partition; so does what is signed."""
    log = write_log(tmp_path, 2)
    assert {problem.what for problem in verify({0: log[1], 1: log[0]}).problems} >= {"forged"}


def test_signatures_of_strangers_prove_nothing(tmp_path: Path) -> None:
    """Unsigned, signed by an unknown or a revoked key, or a signature that was copied: told each, never sound."""
    unsigned = verify(write_log(tmp_path / "a", 3, signer=None))
    strange = verify(write_log(tmp_path / "b", 3, signer=STRANGER))
    log = write_log(tmp_path / "c", 3)
    revoked = verify(log, revoked={SIGNER.key_id: 1})
    assert [report.verdict for report in (unsigned, strange, revoked)] == ["unproven", "unproven", "broken"]
    assert [list(report.checkpoints) for report in (unsigned, strange, revoked)] == [
        ["unsigned"],
        ["unknown"],
        ["revoked"],
    ]
    at = _pick(log[0], chance(3), (b"che",))
    checkpoint = decode(log[0][at])
    assert isinstance(checkpoint, Checkpoint)
    copied = encode(msgspec.structs.replace(checkpoint, signature="0" * 128))
    assert "forged" in verify({**log, 0: [*log[0][:at], copied, *log[0][at + 1 :]]}).checkpoints


def test_hints_can_not_be_turned_against_an_honest_record(tmp_path: Path) -> None:
    """They are part of what is signed: a checkpoint with others is forged."""
    log = write_log(tmp_path, 4)
    at = next(at for at, raw in enumerate(log[0]) if raw[9:12] == b"che")
    checkpoint = decode(log[0][at])
    assert isinstance(checkpoint, Checkpoint)
    other = encode(msgspec.structs.replace(checkpoint, hints="AAAA" + checkpoint.hints[4:]))
    report = verify({**log, 0: _rehash([*log[0][:at], other, *log[0][at + 1 :]], at + 1)})
    assert ("forged", checkpoint.seq) in {(problem.what, problem.seq) for problem in report.problems}


def test_a_key_named_by_a_trusted_one_is_trusted(tmp_path: Path) -> None:
    """Rotation: the old key signs the new one, the new one itself; with the old key revoked by then it is not."""
    file = tmp_path / "signing.key"
    old = create_signing_key(file)
    new = rotate_signing_key(file)
    assert (new.public_key, new.before) == (Signer.load(file).public_key, old.key_id)
    clock, randomness = Clock(), chance(1)
    log = _boot_with_rotation(tmp_path, clock, randomness, old, new)
    pinned = (old.public_key,)
    report = verify(log, pinned=pinned)
    assert (report.verdict, report.keys) == ("sound", {old.key_id: "trusted", new.key_id: "trusted"})
    assert verify(log, pinned=pinned, revoked={old.key_id: 1}).verdict == "broken"
    assert verify(log, pinned=(STRANGER.public_key,)).verdict == "unproven"


def _boot_with_rotation(folder: Path, clock: Clock, randomness: random.Random, old: Signer, new: Signer) -> Log:
    journal = Journal(config_in(folder / "journal"), "boot-1")
    book = Book(journal, collector_id="host-1", model_version="tiny@1", clock_us=clock)
    for partition in range(PARTITIONS):
        book.control(partition, Hello)
    checkpoints = Checkpoints(book, old)
    for turn in range(8):
        clock.us += randomness.randrange(1, 9_000_000)
        book.finish(book.begin("u_1", turn % 2, KNOWN), AuditEvent, {"status": "ok"})
        if turn == 4:
            checkpoints.make()
            checkpoints.rotated(new)
    checkpoints.end()
    log = raws(journal)
    journal.close()
    return log


def test_a_part_of_a_log_is_verified_for_itself(tmp_path: Path) -> None:
    """From the middle to the middle: no problem, and said where it begins; a change in it is found."""
    log = write_log(tmp_path, 5)
    part = {p: records[40:150] for p, records in log.items()}
    report = verify(part, whole=False)
    assert (report.verdict, report.problems, len(report.notes)) == ("sound", [], 2)
    signed = max(at for at, raw in enumerate(part[0]) if raw[9:12] == b"che")
    part[0], name = _change_and_rehash(part[0], _pick(part[0][:signed], chance(5)))
    assert verify(part, whole=False).problems[0].event_id == name


def test_a_log_without_heartbeats_is_verified(tmp_path: Path) -> None:
    """The store keeps none: the chain of the others holds, and what is taken out of it is found."""
    log = {p: [raw for raw in records if raw[9:12] != b"hea"] for p, records in write_log(tmp_path, 6).items()}
    assert verify(log, beats=False).verdict == "sound"
    at = _pick(log[0], chance(6))
    gone = decode(log[0][at])
    report = verify({**log, 0: [*log[0][:at], *log[0][at + 1 :]]}, beats=False)
    assert (report.verdict, report.problems[0].what) == ("broken", "removed")
    assert report.problems[0].seq <= gone.seq < decode(log[0][at + 1]).seq


def test_a_third_party_checks_a_proof(tmp_path: Path) -> None:
    """With SHA-256, the record, the path and the checkpoint alone; not for another record."""
    log = write_log(tmp_path, 7)
    raw = log[0][_pick(log[0], chance(7))]
    verification = Verification(TrustedKeys([SIGNER.public_key]), wanted=_id(raw))
    for partition, records in log.items():
        verification.feed(partition, records, range(len(records)))
    proof = verification.report().proof
    assert proof is not None
    assert proof.record.encode() == raw
    checkpoint = decode(proof.checkpoint.encode())
    assert isinstance(checkpoint, Checkpoint)
    path = [bytes.fromhex(node) for node in proof.path]
    for record, good in ((raw, True), (_changed(raw), False)):
        tree = root_from_path(record_hash(record), proof.index, checkpoint.records, path)
        assert (tree is not None and tree.hex() == checkpoint.tree) is good
    part = part_hash(proof.partition, checkpoint)
    root = root_from_path(part, checkpoint.lane, checkpoint.lanes, [bytes.fromhex(node) for node in checkpoint.path])
    assert root is not None
    assert root.hex() == checkpoint.root
    assert signed_by(SIGNER.public_key, checkpoint.signature, signed_bytes(checkpoint))


def test_records_that_no_checkpoint_lists_are_held_by_the_chain(tmp_path: Path) -> None:
    """A process died after its journal let go of a checkpoint: the next part begins later, and its head fixes them."""
    clock, randomness = Clock(), chance(8)
    journal = Journal(config_in(tmp_path, segment_bytes=1_000_000, bytes_max=10_000_000), "boot-1")
    book = Book(journal, collector_id="host-1", model_version="tiny@1", clock_us=clock)
    for partition in range(PARTITIONS):
        book.control(partition, Hello)
    checkpoints = Checkpoints(book, SIGNER)
    for turn in range(40):
        clock.us += randomness.randrange(1, 9_000_000)
        book.finish(book.begin("u_1", turn % 2, KNOWN), AuditEvent, {"status": "ok"})
        book.control(turn % 2, Heartbeat)
        if turn == 20:
            checkpoints.make()
    for lane in book.lanes.values():
        lane.cover(lane.next)
    checkpoints.end()
    log = raws(journal)
    journal.close()
    assert verify(log).verdict == "sound"
    at = next(i for i, raw in enumerate(log[0]) if decode(raw).seq == 32 or (i > 30 and raw[9:12] == b"inf"))
    changed, _ = _change(log[0], at)
    assert verify({**log, 0: changed}).verdict == "broken"
    assert verify({**log, 0: _rehash(changed, at + 1)}).verdict == "broken"
