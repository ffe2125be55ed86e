"""The hash chain of a lane, and the Merkle trees that checkpoints sign. Pure; SHA-256 throughout.

The hash of a record is that of a leaf in RFC 6962: SHA-256 of a zero byte and the record's bytes as on the wire. A lane
has two chains: a heartbeat names the heartbeat before it, any other record the last one that is no heartbeat; the first
of each names the lane's origin. So the events of a lane can be kept and proved without its many heartbeats.

A checkpoint is a tree of trees. For each lane: a Merkle root over its records since the last checkpoint, its heads and
counts, together its *part*. Over the parts of all lanes another Merkle root, which is signed. One record and two audit
paths prove that an event was signed, and show nothing of any other.
"""

import base64
import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final

from collector.event import Checkpoint

HASH_BYTES: Final = 32
HINT_BYTES: Final = 4
HINTS_MAX: Final = 16_384
"""Records of one part that have a hint; more of them are still covered by its tree."""
EMPTY_ROOT: Final = hashlib.sha256().digest()
"""Root of a tree without leaves (RFC 6962)."""
_sha256 = hashlib.sha256


def record_hash(raw: bytes) -> bytes:
    """Of a record's bytes as on the wire."""
    return _sha256(b"\0" + raw).digest()


def origin(collector_id: str, boot: str, partition: int) -> str:
    """What the first record of a lane names: a lane moved to another partition or boot does not begin rightly."""
    return _sha256(f"\2lane\n{collector_id}\n{boot}\n{partition}".encode()).hexdigest()


def level_above(level: Sequence[bytes]) -> list[bytes]:
    """The nodes over these; the last of an odd number goes up as it is."""
    pairs = zip(level[::2], level[1::2], strict=False)
    above = [_sha256(b"\1" + left + right).digest() for left, right in pairs]
    if len(level) % 2:
        above.append(level[-1])
    return above


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes, as in RFC 6962, section 2.1."""
    level = leaves
    while len(level) > 1:
        level = level_above(level)
    return level[0] if level else EMPTY_ROOT


def merkle_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The audit path of a leaf, from the bottom up. Raises IndexError."""
    if not 0 <= index < len(leaves):
        raise IndexError("no such leaf")
    path: list[bytes] = []
    level = leaves
    while len(level) > 1:
        if index ^ 1 < len(level):
            path.append(level[index ^ 1])
        level, index = level_above(level), index // 2
    return path


def root_from_path(leaf: bytes, index: int, size: int, path: Iterable[bytes]) -> bytes | None:
    """The root that a leaf's audit path leads to; None where the path has another length than such a tree's."""
    node, steps = leaf, iter(path)
    while size > 1:
        if index ^ 1 < size:
            sibling = next(steps, None)
            if sibling is None:
                return None
            node = _sha256(b"\1" + (sibling + node if index & 1 else node + sibling)).digest()
        size, index = (size + 1) // 2, index // 2
    return node if next(steps, None) is None and index == 0 else None


class LaneChain:
    """Where one lane stands: its heads, and what came since the last checkpoint. Memory: 40 bytes a record of these."""

    __slots__ = ("beat_head", "beat_seqs", "first", "fresh", "head", "leaves", "next", "seqs")

    def __init__(self, head: str, beat_head: str = "", *, seq: int = 0) -> None:
        self.head, self.beat_head = head, beat_head or head
        self.first = self.next = seq
        """Where the next checkpoint's part begins, and the next record's `seq`."""
        self.leaves = bytearray()
        self.seqs = array("Q")
        self.beat_seqs = array("Q")
        self.fresh = False
        """Whether there is more to sign than a checkpoint itself."""

    def add(self, raw: bytes, seq: int, *, beat: bool = False, fresh: bool = True) -> None:
        """The next record of the lane."""
        digest = record_hash(raw)
        self.next = seq + 1
        if beat:
            self.beat_head = digest.hex()
            self.beat_seqs.append(seq)
            return
        self.head = digest.hex()
        self.leaves += digest
        self.seqs.append(seq)
        self.fresh |= fresh

    def cover(self, before: int) -> None:
        """All before this `seq` is in a checkpoint that the lane has."""
        covered = bisect_left(self.seqs, before)
        del self.leaves[: covered * HASH_BYTES], self.seqs[:covered]
        del self.beat_seqs[: bisect_left(self.beat_seqs, before)]
        self.first = before


def split_leaves(leaves: bytes | bytearray) -> list[bytes]:
    """The hashes in a row of them."""
    return [bytes(leaves[at : at + HASH_BYTES]) for at in range(0, len(leaves), HASH_BYTES)]


def hints_of(leaves: Sequence[bytes]) -> str:
    """What a part says of its leaves one by one."""
    return base64.b64encode(b"".join([leaf[:HINT_BYTES] for leaf in leaves[:HINTS_MAX]])).decode()


def split_hints(hints: str) -> list[bytes]:
    """The inverse of `hints_of`. Raises ValueError."""
    raw = base64.b64decode(hints, validate=True)
    return [raw[at : at + HINT_BYTES] for at in range(0, len(raw), HINT_BYTES)]


def part_hash(partition: int, part: Checkpoint) -> bytes:
    """The leaf that one lane is in the signed tree: all that its checkpoint says of it."""
    hints = _sha256(part.hints.encode()).hexdigest()
    said = (partition, part.first, part.next, part.records, part.beats, part.head, part.beat_head, part.tree, hints)
    return record_hash("\n".join(map(str, said)).encode())


def signed_bytes(checkpoint: Checkpoint) -> bytes:
    """What the signature is over. The same for all lanes of one checkpoint."""
    said = (
        "inferwatch checkpoint 1",
        checkpoint.collector_id,
        checkpoint.boot,
        checkpoint.number,
        checkpoint.at_us,
        int(checkpoint.final),
        checkpoint.lanes,
        checkpoint.key_id,
        checkpoint.previous,
        checkpoint.root,
    )
    return "\n".join(map(str, said)).encode()


def rotation_bytes(before: str, public_key: str) -> bytes:
    """What the signatures on a change of the signing key are over: the old key's id and the new public key."""
    return f"inferwatch signing key 1\n{before}\n{public_key}".encode()
