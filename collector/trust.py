"""Which signing keys are trusted: those pinned by whoever verifies, and those that a trusted one named after itself.

A revoked key names nobody: whoever stole it could name his own key and write any time beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias

from collector.chain import rotation_bytes, signed_bytes
from collector.event import Change, Checkpoint
from collector.signing import key_id_of, signed_by

Worth: TypeAlias = Literal["signed", "unsigned", "unknown", "revoked", "forged"]
NEVER: Final = 2**63


class TrustedKeys:
    """Public keys by id, and from when on a key is not trusted any more."""

    def __init__(self, pinned: Sequence[str] = (), revoked: Mapping[str, int] | None = None) -> None:
        """`pinned`: public keys, hexadecimal. `revoked`: key id to µs since the epoch. Raises ValueError."""
        self.known = {key_id_of(public_key): public_key for public_key in pinned}
        self._revoked = dict(revoked or {})
        self._judged: dict[tuple[bytes, str], bool] = {}

    def learn(self, changes: Sequence[Change]) -> None:
        """Take over new keys that a trusted one signed, and that signed themselves, in whatever order they come."""
        waiting, before = list(changes), -1
        while len(waiting) != before:
            before = len(waiting)
            waiting = [change for change in waiting if not self._learnt(change)]

    def _learnt(self, change: Change) -> bool:
        old = self.known.get(change.before)
        if old is None or change.before in self._revoked:
            return False
        said = rotation_bytes(change.before, change.public_key)
        if not (signed_by(old, change.signed_before, said) and signed_by(change.public_key, change.signed_after, said)):
            return False
        self.known.setdefault(key_id_of(change.public_key), change.public_key)
        return True

    def revoked(self, key_id: str, at_us: int) -> bool:
        """Whether the key was not to be trusted any more at that time."""
        return at_us >= self._revoked.get(key_id, NEVER)

    def judge(self, checkpoint: Checkpoint) -> Worth:
        """What a checkpoint's signature is worth by the keys known now."""
        public_key = self.known.get(checkpoint.key_id)
        if not checkpoint.signature:
            return "unsigned"
        if public_key is None:
            return "unknown"
        if self.revoked(checkpoint.key_id, checkpoint.at_us):
            return "revoked"
        case = (signed_bytes(checkpoint), checkpoint.signature)
        if case not in self._judged:
            self._judged[case] = signed_by(public_key, checkpoint.signature, case[0])
        return "signed" if self._judged[case] else "forged"
