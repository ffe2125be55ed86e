"""Key epochs: a new one in a running collector, an overlap that cuts nobody's windows, and the end of an old one."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from collector import epochs as epochs_module
from collector.audit import EngineRequest
from collector.config import CollectorConfig, JournalConfig
from collector.context import exchange
from collector.epochs import DAY_S, Epoch, epochs, find, rotate, shred
from collector.event import AnyRecord, Change, decode
from collector.guards.config import GuardsConfig
from collector.identity import KeyProblem, Pseudonyms, create_key_file, load_key
from collector.kafka import KafkaConfig, read_topic
from collector.overlap import Overlap
from collector.startup import open_auditor
from collector.weights import Model
from tests.collector.doors import Site, ask, make_site


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with one tenant's key, 100 days old."""
    create_key_file(tmp_path / "default.key")
    age(tmp_path / "default.key", 100)
    return tmp_path


def age(path: Path, days: float) -> None:
    """As if the file had been written so many days ago."""
    moment = time.time() - days * DAY_S
    os.utime(path, (moment, moment))


def turn(keys: Path, tenant: str = "default") -> tuple[str, str]:
    """A rotation whatever the age."""
    return rotate(keys, tenant, now_s=time.time(), age_min_s=0)


def test_a_rotation_keeps_the_old_key_and_begins_a_new_one(keys: Path) -> None:
    """Oldest first, the current last; each file has the name of its key; all are private."""
    first = load_key(keys / "default.key")
    before, after = rotate(keys, "default", now_s=time.time(), age_min_s=90 * DAY_S)
    found = epochs(keys, "default")
    assert [(each.name, each.current, each.path.name) for each in found] == [
        (before, False, f"default.{before}.key"),
        (after, True, "default.key"),
    ]
    assert before == Pseudonyms(first).epoch != after
    assert load_key(found[0].path) == first
    assert {each.path.stat().st_mode & 0o777 for each in found} == {0o600}
    assert sorted(path.name for path in keys.iterdir()) == sorted(each.path.name for each in found)


def test_an_epoch_lasts_as_long_as_the_longest_window(keys: Path) -> None:
    """A second rotation on the next day is refused with what to do; nothing has changed."""
    turn(keys)
    before = epochs(keys, "default")
    with pytest.raises(KeyProblem, match=r"0\.0 days old, and one lasts 90 .*--early"):
        rotate(keys, "default", now_s=time.time(), age_min_s=90 * DAY_S)
    assert epochs(keys, "default") == before


@pytest.mark.parametrize("step", ["hardlink_to", "replace"])
def test_a_rotation_that_dies_leaves_the_old_epoch_and_can_be_repeated(
    keys: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step fails, the current key is the one before, and no other file stays in the way."""
    before = epochs(keys, "default")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, step, fail)
        with pytest.raises(OSError, match="No space"):
            turn(keys)
    assert epochs(keys, "default") == before
    assert turn(keys)[0] == before[0].name
    assert len(epochs(keys, "default")) == 2


def test_a_rotation_killed_in_the_middle_is_named(keys: Path) -> None:
    """Two at once would lose a key that is in use: the second is told of the first's file."""
    (keys / "default.key.new").touch()
    with pytest.raises(KeyProblem, match="under way, or one died; then remove that file"):
        turn(keys)


def test_links_and_renamed_keys_are_refused(tmp_path: Path) -> None:
    """A mounted secret is changed where it is managed; a key under another epoch's name is no such key."""
    create_key_file(tmp_path / "real")
    (tmp_path / "default.key").symlink_to("real")
    with pytest.raises(KeyProblem, match="is a link"):
        turn(tmp_path)
    create_key_file(tmp_path / "default.e_00000000.key")
    with pytest.raises(KeyProblem, match="changed or renamed"):
        epochs(tmp_path, "default")


@pytest.mark.parametrize("tenant", ["", "..", "a/b", "default.e_1"])
def test_a_tenant_is_no_path_here_either(keys: Path, tenant: str) -> None:
    """Nothing outside of the folder is rotated."""
    with pytest.raises(KeyProblem, match="a tenant's name"):
        turn(keys, tenant)


def test_tenants_whose_names_begin_alike_have_epochs_of_their_own(keys: Path) -> None:
    """`default-2` is not an epoch of `default`."""
    create_key_file(keys / "default-2.key")
    turn(keys, "default-2")
    turn(keys)
    assert [len(epochs(keys, tenant)) for tenant in ("default", "default-2")] == [2, 2]


# -- shredding


def test_a_shredded_key_is_gone_and_was_written_over(keys: Path) -> None:
    """Whoever still holds the file finds nothing in it; the other epoch is untouched."""
    before, after = turn(keys)
    age(keys / "default.key", 2)
    found = find(keys, "default", before, now_s=time.time(), overlap_s=DAY_S)
    old = load_key(found.path)
    written: list[bytes] = []
    real = os.write
    held = os.open(found.path, os.O_RDONLY)
    epochs_module.os.write = lambda handle, raw: (written.append(raw), real(handle, raw))[1]  # type: ignore[assignment]
    try:
        shred(found)
    finally:
        epochs_module.os.write = real
    assert os.read(held, 4096) == b""
    os.close(held)
    assert [len(raw) for raw in written] == [65]
    assert old.hex().encode() not in written[0]
    assert [each.name for each in epochs(keys, "default")] == [after]


@pytest.mark.parametrize("step", ["fsync", "ftruncate"])
def test_a_shredding_that_died_is_done_again(keys: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the file is no key; it is found by its name, and goes."""
    before, after = turn(keys)

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    def named() -> Epoch:
        return find(keys, "default", before, now_s=time.time(), overlap_s=0)

    with monkeypatch.context() as patched:
        patched.setattr(os, step, fail)
        with pytest.raises(OSError, match="Input/output"):
            shred(named())
    shred(named())
    assert [each.name for each in epochs(keys, "default")] == [after]


def test_what_may_not_be_shredded(keys: Path) -> None:
    """The current epoch; one that a collector may still use; one that is not there."""
    before, after = turn(keys)

    def problem(epoch: str, overlap_s: float = 0) -> str:
        with pytest.raises(KeyProblem) as caught:
            find(keys, "default", epoch, now_s=time.time(), overlap_s=overlap_s)
        return str(caught.value)

    assert problem(after) == f"{after} is the current epoch of default: rotate first, then shred it"
    assert f"collectors may use {before} until" in problem(before, DAY_S)
    assert "there is no key of epoch '../x'" in problem("../x")
    assert f"there are {before}, {after}" in problem("e_00000000")


# -- in a running collector


async def test_a_running_collector_goes_over_without_a_restart_and_tells_of_it(tmp_path: Path) -> None:
    """One change event with both epochs; the next stranger to the window has the new key; a request is of one key."""
    site = make_site(tmp_path, epoch_idle_s=0)
    known: list[dict[str, Any]] = []
    told: list[dict[str, str]] = []
    real = site.app.__call__

    async def rotating(scope: Any, receive: Any, send: Any) -> None:
        at_hand = exchange.get()
        if at_hand is not None and not told:
            turn(site.config.key_dir)
            told.extend(site.look())
        if at_hand is not None:
            audit = site.auditor.open(EngineRequest("generate", "<s>hello</s>"))
            known.append(dict(audit._known))
            audit.close("ok")
        await real(scope, receive, send)

    site.gate._app = rotating
    for _ in range(2):
        assert (await ask(site, ("x-api-key", site.api_key))).status_code == 200
    old, new = [Pseudonyms(load_key(each.path)) for each in epochs(site.config.key_dir, "default")]
    assert told == [{"subject": "key_epoch", "before": old.epoch, "after": new.epoch, "tenant": "default"}]
    for fields, names in zip(known, (old, new), strict=True):
        assert {name: fields[name] for name in ("key_epoch", "user_id", "prompt_hash", "turn_hash", "minhash")} == {
            "key_epoch": names.epoch,
            "user_id": names.user("alice"),
            "prompt_hash": names.digest("<s>hello</s>"),
            "turn_hash": names.digest("hello"),
            "minhash": names.minhash("hello"),
        }


@pytest.mark.kafka
def test_a_rotation_is_told_on_the_log(tmp_path: Path, kafka_config: KafkaConfig) -> None:
    """A whole collector on a real broker, its watch running: one `change` event with both epochs, and it stays up."""
    site = make_site(tmp_path, reload_s=0.1)
    config = CollectorConfig(
        collector_id="c",
        identity=site.config,
        journal=JournalConfig(dir=tmp_path / "journal"),
        guards=GuardsConfig(order=()),
    )
    auditor = open_auditor(kafka_config, config, Model("m@1", "sha256:" + "0" * 64))
    before, after = turn(site.config.key_dir)
    end_s = time.monotonic() + 60
    while auditor.identity.names("default").epoch != after and time.monotonic() < end_s:
        time.sleep(0.05)
    assert auditor.stop(60)

    async def read() -> list[AnyRecord]:
        return [decode(message.value or b"") async for message in read_topic(kafka_config, "events")]

    changes = [record for record in asyncio.run(read()) if isinstance(record, Change)]
    assert [(each.subject, each.before, each.after, each.tenant) for each in changes] == [
        ("key_epoch", before, after, "default")
    ]


def test_who_is_in_the_middle_of_something_keeps_his_pseudonym_until_he_pauses(tmp_path: Path) -> None:
    """Steps under the idle time keep the old one, across hours; a pause ends it for good; then all is forgotten."""
    site = make_site(tmp_path, epoch_idle_s=600, epoch_overlap_s=7_200)
    now = [1_000.0]
    site.identity.monotonic_s = lambda: now[0]
    old = site.identity.names("default")
    turn(site.config.key_dir)
    site.look()
    new = Pseudonyms(load_key(site.config.key_dir / "default.key"))

    def epoch(user: str, after_s: float) -> str:
        now[0] = 1_000 + after_s
        names = site.identity.names("default", user)
        assert names.user(user) == {old.epoch: old, new.epoch: new}[names.epoch].user(user)
        return {old.epoch: "old", new.epoch: "new"}[names.epoch]

    assert [epoch("probing", after_s) for after_s in (1, 599, 1_100, 1_699)] == ["old"] * 4
    assert epoch("paused", 1_700) == "new"
    assert epoch("probing", 1_701) == "old"
    assert [epoch("probing", after_s) for after_s in (2_301, 2_302, 2_303)] == ["new"] * 3
    assert epoch("", 2_303) == "new"
    assert site.identity._overlaps == {}


def test_the_overlap_ends_and_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody keeps the old key beyond it; users beyond the bound go over sooner, and are never wrong for longer."""
    monkeypatch.setattr("collector.overlap.USERS_MAX", 3)
    old, new = Pseudonyms(bytes(32)), Pseudonyms(bytes(range(32)))
    overlap = Overlap(old, 0, idle_s=10, overlap_s=50)
    for n in range(100):
        assert overlap.names(f"u{n}", new, 5) is old
    assert len(overlap._active) == 3
    assert overlap.names("u99", new, 11) is new
    for moment_s in range(5, 50, 5):
        assert overlap.names("u0", new, moment_s) is old
    assert overlap.names("u0", new, 50) is new
    assert overlap.over(50)


def test_a_bad_new_key_changes_nothing(site: Site) -> None:
    """The collector goes on under the old key, and the change event says `refused`."""
    path = site.config.key_dir / "default.key"
    epoch = site.identity.names("default").epoch
    path.write_text("short")
    assert [(each["subject"], each["before"], each["after"]) for each in site.look()] == [
        ("key_epoch", epoch, "refused")
    ]
    assert site.identity.names("default", "alice").epoch == epoch


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A gate with API keys."""
    return make_site(tmp_path)
