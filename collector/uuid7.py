"""Ids that sort by time and can't be guessed: UUIDv7, RFC 9562."""

import os
import time
from collections import deque
from collections.abc import Callable
from typing import Final

_RANDOM_BYTES: Final = 10
_drawn: Final[deque[bytes]] = deque()
"""Randomness drawn for many ids at once: each call to the kernel lets other threads take the interpreter."""
os.register_at_fork(after_in_child=_drawn.clear)


def _system_random() -> bytes:
    while True:
        try:
            return _drawn.popleft()  # one thread alone gets it
        except IndexError:
            drawn = os.urandom(_RANDOM_BYTES * 128)
            _drawn.extend(drawn[at : at + _RANDOM_BYTES] for at in range(0, len(drawn), _RANDOM_BYTES))


_VARIANT: Final = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))
"""A random digit with its two upper bits as the RFC wants them."""


def uuid7(clock_ns: Callable[[], int] = time.time_ns, random_bytes: Callable[[], bytes] = _system_random) -> str:
    """A UUIDv7 (RFC 9562): 48 bits of milliseconds, 74 of randomness. Unguessable, sorts by time.

    `random_bytes`: gives 10 bytes.
    """
    ms, drawn = f"{clock_ns() // 1_000_000:012x}", random_bytes().hex()
    return f"{ms[:8]}-{ms[8:]}-7{drawn[1:4]}-{_VARIANT[drawn[4]]}{drawn[5:8]}-{drawn[8:]}"
