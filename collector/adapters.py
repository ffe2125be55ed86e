"""Which LoRA adapters may answer, and their digests: what was loaded before the gate opened, and nothing after it.

A path that no digest is known for is refused once the register is sealed, so an adapter that a client names, or that a
resolver finds while the server runs, never answers. Without a gate (`run-batch`, offline) the register stays open: who
writes the program chooses its adapters, and each has its digest in the event all the same.
"""

import threading
from pathlib import Path

from collector.weights import folder_digest


class AdapterRefused(ValueError):
    """An adapter that may not answer: one sentence says why."""


class Adapters:
    """The register of one process. Thread-safe; reads an adapter's files once."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._sealed = False
        self._lock = threading.Lock()

    def seal(self) -> None:
        """From here on nothing new is admitted."""
        self._sealed = True

    def admit(self, path: str) -> str:
        """The adapter's digest, `sha256:HEX`, empty where it is no local folder. Raises `AdapterRefused`. Blocking."""
        with self._lock:
            if path in self._digests:
                return self._digests[path]
            if self._sealed:
                raise AdapterRefused("this adapter is not among those that the server was started with")
            folder = Path(path)
            if folder.is_dir() and not any(folder.glob("*.safetensors")):
                raise AdapterRefused("this adapter has no safetensors file; a pickle can run code when it is loaded")
            self._digests[path] = folder_digest(folder) if folder.is_dir() else ""
            return self._digests[path]
