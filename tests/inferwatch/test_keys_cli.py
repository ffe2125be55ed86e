"""`inferwatch keys`: API keys that are renewed, revoked and limited; epochs that are rotated and destroyed."""

import json
import re
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from collector.epochs import epochs
from collector.identity import KeyProblem, KeyRing, NotKnown
from collector.limits import Limit
from inferwatch.keys import add_api_key, change_api_key, successor
from tests.inferwatch.test_cli import run, said

CONFIG = """\
[collector.identity]
key_dir = "keys"
api_keys_file = "api-keys.toml"
[kafka]
bootstrap_servers = "127.0.0.1:9"
[streams]
broker_timeout_s = 0.5
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration and a tenant's key."""
    (tmp_path / "inferwatch.toml").write_text(CONFIG)
    assert run("keys", "create", "default", folder=tmp_path).returncode == 0
    return tmp_path


def test_a_key_from_its_making_to_its_end(folder: Path) -> None:
    """Made with limits, renewed with an overlap, revoked: each step by a command, each secret shown once."""
    made = run("keys", "api", "--user", "al ice", "--expires", "90d", "--requests-per-minute", "600", folder=folder)
    assert made.returncode == 0, made.stderr
    file = folder / "api-keys.toml"
    (old_id,) = tomllib.loads(file.read_text())
    renewed = run("keys", "renew", old_id, "--overlap", "7d", folder=folder)
    assert renewed.returncode == 0, renewed.stderr
    old, new = made.stdout.strip(), renewed.stdout.strip()
    now = datetime.now(UTC)
    ring = KeyRing.load(file)
    for secret in (old, new):
        owner = ring.owner(secret, now.timestamp())
        assert owner is not None
        assert (owner.user, owner.limit) == ("al ice", Limit(requests_per_minute=600))
    with pytest.raises(NotKnown, match="expired_key"):
        ring.owner(old, (now + timedelta(days=8)).timestamp())
    assert ring.owner(new, (now + timedelta(days=8000)).timestamp()) is not None
    new_id = next(key for key in tomllib.loads(file.read_text()) if key != old_id)
    assert run("keys", "revoke", new_id, folder=folder).returncode == 0
    with pytest.raises(NotKnown, match="revoked_key"):
        KeyRing.load(file).owner(new, now.timestamp())
    assert old not in file.read_text() + made.stderr + renewed.stderr
    assert said(run("keys", "revoke", "key_nobody", folder=folder)).endswith("there is no API key 'key_nobody'")


def test_renewing_a_key_gives_the_old_one_no_more_time_and_the_new_one_all_its_rights(tmp_path: Path) -> None:
    """One that has ended stays dead, one that ends tomorrow ends tomorrow; 0 is no limit, also in the new table."""
    now, file = datetime.now(UTC).replace(microsecond=0), tmp_path / "keys.toml"
    for days in (-30, 1):
        ends, limit = now + timedelta(days=days), Limit(requests_per_minute=0, concurrent=3)
        old, key_id = add_api_key(
            file, tenant="default", user="alice", on_behalf=False, not_before=now - timedelta(days=60), expires=ends,
            limit=limit,
        )  # fmt: skip
        new, _, said_to_end = successor(file, key_id, now + timedelta(days=7), expires=None)
        ring = KeyRing.load(file)
        owner = ring.owner(new, now.timestamp())
        assert (said_to_end, owner and owner.limit) == (ends, limit)
        with pytest.raises(NotKnown, match="expired_key"):
            ring.owner(old, ends.timestamp())


WRITTEN = '''\
# our keys
[ key_a ] # alice
sha256 = "{0}"   # made by hand
user = "alice"
expires = 2030-01-01T00:00:00Z
[key_a.limits]
concurrent = 3

[key_b]
sha256 = "{1}"
user = """
[key_a]
"""
'''


def test_what_people_wrote_into_the_file_stays(tmp_path: Path) -> None:
    """Comments, order and other tables are as they were; only the one field is another."""
    file = tmp_path / "keys.toml"
    file.write_text(WRITTEN.format("a" * 64, "b" * 64))
    with pytest.raises(KeyProblem, match=r"\[key_a\] is written so that no machine can change it"):
        change_api_key(file, "key_a", "revoked", value=True)  # a second line reads like its head
    plain = WRITTEN.format("a" * 64, "b" * 64).replace('"""\n[key_a]\n"""', '"bob"')
    file.write_text(plain)
    before = tomllib.loads(plain)
    change_api_key(file, "key_a", "expires", datetime(2027, 5, 6, 7, 8, 9, 99, tzinfo=UTC))
    change_api_key(file, "key_b", "revoked", value=True)
    text = file.read_text()
    assert text.startswith("# our keys\n[ key_a ] # alice\nexpires = 2027-05-06T07:08:09Z\nsha256")
    before["key_a"]["expires"] = datetime(2027, 5, 6, 7, 8, 9, tzinfo=UTC)
    before["key_b"]["revoked"] = True
    assert tomllib.loads(text) == before


def test_a_file_that_a_collector_would_refuse_is_never_written(tmp_path: Path) -> None:
    """A bad name or an end before the beginning: the file stays as it was, and no other is left beside it."""
    file = tmp_path / "keys.toml"
    _, key_id = add_api_key(file, tenant="default", user="alice", on_behalf=False)
    before = file.read_text()
    now = datetime.now(UTC)
    with pytest.raises(KeyProblem):
        add_api_key(file, tenant="../x", user="alice", on_behalf=False)
    with pytest.raises(KeyProblem, match="expires before it begins"):
        add_api_key(file, tenant="default", user="a", on_behalf=False, not_before=now, expires=now)
    with pytest.raises(KeyProblem, match="no API key"):
        successor(file, "key_none", now, expires=None)
    assert (file.read_text(), list(tmp_path.iterdir())) == (before, [file])
    file.rename(tmp_path / "real.toml")
    file.symlink_to("real.toml")
    with pytest.raises(KeyProblem, match="is a link"):
        change_api_key(file, key_id, "revoked", value=True)


def test_epochs_are_rotated_and_listed(folder: Path) -> None:
    """A young epoch needs --early; the list says which is the current one."""
    assert "wait, or say --early" in said(run("keys", "rotate", "default", folder=folder))
    assert run("keys", "rotate", "default", "--early", folder=folder).returncode == 0
    rows = json.loads(run("keys", "epochs", "--json", folder=folder).stdout)
    assert [(row["epoch"], row["current"]) for row in rows] == [
        (each.name, each.current) for each in epochs(folder / "keys", "default")
    ]
    listed = run("keys", "epochs", folder=folder).stdout.splitlines()
    assert re.fullmatch(rf"{rows[1]['epoch']}  \d{{4}}-\d\d-\d\d \d\d:\d\d UTC  current", listed[1])


def test_a_key_is_destroyed_only_by_an_operator_who_means_it_and_is_on_record(folder: Path) -> None:
    """Without an operator, the word, or Kafka to record it on, the key stays."""
    run("keys", "rotate", "default", "--early", folder=folder)
    old = epochs(folder / "keys", "default")[0].name
    shred = ("keys", "shred", "default", old, "--reason", "retention")
    assert "until" in said(run(*shred, folder=folder))
    config = folder / "inferwatch.toml"
    config.write_text(config.read_text().replace("[kafka]", "epoch_overlap_s = 0\nreload_s = 3600\n[kafka]"))
    assert "until" in said(run(*shred, folder=folder)), "a collector may not have seen the new key yet"
    config.write_text(config.read_text().replace("reload_s = 3600", "reload_s = 0.1"))
    assert "name the operator" in said(run(*shred, folder=folder))
    config.write_text(config.read_text() + run("keys", "operator", "alice", folder=folder).stdout)
    asked = run(*shred, folder=folder)
    assert asked.returncode == 1
    assert "has been the key of default since" in asked.stdout
    assert "no Kafka at 127.0.0.1:9" in said(run(*shred, "--yes", folder=folder))
    assert epochs(folder / "keys", "default")[0].name == old
