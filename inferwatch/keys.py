"""Keys on disk: a tenant's key for hashes and pseudonyms, and API keys of clients, which are stored only as digests.

The file of API keys is changed by rename, under a lock on its folder: a running collector reads the old file or the new
one, and two commands at once lose nothing. Comments in it stay.
"""

import fcntl
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from collector.identity import KeyProblem, KeyRing, check_tenant, create_key_file, new_api_key, read_key_tables
from collector.limits import Limit

Value: TypeAlias = str | bool | int | datetime | dict[str, int]


def create_tenant_key(key_dir: Path, tenant: str) -> Path:
    """Makes the key that a tenant's hashes and pseudonyms are under. Raises KeyProblem: it exists, or it is no name."""
    check_tenant(tenant)
    file = key_dir / f"{tenant}.key"
    create_key_file(file)
    return file


def add_api_key(
    file: Path | None,
    *,
    tenant: str,
    user: str,
    on_behalf: bool,
    not_before: datetime | None = None,
    expires: datetime | None = None,
    limit: Limit | None = None,
) -> tuple[str, str]:
    """Makes an API key and adds its digest to `file`; returns (secret, key id). The secret is kept nowhere.

    Raises KeyProblem where no file is configured or the name can't stand in it.
    """
    path = configured(file)
    for name in (user, tenant):
        if not name.isprintable() or '"' in name or "\\" in name:
            raise KeyProblem("the name of a user or tenant has printable characters only, no quote and no backslash")
    secret, key_id, table = new_api_key(user=user, tenant=tenant, on_behalf=on_behalf)
    bounds = {} if limit is None else {name: getattr(limit, name) for name in limit.__struct_fields__}
    limits = {name: bound for name, bound in bounds.items() if bound is not None}
    more: dict[str, Value | None] = {"not_before": not_before, "expires": expires, "limits": limits or None}
    fields = {name: value for name, value in {**table, **more}.items() if value is not None}
    lines = [f"[{key_id}]", *(f"{name} = {_toml(value)}" for name, value in fields.items()), "", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        _write(path, before + ("\n" if before and not before.endswith("\n") else "") + "\n".join(lines))
    return secret, key_id


def successor(
    file: Path | None, key_id: str, expires_old: datetime, *, expires: datetime | None
) -> tuple[str, str, datetime]:
    """A second key for the owner of `key_id`, with the same rights and limits; the first ends at `expires_old`.

    Returns (secret, key id, end of the first). Until then both are good; one that ends sooner anyhow still does, so no
    key comes back to life. Raises KeyProblem where there is no such key.
    """
    path = configured(file)
    table = _table(path, key_id)
    limits = table.get("limits")
    made = add_api_key(
        path,
        tenant=str(table.get("tenant", "default")),
        user=str(table["user"]),
        on_behalf=bool(table.get("on_behalf", False)),
        expires=expires,
        limit=Limit(**limits) if isinstance(limits, dict) else None,
    )
    ends = table.get("expires")
    if isinstance(ends, datetime) and ends <= expires_old:
        return *made, ends
    change_api_key(path, key_id, "expires", expires_old)
    return *made, expires_old


def change_api_key(file: Path | None, key_id: str, field: str, value: Value) -> None:
    """Sets one field of an API key. Raises KeyProblem where there is no such key, or it can't be changed by machine."""
    path = configured(file)
    value = value.replace(microsecond=0) if isinstance(value, datetime) else value
    with _locked(path):
        wanted = read_key_tables(path)
        wanted[key_id] = {**_table(path, key_id), field: value}
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        heads = [n for n, line in enumerate(lines) if re.match(rf"\s*\[\s*{re.escape(key_id)}\s*\]", line)]
        if len(heads) == 1:
            head = heads[0]
            rest = lines[head + 1 :]
            end = next((n for n, line in enumerate(rest) if line.lstrip().startswith("[")), len(rest))
            kept = [line for line in rest[:end] if not re.match(rf"\s*{field}\s*=", line)]
            text = "\n".join([*lines[: head + 1], f"{field} = {_toml(value)}", *kept, *rest[end:]])
        if not _says(text, wanted):
            raise KeyProblem(f"{path}: [{key_id}] is written so that no machine can change it: edit it yourself")
        _write(path, text)


def configured(file: Path | None) -> Path:
    """The file of API keys. Raises KeyProblem where none is configured."""
    if file is None:
        raise KeyProblem("no file for API keys is configured: set collector.identity.api_keys_file")
    return file


def _table(path: Path, key_id: str) -> dict[str, Value]:
    table = read_key_tables(path).get(key_id)
    if not isinstance(table, dict):
        raise KeyProblem(f"{path}: there is no API key {key_id[:64]!r}")
    return table


def _says(text: str, tables: Mapping[str, object]) -> bool:
    try:
        return tomllib.loads(text) == tables
    except tomllib.TOMLDecodeError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    """By rename, once a collector would take it. Raises KeyProblem."""
    if path.is_symlink():
        raise KeyProblem(f"{path} is a link, as in a mounted secret: change it where that is managed")
    KeyRing(tomllib.loads(text))
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    fresh = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    fresh.chmod(mode)
    fresh.replace(path)


def _toml(value: Value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {number}" for name, number in value.items()) + " }"
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else f'"{value}"'
