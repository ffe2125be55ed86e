"""Makes the bank of the similarity guard, and says how it would do.

A fifth of the attacks is left out once, to see how many of them the rest would find, and how many harmless rows it
takes for attacks: the figures to choose `similar` by. The bank itself holds all attacks, as numbers.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from collector.guards.normaliser import normalise
from collector.guards.similarity import KNOWN_ATTACK, METADATA_KEY, Embedder, Floats, ModelEmbedder

LEFT_OUT: Final = 5
"""One attack in so many."""


class Figures(NamedTuple):
    """What a bank finds at `similar`."""

    attacks: int
    rows: int
    similar: float
    left_out_found: tuple[int, int]
    """Of the attacks left out: how many the rest finds, and how many they are."""
    harmless_flagged: tuple[int, int]


def read_rows(paths: Iterable[Path]) -> tuple[list[str], list[str]]:
    """(attacks, harmless texts) of JSONL files: `text`, `label` 0 for harmless. Raises ValueError, naming the line."""
    texts: tuple[list[str], list[str]] = ([], [])
    for path in paths:
        raw = path.read_bytes()
        lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row: Any = json.loads(line)
                text, harmless = str(row["text"]), row.get("label", 1) == 0
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path.name} line {number}: no row with a text") from None
            texts[harmless].append(text)
    return texts


def make_bank(
    attacks: Sequence[str],
    harmless: Sequence[str],
    embed: Embedder | ModelEmbedder,
    similar: float,
    tick: Callable[[int, int], object],
) -> tuple[bytes, Figures]:
    """The bank's file and its figures. `tick` is told how many of how many texts are done.

    Raises ValueError without an attack.
    """
    if not attacks:
        raise ValueError("a bank needs at least one attack")
    total = 1 + len(attacks) + len(harmless)
    rows: list[Floats] = []
    for text in (KNOWN_ATTACK, *attacks, *harmless):
        rows.append(embed(normalise(text).text))
        tick(len(rows), total)
    made, fine = rows[: 1 + len(attacks)], rows[1 + len(attacks) :]
    kept = np.concatenate([one for place, one in enumerate(made) if place % LEFT_OUT])
    found = [float((one @ kept.T).max()) >= similar for one in made[LEFT_OUT::LEFT_OUT]]
    flagged = [float((one @ kept.T).max()) >= similar for one in fine]
    bank = np.concatenate(made)
    counts = (sum(found), len(found)), (sum(flagged), len(flagged))
    return bank_bytes(bank, embed.digest), Figures(len(attacks), len(bank), similar, *counts)


def bank_bytes(rows: Floats, embedding: str) -> bytes:
    """The bank's file: one tensor, and the embedding's name."""
    from safetensors.numpy import save  # noqa: PLC0415 - the command only

    return bytes(save({"rows": rows.astype(np.float16)}, {METADATA_KEY: embedding}))
