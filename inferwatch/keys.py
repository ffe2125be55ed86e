"""Keys on disk: a tenant's key for hashes and pseudonyms, and API keys of clients, which are stored only as digests."""

import os
from pathlib import Path

from collector.identity import KeyProblem, create_key_file, new_api_key


def create_tenant_key(key_dir: Path, tenant: str) -> Path:
    """Makes the key that a tenant's hashes and pseudonyms are under. Raises KeyProblem where it exists."""
    file = key_dir / f"{tenant}.key"
    create_key_file(file)
    return file


def add_api_key(file: Path | None, *, tenant: str, user: str, on_behalf: bool) -> tuple[str, str]:
    """Makes an API key and adds its digest to `file`; returns (secret, key id). The secret is kept nowhere.

    Raises KeyProblem where no file is configured or the name can't stand in it.
    """
    if file is None:
        raise KeyProblem("no file for API keys is configured: set collector.identity.api_keys_file")
    for name in (user, tenant):
        if not name.isprintable() or '"' in name or "\\" in name:
            raise KeyProblem("the name of a user or tenant has printable characters only, no quote and no backslash")
    secret, key_id, table = new_api_key(user=user, tenant=tenant, on_behalf=on_behalf)
    lines = [f"[{key_id}]", *(f"{name} = {_toml(value)}" for name, value in table.items()), "", ""]
    file.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8") as out:
        out.write("\n".join(lines))
    return secret, key_id


def _toml(value: str | bool) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else f'"{value}"'
