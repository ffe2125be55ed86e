"""Key epochs of a tenant on disk: which there are, a new one, and the end of an old one.

`KEY_DIR/TENANT.key` is the epoch of now, `TENANT.EPOCH.key` are earlier ones, named by the fingerprint that events
carry as `key_epoch`. An epoch begins when its file was written. A running collector takes a new `TENANT.key` up within
`reload_s`; a file in a mounted secret is rotated where that is managed.

What a crash leaves: a rotation changes `TENANT.key` by one rename, so there is the old epoch or the new one, and the
old key is kept in either case. Losing power after `rotate` returned loses nothing.
"""

import os
import re
import secrets
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from collector.identity import KeyProblem, check_tenant, create_key_file, epoch_of, load_key

DAY_S: Final = 86_400


class Epoch(NamedTuple):
    """One key of a tenant."""

    name: str
    path: Path
    begun: datetime
    current: bool


def epochs(key_dir: Path, tenant: str) -> list[Epoch]:
    """The epochs whose keys are there, oldest first, the current one last. Raises KeyProblem: none, or a bad file."""
    check_tenant(tenant)
    current = _epoch(key_dir / f"{tenant}.key", current=True)
    earlier = [_epoch(path, current=False) for path in key_dir.glob(f"{tenant}.e_*.key")]
    for each in earlier:
        if each.path.name != f"{tenant}.{each.name}.key":
            raise KeyProblem(f"{each.path}: this key is that of epoch {each.name}: it was changed or renamed")
    return [*sorted((each for each in earlier if each.name != current.name), key=lambda each: each.begun), current]


def _epoch(path: Path, *, current: bool) -> Epoch:
    name = epoch_of(load_key(path))
    return Epoch(name, path, datetime.fromtimestamp(path.stat().st_mtime, UTC), current)


def rotate(key_dir: Path, tenant: str, *, now_s: float, age_min_s: float) -> tuple[str, str]:
    """Begin a new epoch: (the epoch before, the new one). The old key stays beside it.

    Raises KeyProblem where the current epoch is younger than `age_min_s`: windows that reach back would be cut twice.
    """
    path = key_dir / f"{tenant}.key"
    before = epochs(key_dir, tenant)[-1]
    _refuse_link(path)
    age_s = now_s - before.begun.timestamp()
    if age_s < age_min_s:
        raise KeyProblem(
            f"epoch {before.name} of {tenant} is {age_s / DAY_S:.1f} days old, and one lasts {age_min_s / DAY_S:g}"
            " (collector.identity.epoch_days_min), so that windows are not cut: wait, or say --early"
        )
    fresh = path.with_suffix(".key.new")
    try:
        create_key_file(fresh)
    except KeyProblem:
        raise KeyProblem(f"{fresh} exists: a rotation is under way, or one died; then remove that file") from None
    try:
        with suppress(FileExistsError):  # an earlier rotation died between its two steps
            path.with_name(f"{tenant}.{before.name}.key").hardlink_to(path)
        after = epoch_of(load_key(fresh))
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _sync(key_dir)
    return before.name, after


def find(key_dir: Path, tenant: str, epoch: str, *, now_s: float, overlap_s: float) -> Epoch:
    """An earlier epoch that may be destroyed: not the current one, and out of use since `overlap_s`.

    Raises KeyProblem.
    """
    check_tenant(tenant)
    current = _epoch(key_dir / f"{tenant}.key", current=True)
    if epoch == current.name:
        raise KeyProblem(f"{epoch} is the current epoch of {tenant}: rotate first, then shred it")
    named = _half_shredded(key_dir, tenant, epoch)
    if named is None:
        found = epochs(key_dir, tenant)
        named = next((each for each in found if each.name == epoch), None)
    if named is None:
        names = ", ".join(each.name for each in found)
        raise KeyProblem(f"there is no key of epoch {epoch[:64]!r} of {tenant} in {key_dir}: there are {names}")
    _refuse_link(named.path)
    free_s = current.begun.timestamp() + overlap_s
    if now_s < free_s:
        free = datetime.fromtimestamp(free_s, UTC)
        raise KeyProblem(f"collectors may use {epoch} until {free:%Y-%m-%d %H:%M} UTC (epoch_overlap_s): shred it then")
    return named


def _half_shredded(key_dir: Path, tenant: str, epoch: str) -> Epoch | None:
    """An epoch whose file holds no key any more: its shredding died, and is to be done again."""
    path = key_dir / f"{tenant}.{epoch}.key"
    if not re.fullmatch("e_[0-9a-f]{8}", epoch) or not path.is_file():
        return None
    try:
        load_key(path)
    except KeyProblem:
        return Epoch(epoch, path, datetime.fromtimestamp(path.stat().st_mtime, UTC), current=False)
    return None


def shred(epoch: Epoch) -> None:
    """Destroy a key that `find` gave: written over with random bytes, synced, cut to nothing, removed.

    That is as far as a file reaches: copies, backups, snapshots and what a disk keeps of old blocks are not touched.
    Raises OSError where it failed half-way; then do it again.
    """
    handle = os.open(epoch.path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.write(handle, secrets.token_bytes(os.fstat(handle).st_size))
        os.fsync(handle)
        os.ftruncate(handle, 0)
        os.fsync(handle)
    finally:
        os.close(handle)
    epoch.path.unlink()
    _sync(epoch.path.parent)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise KeyProblem(f"{path} is a link, as in a mounted secret: change the key where that is managed")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
