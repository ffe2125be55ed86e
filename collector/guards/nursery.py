"""Where the sidecar's workers come from: a process that has loaded everything and read nothing forks each of them.

So a worker is there in the time that its guards take to be built, whatever Python and its modules take to load. The
kernel ends the nursery with the sidecar, and each worker with the nursery.
"""

import ctypes
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import Final

from collector import cores
from collector.guards.sidecar_worker import serve

_PID: Final = struct.Struct(">Q")
_PR_SET_PDEATHSIG: Final = 1


class NurseryGone(RuntimeError):
    """The nursery has ended, so no worker can be replaced."""


class Born:
    """A worker's process, and this end of the line to it."""

    def __init__(self, pid: int, line: socket.socket) -> None:
        self.pid, self.line = pid, line
        self._process: int | None = None
        with suppress(ProcessLookupError):  # it has ended already
            self._process = os.pidfd_open(pid)

    def kill(self) -> None:
        """End it, whatever it does; nobody else, though its number may have been given away."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def close(self) -> None:
        """It has ended."""
        if self._process is not None:
            os.close(self._process)
            self._process = None


class Nursery:
    """Made before there is an event loop, a thread or a text."""

    def __init__(self) -> None:
        self._line, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            self._line.close()
            end_with_parent()
            cores.forbid()
            _nurse(its)
            os._exit(0)
        its.close()

    def spawn(self) -> Born:
        """A worker; blocks for the milliseconds of a fork. Raises NurseryGone."""
        ours, its = socket.socketpair()
        try:
            socket.send_fds(self._line, [b"w"], [its.fileno()])
            told = self._line.recv(_PID.size)
        except OSError:
            told = b""
        finally:
            its.close()
        if not told:
            ours.close()
            raise NurseryGone("the process that forks the sidecar's workers has ended")
        return Born(int(_PID.unpack(told)[0]), ours)

    def close(self) -> None:
        """No more of them."""
        self._line.close()


def _nurse(line: socket.socket) -> None:
    """Fork a worker for each line that comes, until the sidecar ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the sidecar, which then closes the lines
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    while True:
        _, lines, _, _ = socket.recv_fds(line, 1, 1)
        if not lines:
            return
        pid = os.fork()
        if pid == 0:
            line.close()
            _work(lines[0])
        os.close(lines[0])
        line.send(_PID.pack(pid))


def _work(number: int) -> None:
    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    status = 1
    try:
        serve(socket.socket(fileno=number))
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the sidecar has gone
    finally:
        sys.stderr.flush()
        os._exit(status)


def end_with_parent() -> None:
    """The kernel kills this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
