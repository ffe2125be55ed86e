"""Sealing bytes that may hold text, so that only the holder of a key can read them: dead letters are kept this way.

AES-SIV (RFC 5297) from the `cryptography` library: the same bytes at the same place always seal to the same bytes, so
a repeated write changes nothing, and there is no nonce to get wrong. The place is authenticated: a sealed text moved to
another record does not open.
"""

from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

KEY_BYTES: Final = 64
"""AES-256 in both halves."""
SEALED_BYTES_MAX: Final = 64 * 1024
"""Of the raw bytes; what is longer is cut."""


class NotOpened(ValueError):
    """The sealed bytes are not whole, not of this place, or of another key."""


class Seal:
    """One key. Never shows it."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a sealing key has {KEY_BYTES} bytes, not {len(key)}")
        self._cipher = AESSIV(key)

    @classmethod
    def from_file(cls, file: Path) -> "Seal":
        """The key in `file`: 128 hex digits, as `openssl rand -hex 64` makes them. ValueError says what is wrong."""
        try:
            key = bytes.fromhex(file.read_text(encoding="ascii").strip())
        except OSError as error:
            raise ValueError(f"cannot read the sealing key {file}: {error.strerror}") from None
        except ValueError:  # its own message would quote the key
            raise ValueError(f"the sealing key {file} is not {2 * KEY_BYTES} hex digits") from None
        if len(key) != KEY_BYTES:
            raise ValueError(f"the sealing key {file} is not {2 * KEY_BYTES} hex digits")
        return cls(key)

    def seal(self, raw: bytes, place: bytes) -> bytes:
        """At most the first 64 KiB of `raw`, sealed; 16 bytes longer than what went in."""
        return self._cipher.encrypt(raw[:SEALED_BYTES_MAX], [place])

    def open(self, sealed: bytes, place: bytes) -> bytes:
        """What `seal` was given, at most 64 KiB of it. Raises NotOpened."""
        try:
            return self._cipher.decrypt(sealed, [place])
        except (InvalidTag, ValueError):
            raise NotOpened("these bytes were not sealed for this place with this key") from None
