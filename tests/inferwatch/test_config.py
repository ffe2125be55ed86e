"""The composed configuration: precedence, and one sentence for each mistake."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from inferwatch.config import Config, describe, load
from inferwatch.settings import ConfigError


def write(folder: Path, text: str) -> Path:
    """A configuration file."""
    file = folder / "inferwatch.toml"
    file.write_text(text)
    return file


@pytest.fixture(autouse=True)
def no_outside_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shell's own INFERWATCH_… and working folder play no part."""
    monkeypatch.delenv("INFERWATCH_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)


def test_without_a_file_the_defaults_hold() -> None:
    """No file, no variable: the defaults, the same each time."""
    assert load().model_dump() == Config().model_dump()
    assert load().digest() == Config().digest()


def test_a_typo_is_answered_with_the_nearest_key(tmp_path: Path) -> None:
    """The message names file, key, table and the right key."""
    file = write(tmp_path, '[kafka]\nbootstrap_server = "127.0.0.1:9092"\n')
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value) == f"{file}: unknown key 'bootstrap_server' in [kafka]; did you mean 'bootstrap_servers'?"


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    """Two mistakes are two sentences."""
    file = write(tmp_path, "[kafka]\nbootsrap_servers = 'x:1'\n[detect.latency]\nwindow_z = 5\nmin_calls = 'many'\n")
    with pytest.raises(ConfigError) as caught:
        load(file)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any("'window_z' in [detect.latency]; did you mean 'window_s'?" in line for line in lines)
    assert any("detect.latency.min_calls" in line for line in lines)


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    """A key that is like nothing known lists what is known."""
    file = write(tmp_path, "[zzzzzz]\n")
    with pytest.raises(ConfigError, match=r"unknown key 'zzzzzz' in the top level; known there: broker, collector"):
        load(file)


def test_a_bad_value_is_never_repeated(tmp_path: Path) -> None:
    """A secret pasted into the wrong place does not come back in the message."""
    file = write(tmp_path, '[kafka]\nsasl_password_file = 7\ntopic_prefix = "hunter2 hunter2"\n')
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert "hunter2" not in str(caught.value)
    assert "kafka.topic_prefix" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"[kafka\n", "not valid TOML"), (b"\xff\xfe", "can't be read (UnicodeDecodeError)")],
)
def test_what_is_no_toml_is_said_in_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    """A broken file gives a sentence with its name."""
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: {sentence}")


def test_a_missing_file_that_was_named_is_an_error(tmp_path: Path) -> None:
    """A default name may be absent, a given one may not."""
    with pytest.raises(ConfigError, match=r"no such configuration file"):
        load(tmp_path / "gone.toml")


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INFERWATCH_TABLE__KEY overrides."""
    file = write(tmp_path, '[kafka]\nbootstrap_servers = "127.0.0.1:1"\ntopic_prefix = "mine"\n')
    monkeypatch.setenv("INFERWATCH_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:2")
    config = load(file)
    assert (config.kafka.bootstrap_servers, config.kafka.topic_prefix) == ("127.0.0.1:2", "mine")


def test_the_digest_tells_configurations_apart(tmp_path: Path) -> None:
    """One changed setting, another digest."""
    assert load(write(tmp_path, "[detect.latency]\nwindow_s = 30\n")).digest() != Config().digest()


def test_the_digest_is_the_same_in_every_process() -> None:
    """Sets among the settings are walked in another order in each process; the digest is not moved by it."""
    program = "from inferwatch.config import Config; print(Config().digest())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(1, 5)
    }
    assert digests == {f"{Config().digest()}\n"}


def test_the_example_is_itself_a_sound_configuration(tmp_path: Path) -> None:
    """What `config example` prints loads, and uncommented scalars keep their defaults."""
    text = "\n".join(describe())
    assert tomllib.loads(text) is not None
    assert load(write(tmp_path, text)).digest() == Config().digest()
    assert "bootstrap_servers" in text
    assert "Undefined" not in text
