"""The keys of operators: who may acknowledge, suppress and announce. Ed25519; the private half stays with its owner."""

import base64
import os
import re
import stat
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from collector.identity import KeyProblem
from detectors.config import OPERATOR_NAME, CommandsConfig

FOLDER = "operators"


def create_operator_key(folder: Path, name: str) -> tuple[Path, str]:
    """Makes NAME.pem in `folder`, mode 0600, and returns it with the public key. Raises KeyProblem where it exists."""
    if not re.fullmatch(OPERATOR_NAME, name):
        raise KeyProblem("the name of an operator has 1 to 64 letters, digits, dots, dashes and underscores")
    key, file = Ed25519PrivateKey.generate(), folder / f"{name}.pem"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise KeyProblem(f"{file} exists: remove it first, and its public key from the configuration") from None
    with os.fdopen(handle, "wb") as out:
        out.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return file, public_half(key)


def load_operator(folder: Path, name: str, file: Path | None, config: CommandsConfig) -> tuple[str, Ed25519PrivateKey]:
    """The operator that commands are signed as, and his key: NAME's in `folder`, or that in `file`.

    Without a name, whose key is the only one in `folder`. Raises KeyProblem, one sentence.
    """
    if file is None:
        file = folder / f"{name}.pem" if name else _only(folder)
    name = name or file.stem
    try:
        with file.open("rb") as opened:
            shared = stat.S_IMODE(os.fstat(opened.fileno()).st_mode) & 0o077
            raw = opened.read(65_536)
    except FileNotFoundError:
        raise KeyProblem(f"{file}: no such key; `inferwatch keys operator {name}` makes one") from None
    except OSError as error:
        raise KeyProblem(f"{file} can't be read: {error.strerror}") from None
    if shared:
        raise KeyProblem(f"{file} can be read by others: chmod 600 {file}")
    try:
        key = serialization.load_pem_private_key(raw, password=None)
    except (ValueError, TypeError):
        raise KeyProblem(f"{file} holds no private key as `inferwatch keys operator` makes it") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyProblem(f"{file} holds a key of another kind than Ed25519")
    if config.operators.get(name) != public_half(key):
        raise KeyProblem(
            f'the configuration knows no operator {name} with this key: add {name} = "{public_half(key)}"'
            " to [detect.commands.operators], there and where stage 2 runs"
        )
    return name, key


def public_half(key: Ed25519PrivateKey) -> str:
    """As it stands in the configuration."""
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return base64.b64encode(raw).decode()


def _only(folder: Path) -> Path:
    files = sorted(folder.glob("*.pem"))
    if len(files) != 1:
        found = ", ".join(file.stem for file in files) or "none"
        raise KeyProblem(f"name the operator with --operator; keys in {folder}: {found}")
    return files[0]
