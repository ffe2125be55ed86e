"""Which model answers: its name and the revision of its weights, worked out once at start.

A model from a hub has a commit SHA. A local folder gets a digest over its safetensors and config files: of every byte
up to a bound, beyond it of evenly spaced samples, which tells versions apart but is no proof against forgery.
"""

import hashlib
from pathlib import Path
from typing import Any, Final, NamedTuple

FULL_BYTES_MAX: Final = 2 * 1024**3
"""Folders up to this size are read whole: some seconds."""
_SAMPLES: Final = 256
_SAMPLE_BYTES: Final = 65_536


class Model(NamedTuple):
    """The model as events name it."""

    version: str
    """`NAME@REVISION`."""
    digest: str = ""
    """`sha256:HEX` over a local folder's files, or `samples:HEX` where it was too large to read; else empty."""


def identify(model_config: Any) -> Model:
    """The model of vLLM's model config: the name it is served under, and its revision."""
    served = model_config.served_model_name
    name = str(served if isinstance(served, str) else served[0])
    # A path would tell of the host; its last part names the model well enough.
    name = Path(name).name if "/" in name and Path(name).exists() else name
    folder = Path(model_config.model)
    commit = getattr(getattr(model_config, "hf_config", None), "_commit_hash", None)
    if not commit and folder.parent.name == "snapshots":
        commit = folder.name
    if not commit and folder.is_dir():
        digest = folder_digest(folder)
        return Model(f"{name}@{digest.partition(':')[2][:16]}"[:256], digest)
    return Model(f"{name}@{commit or model_config.revision or 'unknown'}"[:256])


def folder_digest(folder: Path) -> str:
    """A digest of the folder's `*.safetensors` and `*.json` files, by name, size and content."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json") and file.is_file())
    total = sum(file.stat().st_size for file in files)
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            if total <= FULL_BYTES_MAX:
                digest.update(hashlib.file_digest(content, "sha256").digest())
                continue
            for sample in range(_SAMPLES):
                content.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return f"{'sha256' if total <= FULL_BYTES_MAX else 'samples'}:{digest.hexdigest()}"
