"""A transformers sequence classifier from a folder or a pinned revision, loaded so that the files can't do anything.

Weights are safetensors; a folder with a pickle in it, code of its own (`auto_map`), weights that are damaged, missing,
of another shape or no finite numbers is refused with one sentence, and so is a classifier with weights left over (an
encoder may leave its model's head unused). The tokenizer is `tokenizer.json`, read by `tokenizers` alone. Texts are
read in overlapping windows to their very end, windows of equal length in one batch. Needs torch and transformers: the
sidecar's environment or vLLM's.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from collector.guards.protocol import GuardRefused, whole, windows

_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".h5", ".msgpack"})
_WANTED: Final = ("config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json")
CLASSIFIER: Final = "AutoModelForSequenceClassification"
_JSON_BYTES_MAX: Final = 64 * 1024 * 1024
_SLICE_CHARS: Final = 16_384
_SLICE_OVERLAP_CHARS: Final = 2_048
"""Texts go to the tokenizer in slices: what it keeps of 10 MB at once would take gigabytes."""


class NotFinite(Exception):
    """The model answered with values that are no numbers. Never read as an allow."""


class ModelConfig(BaseModel):
    """Where a model comes from and how it is run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path | None = Field(None, description="Folder with config.json, tokenizer.json and *.safetensors.")
    repository: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Instead: a repository of the Hugging Face hub, fetched at start.",
    )
    revision: str | None = Field(
        None, pattern="^[0-9a-f]{40}$", description="Its commit, all 40 digits: a name such as main can change."
    )
    device: str = Field("cpu", pattern="^(cpu|cuda(:[0-9]+)?)$", description="Where it runs: cpu, cuda, cuda:1.")
    window_tokens: int = Field(
        512, ge=16, le=32_768, description="Tokens of a window, special ones included; no more than the model takes."
    )
    overlap_tokens: int = Field(128, ge=1, le=16_384, description="Tokens that a window shares with the next.")
    batch: int = Field(16, ge=1, le=1024, description="Windows judged together.")

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if self.folder is not None and self.repository is not None:
            raise ValueError("folder and repository exclude each other")
        if (self.repository is None) is not (self.revision is None):
            raise ValueError("repository and revision go together")
        if self.overlap_tokens >= self.window_tokens // 2:
            raise ValueError("overlap_tokens must be less than half of window_tokens")
        return self


def open_folder(config: ModelConfig, whose: str) -> Path:
    """The model's folder, fetched where it has to be. Raises `GuardRefused`."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise GuardRefused(
            f"the {whose} guard did not start: torch and transformers are not installed here; run it in the sidecar"
        )
    if config.folder is not None:
        return config.folder
    if config.repository is None:
        raise GuardRefused(f"the {whose} guard did not start: it needs guards.{whose}.model with folder or repository")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only where a hub is asked

    try:
        return Path(snapshot_download(config.repository, revision=config.revision, allow_patterns=list(_WANTED)))
    except Exception as problem:  # noqa: BLE001 - the hub's client raises of many kinds
        kind = type(problem).__name__
        raise GuardRefused(f"the {whose} guard did not start: {config.repository} can't be fetched ({kind})") from None


def check_folder(folder: Path) -> str:
    """The digest of all files that are read. Raises `GuardRefused` for what must not be loaded."""
    if not folder.is_dir():
        raise GuardRefused(f"{folder}: no such folder of a model")
    odd = sorted(path.name for path in folder.rglob("*") if path.suffix in _PICKLES)
    if odd:
        raise GuardRefused(f"{folder}: holds {odd[0]}, which can run code or is no safetensors; remove it")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise GuardRefused(f"{folder}: holds no *.safetensors")
    for name in ("config.json", "tokenizer.json"):
        told = read_json(folder / name)
        if "auto_map" in told:
            raise GuardRefused(f"{folder / name}: names code of its own (auto_map), which is never run")
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    for path in indexes:
        parts = read_json(path).get("weight_map")
        if not isinstance(parts, dict) or not {weight.name for weight in weights}.issuperset(map(str, parts.values())):
            raise GuardRefused(f"{path}: names files of weights that are not in the folder")
    digest = hashlib.sha256()
    for path in (folder / "config.json", folder / "tokenizer.json", *indexes, *weights):
        _check_safetensors(path)
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises `GuardRefused`."""
    try:
        if path.stat().st_size > _JSON_BYTES_MAX:
            raise GuardRefused(f"{path}: larger than {_JSON_BYTES_MAX} bytes")
        told = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise GuardRefused(f"{path}: missing, or not JSON") from None
    if not isinstance(told, dict):
        raise GuardRefused(f"{path}: not a JSON object")
    return told


def _check_safetensors(path: Path) -> None:
    """Header and size, before anything is allocated by what they say."""
    if path.suffix != ".safetensors":
        return
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - kept out of `import collector.config`

    try:
        with safe_open(path, "numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as problem:
        raise GuardRefused(f"{path}: damaged safetensors ({type(problem).__name__})") from None


class SequenceModel:
    """A loaded model. `judge` is thread-safe, one batch at a time a thread."""

    def __init__(self, config: ModelConfig, whose: str, kind: str = CLASSIFIER) -> None:
        """`kind`: the transformers class that loads it. Raises `GuardRefused`."""
        folder = open_folder(config, whose)
        self.digest = check_folder(folder)
        self.settings = read_json(folder / "config.json")
        self._config = config
        self._tokenizer = _tokenizer(folder)
        self._prefix, self._suffix = self._frame()
        self._parted = bool(self._suffix) and int(self.settings.get("type_vocab_size") or 0) > 1
        self._model = _load(folder, kind, config.device)
        limit = self.settings.get("max_position_embeddings")
        size = min(config.window_tokens, limit) if isinstance(limit, int) else config.window_tokens
        self.body_tokens = size - len(self._prefix) - len(self._suffix)

    @property
    def labels(self) -> Mapping[int, str]:
        """The model's label by index, from config.json."""
        return {int(place): str(name) for place, name in (self.settings.get("id2label") or {}).items()}

    def places(self, wanted: Sequence[str], whose: str, setting: str) -> list[int]:
        """The places of labels by name. Raises `GuardRefused` where there is none of them, or no other."""
        upper = {name.upper() for name in wanted}
        found = [place for place, name in self.labels.items() if name.upper() in upper]
        if not 0 < len(found) < len(self.labels):
            told = ", ".join(self.labels.values())[:200]
            raise GuardRefused(
                f"the {whose} guard did not start: config.json has the labels {told}; name those that mean an "
                f"attack or a bad answer, and not all, in guards.{whose}.{setting}"
            )
        return found

    def windows(self, text: str, before: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Token windows that overlap, with the model's special tokens, to the very end of the text. At least one.

        `before`: tokens that each window begins with, parted from the text by the model's last special token.
        """
        head = [] if before is None else [*before, *self._suffix]
        size = self.body_tokens - len(head)
        overlap = min(self._config.overlap_tokens, size // 3)
        for start, end in windows(len(text), _SLICE_CHARS, _SLICE_CHARS - _SLICE_OVERLAP_CHARS):
            ids = self.encode(text[start:end])
            for first, last in windows(len(ids), size, size - overlap):
                yield [*self._prefix, *head, *ids[first:last], *self._suffix]

    def encode(self, text: str) -> list[int]:
        """Tokens without special ones. Lone surrogates count as question marks."""
        ids: list[int] = self._tokenizer.encode(whole(text), add_special_tokens=False).ids
        return ids

    def forward(self, rows: Iterable[list[int]]) -> Iterator[tuple[int, Any]]:
        """(place of the row, the model's output for it as a 1-D float tensor), in no order.

        Raises `NotFinite`. Rows of equal length go together: without padding a row's result hangs on nothing else.
        """
        import torch  # noqa: PLC0415 - only in environments that have it

        by_length: dict[int, list[tuple[int, list[int]]]] = {}
        for place, row in enumerate(rows):
            waiting = by_length.setdefault(len(row), [])
            waiting.append((place, row))
            if len(waiting) == self._config.batch:
                yield from self._batch(torch, by_length.pop(len(row)))
        for waiting in by_length.values():
            yield from self._batch(torch, waiting)

    def _batch(self, torch: Any, rows: Sequence[tuple[int, list[int]]]) -> Iterator[tuple[int, Any]]:
        ids = torch.tensor([row for _, row in rows], device=self._config.device)
        more = {}
        if self._parted:  # what stands after the first separator is the second text
            ends = (ids == self._suffix[-1]).int()
            more["token_type_ids"] = (ends.cumsum(dim=1) - ends).clamp(max=1).long()
        with torch.inference_mode():
            answer = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
            values = answer.logits if hasattr(answer, "logits") else answer.last_hidden_state.mean(dim=1)
        if not torch.isfinite(values).all():
            raise NotFinite
        yield from zip((place for place, _ in rows), values.float().cpu(), strict=True)

    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        framed = self._tokenizer.encode("a", add_special_tokens=True).ids
        start = next((at for at in range(len(framed)) if framed[at : at + len(plain)] == plain), 0)
        return framed[:start], framed[start + len(plain) :]


def share_of(values: Any, places: Sequence[int]) -> float:
    """The probability of the labels at `places` by softmax, to four decimals, below which batches can differ."""
    logits = [float(value) for value in values]
    top = max(logits)
    odds = [math.exp(value - top) for value in logits]
    return round(min(1.0, sum(odds[place] for place in places) / sum(odds)), 4)


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer  # noqa: PLC0415 - comes with transformers

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # noqa: BLE001 - it raises bare Exception
        raise GuardRefused(f"{folder / 'tokenizer.json'}: no tokenizer") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load(folder: Path, kind: str, device: str) -> Any:
    """The model, every weight there, of the right shape and finite. Raises `GuardRefused`."""
    import torch  # noqa: PLC0415 - only in environments that have it
    import transformers  # noqa: PLC0415

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, told = getattr(transformers, kind).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as problem:  # noqa: BLE001 - transformers raises of many kinds
        raise GuardRefused(f"{folder}: transformers can't load it ({type(problem).__name__})") from None
    if told["missing_keys"] or told["mismatched_keys"]:
        raise GuardRefused(f"{folder}: weights are missing or of another shape; the model would guess")
    if told["unexpected_keys"] and kind == CLASSIFIER:
        raise GuardRefused(f"{folder}: holds weights that the model has no place for; config.json is another model's")
    if not all(bool(torch.isfinite(values).all()) for values in model.state_dict().values()):
        raise GuardRefused(f"{folder}: holds weights that are no finite numbers")
    return model.to(device).eval()
