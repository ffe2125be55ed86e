"""The sidecar's door: a Unix socket that only its own user and root can open, or a port on loopback."""

import contextlib
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Final

from collector.guards.protocol import GuardRefused
from collector.guards.sidecar_config import SidecarConfig

BACKLOG: Final = 128
"""Connections that wait to be taken."""


def peer_uid(sock: socket.socket) -> int:
    """The user of the process at the other end of a Unix socket, as the kernel saw it connect or listen."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])


def listen(config: SidecarConfig) -> socket.socket:
    """The listening socket. Raises GuardRefused where another sidecar has it or the place is not safe, OSError."""
    if config.host:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
    else:
        listener = _unix_listener(config.socket)
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


def _unix_listener(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = path.parent.stat().st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX:
        raise GuardRefused(f"{path.parent}: others may write there and put a socket of their own; run chmod go-w")
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking, contextlib.suppress(OSError):
            asking.connect(str(path))
            raise GuardRefused(f"{path}: another sidecar serves here")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as problem:
        raise GuardRefused(f"{path}: can't listen there ({problem.strerror or problem})") from None
    finally:
        os.umask(before)
    return listener
