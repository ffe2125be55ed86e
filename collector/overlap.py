"""The overlap of two key epochs: who is in the middle of something keeps his pseudonym until he pauses.

At the change of a tenant's key, windows over users and sessions would be cut, and who probes a guard would begin anew
as somebody else. So a user keeps the old key as long as his requests come less than `idle_s` apart, for `overlap_s` at
the longest; after a pause he has the new one for good. Each server process decides by what it sees itself, and one that
starts in the overlap has the new key alone.

Memory: one entry for each user who came within `idle_s` after the change, at most `USERS_MAX`; more are not remembered
and go over `idle_s` after the change.
"""

from typing import Final

from collector.identity import Pseudonyms

USERS_MAX: Final = 100_000


class Overlap:
    """One tenant's change from one key to the next. Pure: the monotonic clock is an argument."""

    __slots__ = ("_active", "_began_s", "_idle_s", "_old", "_overlap_s")

    def __init__(self, old: Pseudonyms, began_s: float, *, idle_s: float, overlap_s: float) -> None:
        self._old, self._began_s, self._idle_s, self._overlap_s = old, began_s, idle_s, overlap_s
        self._active: dict[str, float] = {}
        """A user's old pseudonym to his last request since the change."""

    def over(self, now_s: float) -> bool:
        """Whether nobody has the old key any more, for certain."""
        since_s = now_s - self._began_s
        return since_s >= self._overlap_s or (since_s >= self._idle_s and not self._active)

    def names(self, user: str, new: Pseudonyms, now_s: float) -> Pseudonyms:
        """The pseudonyms for a request of a user now."""
        if not user or self.over(now_s):
            return new
        who = self._old.user(user)
        if now_s - self._active.get(who, self._began_s) >= self._idle_s:
            self._active.pop(who, None)
            return new
        if who in self._active or len(self._active) < USERS_MAX:
            self._active[who] = now_s
        return self._old
