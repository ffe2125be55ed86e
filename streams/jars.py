"""Apache Kafka's jars: fetched once by their Maven coordinates, verified before every use.

`jgo.toml` names what we want, `jgo.lock.toml` beside it what that resolved to: each jar's coordinates and SHA-256, no
address. Jars lie in the user's cache folder under the lock's own digest, so two versions never mix and any number of
projects share them. A jar whose bytes are not the lock's is refused by name.

To renew the lock: change `jgo.toml`, run `jgo lock` in a copy of this folder, and commit both files.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

LOCK_FILE: Final = Path(__file__).with_name("jgo.lock.toml")
_FETCHES_AT_ONCE: Final = 4
_REQUEST_TIMEOUT_S: Final = 30

Progress = Callable[[int, int, str], None]
"""Told (jars done, jars in all, name of the last) while they are fetched."""


class JarError(RuntimeError):
    """Kafka's jars can't be had, or one is not what the lock file says."""


class Jar(NamedTuple):
    """One jar of the lock."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Its name in the cache folder."""
        return f"{self.artifact}-{self.version}.jar"


def locked_jars(lock_file: Path = LOCK_FILE) -> list[Jar]:
    """The jars that the lock names. Raises JarError where the lock can't be read."""
    try:
        rows = tomllib.loads(lock_file.read_text(encoding="utf-8"))["dependencies"]
        return [Jar(row["groupId"], row["artifactId"], row["version"], row["sha256"]) for row in rows]
    except (OSError, KeyError, ValueError) as error:
        raise JarError(f"{lock_file} is no lock file of Kafka's jars ({type(error).__name__}: {error})") from None


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/inferwatch`, or `~/.cache/inferwatch`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "inferwatch"


def classpath(cache: Path, progress: Progress, *, lock_file: Path = LOCK_FILE) -> list[Path]:
    """Verified paths of all jars, fetched first where `cache` has none.

    Safe when several processes call it at once: one fetches, the others wait. Needs the network only to fetch.
    Raises JarError.
    """
    jars = locked_jars(lock_file)
    digest = hashlib.sha256("\n".join(sorted(jar.sha256 for jar in jars)).encode()).hexdigest()[:16]
    folder = cache / f"kafka-{digest}"
    try:
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with _only_one(cache / f"kafka-{digest}.lock"):
                if not folder.is_dir():
                    _fetch_all(jars, folder, progress)
        _verify(jars, folder)
    except OSError as error:
        raise JarError(f"cannot keep Kafka's jars in {folder}: {error}") from None
    return [folder / jar.file_name for jar in jars]


@contextmanager
def _only_one(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file, also by a crash, gives the lock back


def _verify(jars: list[Jar], folder: Path) -> None:
    remedy = f"delete {folder} and start again to fetch the jars anew"
    with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
        for jar, digest in zip(jars, pool.map(lambda jar: _sha256(folder / jar.file_name), jars), strict=True):
            if digest is None:
                raise JarError(f"{jar.file_name} is missing: {remedy}")
            if digest != jar.sha256:
                raise JarError(f"{jar.file_name} is not the jar that the lock file names (SHA-256 {digest}): {remedy}")


def _sha256(file: Path) -> str | None:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _fetch_all(jars: list[Jar], folder: Path, progress: Progress) -> None:
    """Fetch into a folder beside, verify, and rename: `folder` is whole or absent."""
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
            for done, jar in enumerate(pool.map(lambda jar: _fetch(jar, staging), jars), start=1):
                progress(done, len(jars), jar.file_name)
        shutil.rmtree(staging / "repository")
        _verify(jars, staging)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fetch(jar: Jar, staging: Path) -> Jar:
    try:
        from jgo.config import GlobalSettings  # noqa: PLC0415  # the embedded extra; not needed once jars are there
        from jgo.maven import MavenContext  # noqa: PLC0415
    except ImportError:
        raise JarError("fetching Kafka's jars needs jgo: pip install 'inferwatch[embedded]'") from None
    # The user's own jgo settings may name a mirror.
    mirrors = GlobalSettings.load().repositories or None
    context = MavenContext(
        repo_cache=staging / "repository", local_repos=[], remote_repos=mirrors, timeout=_REQUEST_TIMEOUT_S
    )
    try:
        found = context.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve()
    except (OSError, RuntimeError, AssertionError) as error:  # requests' errors are OSErrors
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise JarError(
            f"cannot fetch {jar.file_name} ({reason}): the first start of the broker needs the network once"
        ) from None
    found.rename(staging / jar.file_name)
    return jar
