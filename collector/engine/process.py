"""What one server process holds: at most one auditor, the engine's own count, and the adapters that may answer."""

import atexit
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, cast

from collector.adapters import Adapters
from collector.audit import Unaudited
from collector.auditor import Auditor
from collector.context import exchange
from collector.reconcile import Tally
from collector.weights import Model, identify

MARK: Final = "__inferwatch__"
"""Set on every method that is wrapped."""
GRPC_SERVER: Final = "vllm.entrypoints.launchers.grpc_server"
Opener = Callable[[Model], Auditor]
"""Opens this process's auditor: its publisher is started, its guards are up. Blocking; raises with one sentence."""


class Process:
    """One a process: `current`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.opener: Opener | None = None
        self.auditor: Auditor | None = None
        self.tally = Tally()
        self.adapters = Adapters()
        self.closed = False

    def open(self, engine: Any) -> Auditor:
        """The auditor, opened on the first call: blocking, some seconds.

        Raises Unaudited, and what the opener raises.
        """
        if exchange.get() is None and GRPC_SERVER in sys.modules:
            raise Unaudited  # the gRPC server has no gate, whichever way it was asked for
        with self.lock:
            if self.closed or self.opener is None:
                raise Unaudited
            if self.auditor is None:
                self.auditor = self.opener(identify(cast(Any, engine).model_config))
                self.auditor.publisher.counters.tally = self.tally
                atexit.register(self.close)
            return self.auditor

    def close(self) -> None:
        """Stop the publisher with its goodbyes. Once; engine requests after it are refused."""
        with self.lock:
            self.closed = True
            auditor, self.auditor = self.auditor, None
        if auditor is not None:
            auditor.stop()


current: Final = Process()
