"""Which adapters may answer."""

from pathlib import Path

import pytest

from collector.adapters import AdapterRefused, Adapters


def adapter(folder: Path, content: bytes, name: str = "adapter_model.safetensors") -> str:
    """An adapter's folder with one file."""
    folder.mkdir()
    (folder / name).write_bytes(content)
    return str(folder)


def test_what_was_loaded_before_the_gate_opened_may_answer_and_nothing_after_it(tmp_path: Path) -> None:
    """The digest is of the files; once sealed, another path is refused."""
    known = Adapters()
    one, two = adapter(tmp_path / "one", b"1"), adapter(tmp_path / "two", b"2")
    digest = known.admit(one)
    known.seal()
    assert digest.startswith("sha256:")
    assert known.admit(one) == digest
    with pytest.raises(AdapterRefused, match="not among those"):
        known.admit(two)


def test_other_weights_are_another_digest(tmp_path: Path) -> None:
    """Two adapters of one name are told apart."""
    known = Adapters()
    assert known.admit(adapter(tmp_path / "a", b"1")) != known.admit(adapter(tmp_path / "b", b"2"))


def test_an_adapter_in_a_pickle_is_refused(tmp_path: Path) -> None:
    """Loading it could run code."""
    with pytest.raises(AdapterRefused, match="pickle"):
        Adapters().admit(adapter(tmp_path / "a", b"1", "adapter_model.bin"))
