"""The sidecar: guards outside the server's process, so that what they need and what they do to it stays theirs.

Four kinds of processes, each forked from the one before, which the kernel ends with it: this one, the keeper, holds the
listening socket and starts the front again when it dies; the front (`sidecar_front`) talks with servers; the nursery
forks workers; the workers judge (`sidecar_worker`). Only workers have guards; keeper and nursery never see a text.
"""

import os
import signal
import socket
import time
from typing import Final, NoReturn

import structlog

from collector import cores
from collector.guards.config import GuardsConfig
from collector.guards.nursery import end_with_parent
from collector.guards.protocol import GuardRefused
from collector.guards.sidecar_front import serve
from collector.guards.sidecar_socket import listen

log = structlog.get_logger(__name__)

_PAUSE_S: Final = 0.5
"""Between two fronts of which the first lived no longer."""
_SENTENCE_BYTES_MAX: Final = 4096
_STOPS: Final = (signal.SIGTERM, signal.SIGINT)


class _Keeper:
    """Starts fronts, one after the other."""

    def __init__(self, config: GuardsConfig, listener: socket.socket) -> None:
        self._config, self._listener = config, listener
        self._front, self._stopping = 0, False
        for number in _STOPS:
            signal.signal(number, self._stop)

    def run(self) -> None:
        """Until told to stop. Raises GuardRefused where the front refuses."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # none comes between the look and the fork
        while not self._stopping:
            began_s = time.monotonic()
            told, its = os.pipe()
            self._front = os.fork()
            if self._front == 0:
                os.close(told)
                self._be_front(its)
            os.close(its)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
            with os.fdopen(told, "rb") as refusal:
                said = refusal.read(_SENTENCE_BYTES_MAX).decode("utf-8", "replace")
            _, status = os.waitpid(self._front, 0)
            if said:
                raise GuardRefused(said)
            if not self._stopping:
                log.error("the sidecar's front ended and is started again", status=os.waitstatus_to_exitcode(status))
                time.sleep(_PAUSE_S if time.monotonic() - began_s < _PAUSE_S else 0)
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)

    def _stop(self, number: int, _: object) -> None:
        self._stopping = True
        if self._front:
            os.kill(self._front, number)

    def _be_front(self, telling: int) -> NoReturn:
        status = 1
        try:
            end_with_parent()
            for number in _STOPS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
            serve(self._config, self._listener)
            status = 0
        except GuardRefused as refused:
            os.write(telling, str(refused).encode()[:_SENTENCE_BYTES_MAX])
        except Exception as problem:  # noqa: BLE001 - its words may quote what was asked
            log.error("the sidecar's front failed", error=type(problem).__name__)  # noqa: TRY400 - nor its trace
        finally:
            os._exit(status)


def run_sidecar(config: GuardsConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises GuardRefused, OSError with one sentence."""
    cores.forbid()
    listener = listen(config.sidecar)
    try:
        _Keeper(config, listener).run()
    finally:
        listener.close()
        if not config.sidecar.host:
            config.sidecar.socket.unlink(missing_ok=True)
