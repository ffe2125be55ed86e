"""Judgements that need not be made again: a conversation brings its earlier turns with every request.

A key is the BLAKE2b-256 under a key that this process drew for itself, over guard, version, tenant, stage, text and
what the guard reads of the context, each with its length before it: nobody outside can make two texts share an entry,
and no tenant is answered from what another one asked. Values are judgements alone; policy turns them into decisions
anew each time. Errors are never kept. Memory: at most `entries`, some 300 bytes each, the least recently used leave
first; no text is kept. What a crash loses: all of it, which costs time only. A client can tell from the time it takes
whether its own tenant had the same text judged within `ttl_s`.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from collector.event import Stage
from collector.guards.protocol import CONTEXT, Context, Guard, Judgement

KEY_BYTES: Final = 32


class VerdictCache:
    """Thread-safe. `entries` 0 keeps nothing."""

    def __init__(
        self,
        entries: int,
        ttl_s: float,
        *,
        clock_s: Callable[[], float],
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._entries, self._ttl_s, self._clock_s = entries, ttl_s, clock_s
        self._key = random_bytes(KEY_BYTES)
        self._kept: OrderedDict[bytes, tuple[float, Judgement]] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def key(self, guard: Guard, stage: Stage, text: str, context: Context) -> bytes:
        """Where the guard's judgement on this text stands; empty where nothing is kept."""
        if not self._entries:
            return b""
        digest = hashlib.blake2b(key=self._key, digest_size=KEY_BYTES)
        reads: frozenset[str] = getattr(guard, "reads", CONTEXT)
        around = [getattr(context, name) if name in reads else "" for name in sorted(CONTEXT)]
        for part in (guard.name, guard.version, context.tenant, stage, *around, text):
            raw = part.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
        return digest.digest()

    def get(self, key: bytes) -> Judgement | None:
        """The judgement, where there is one that is not too old."""
        if not key:
            return None
        now_s = self._clock_s()
        with self._lock:
            found = self._kept.get(key)
            if found is None or now_s - found[0] >= self._ttl_s:
                self._kept.pop(key, None)
                self.misses += 1
                return None
            self._kept.move_to_end(key)
            self.hits += 1
            return found[1]

    def put(self, key: bytes, judgement: Judgement) -> None:
        """Keep a judgement."""
        if not key:
            return
        now_s = self._clock_s()
        with self._lock:
            self._kept[key] = (now_s, judgement)
            self._kept.move_to_end(key)
            while len(self._kept) > self._entries:
                self._kept.popitem(last=False)
