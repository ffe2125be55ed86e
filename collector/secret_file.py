"""A file that holds one secret of another server's: read once, at start, and only where nobody else can read it."""

from pathlib import Path

from collector.identity import KeyProblem


def read_secret(path: Path | None, whose: str) -> str:
    """The secret; empty without a file. Raises KeyProblem: no such file, readable by others, or more than one line.

    `whose` is the subject of its sentence, as in "the upstream's key".
    """
    if path is None:
        return ""
    try:
        shared = path.stat().st_mode & 0o077
        secret = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise KeyProblem(f"{path}: {whose} can't be read") from None
    if shared:
        raise KeyProblem(f"{path}: other users can read {whose}; run chmod 600 {path}")
    if not secret.isprintable() or " " in secret or not secret:
        raise KeyProblem(f"{path}: {whose} is one line of visible characters")
    return secret
