"""The key that signs checkpoints: made, loaded, replaced. Ed25519.

The file is text: the private key as 64 hexadecimal digits; after a rotation a second line with the id of the key before
and that key's signature over the new one. So whoever loads the file can show that the old key named the new one, though
the old private key is gone.
"""

import hashlib
import os
import stat
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from collector.chain import rotation_bytes

KEY_HEX_DIGITS: Final = 64


class SigningKeyProblem(RuntimeError):
    """The signing key can't be made or used. The message never quotes it."""


def key_id_of(public_key: str) -> str:
    """The name of a key, from its public half: 16 hexadecimal digits of its SHA-256."""
    return "sk_" + hashlib.sha256(bytes.fromhex(public_key)).hexdigest()[:16]


def signed_by(public_key: str, signature: str, said: bytes) -> bool:
    """Whether the key's owner signed these bytes. False for anything malformed."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), said)
    except (InvalidSignature, ValueError):
        return False
    return True


class Signer:
    """One private key. Never shows it."""

    def __init__(self, private: bytes, before: str = "", signed_before: str = "") -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self.public_key = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
        self.key_id = key_id_of(self.public_key)
        self.before, self.signed_before = before, signed_before
        """The id of the key that this one replaced, and its signature; empty where there was none."""

    def sign(self, said: bytes) -> str:
        """The signature, hexadecimal."""
        return self._key.sign(said).hex()

    @classmethod
    def load(cls, file: Path) -> "Signer":
        """The key in `file`. Raises SigningKeyProblem, one sentence."""
        try:
            with file.open("rb") as opened:
                shared = stat.S_IMODE(os.fstat(opened.fileno()).st_mode) & 0o077
                lines = opened.read(4096).decode("ascii", "replace").splitlines()
        except FileNotFoundError:
            raise SigningKeyProblem(f"{file}: no such signing key; `inferwatch keys signing` makes one") from None
        except OSError as error:
            raise SigningKeyProblem(f"{file} can't be read: {error.strerror}") from None
        if shared:
            raise SigningKeyProblem(f"{file} can be read by others: chmod 600 {file}")
        rotated = lines[1].split() if len(lines) > 1 else []
        try:
            private = bytes.fromhex(lines[0]) if lines else b""
        except ValueError:  # its own message would quote the key
            private = b""
        if len(private) * 2 != KEY_HEX_DIGITS or len(rotated) not in {0, 2}:
            raise SigningKeyProblem(f"{file} holds no signing key as `inferwatch keys signing` makes it")
        return cls(private, *rotated)


def create_signing_key(file: Path) -> Signer:
    """Make a key, mode 0600. Raises SigningKeyProblem where the file exists."""
    private = os.urandom(KEY_HEX_DIGITS // 2)
    try:
        _write(file, private.hex())
    except FileExistsError:
        raise SigningKeyProblem(f"{file} exists: --rotate replaces the key") from None
    return Signer(private)


def rotate_signing_key(file: Path) -> Signer:
    """Replace the key by a new one that the old one names; the old private key is gone. Raises SigningKeyProblem."""
    old, private = Signer.load(file), os.urandom(KEY_HEX_DIGITS // 2)
    new = Signer(private)
    signature = old.sign(rotation_bytes(old.key_id, new.public_key))
    beside = file.with_name(file.name + ".new")
    beside.unlink(missing_ok=True)
    _write(beside, f"{private.hex()}\n{old.key_id} {signature}")
    beside.replace(file)
    return Signer(private, old.key_id, signature)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as out:
        out.write(text + "\n")
        out.flush()
        os.fsync(out.fileno())
