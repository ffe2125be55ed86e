"""Keeps prompts out of crash dumps: they are in memory while they are answered."""

import resource
from contextlib import suppress
from pathlib import Path

_FILTER = Path("/proc/self/coredump_filter")


def forbid() -> None:
    """No core file of this process and its children from now on.

    A core that is piped to a program is made whatever the limit says; the filter (core(5)) leaves all memory out of it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    with suppress(OSError):  # no such file outside Linux
        _FILTER.write_text("0", encoding="ascii")
