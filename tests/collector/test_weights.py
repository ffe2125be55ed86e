"""The model's name and revision: what changes it, what does not, and what it gives away."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from collector import weights
from collector.weights import Model, folder_digest, identify


def config(model: str, **fields: Any) -> Any:
    """vLLM's model config, as far as it is read."""
    return SimpleNamespace(
        **{"model": model, "served_model_name": model, "revision": None, "hf_config": None, **fields}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local model."""
    made = tmp_path / "llama"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "config.json").write_text("{}")
    return made


def test_a_hubs_commit_is_the_revision() -> None:
    """The SHA, not the branch that was asked for."""
    known = config("org/name", revision="main", hf_config=SimpleNamespace(_commit_hash="c0ffee"))
    assert identify(known) == Model("org/name@c0ffee")
    assert identify(config("/cache/models--a/snapshots/c0ffee", served_model_name="name")) == Model("name@c0ffee")
    assert identify(config("org/name", revision="v2")) == Model("org/name@v2")


def test_a_local_folder_is_told_by_its_content_and_not_by_its_path(folder: Path) -> None:
    """One changed byte of weights or config is another version; other files are not."""
    first = identify(config(str(folder)))
    assert first.version.startswith("llama@")
    assert str(folder.parent) not in first.version
    (folder / "notes.txt").write_text("x")
    assert identify(config(str(folder))) == first
    (folder / "model.safetensors").write_bytes(b"weighty")
    second = identify(config(str(folder)))
    (folder / "config.json").write_text('{"a":1}')
    assert len({first, second, identify(config(str(folder)))}) == 3


def test_a_folder_too_large_to_read_is_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest says that it is of samples; size, first and last bytes count."""
    monkeypatch.setattr(weights, "FULL_BYTES_MAX", 1)
    first = folder_digest(folder)
    assert first.startswith("samples:")
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert folder_digest(folder) != first
