"""Writes the model card of the injection guard from the training run itself, so that its figures can't go stale."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from collector.guards.beside import BONUS_MAX, FEATURES
from collector.guards.figures import auroc, bootstrap, tpr_at
from collector.guards.injection import BesideSpec, Channel

if TYPE_CHECKING:
    from collector.guards.train import Row, TrainedHead

_HEAD = """# Model card: the injection guard

Two logistic regressions on hashed character and word n-grams: one head for what a user types, one for fetched documents
and tool output. It knows attack *styles*. It is a first line, fast and explainable, not the only one.

- Weights: `{name}`, {size} bytes, SHA-256 `{digest}`, float16, safetensors. Seed {seed}.
- Input: one text, after `normaliser`. Output: a score in [0, 1], calibrated so that 0.5 is the shipped threshold.
- Licence of the weights: Apache-2.0. The training rows are not part of the project; their sources are below.

## Where it is weak
- A family of attacks that it has never seen is found less often than the table's random rows suggest: read the rows
  with whole families or sources left out first.
- A poisoned document whose order is a plain sentence differs from a harmless one only by its place. Treat that head as
  advice, and limit what fetched text may cause.
- An order in the words of its document does not stand out from it, and is found less often.
- Harmful requests without an attack's style are not its work: put a content classifier beside it.
- Many attacks can be told only by the system prompt that they go against. Where it is known, what the message asks of
  it is looked at (below), by words: another language, or a description instead of the name, is not seen.
- Long roles that operators write look like jailbreaks when a user pastes them.
- An adversary who can try many variants will find one that passes; repeated tries are what the probing detector is for.
"""


def card(
    heads: "Mapping[Channel, TrainedHead]", beside: BesideSpec, rows: "Sequence[Row]", raw: bytes, seed: int
) -> str:
    """The card, in Markdown."""
    parts = [
        _HEAD.format(name="injection.safetensors", size=len(raw), digest=hashlib.sha256(raw).hexdigest(), seed=seed)
    ]
    for channel, head in heads.items():
        parts.append(_head_section(channel, head))
    parts += [_beside(beside), _sources(rows)]
    return "\n".join(parts)


def _head_section(channel: Channel, head: "TrainedHead") -> str:
    spec, data = head.spec, head.data
    group = "family" if channel == "user" else "source"
    windows = f"windows of {spec.window} characters every {spec.step}"
    if spec.sentence:
        windows = (
            f"sentences and lines of at least {spec.sentence} characters, longer ones in {windows}; {spec.stand_out:g} "
            "is taken off the margin of one whose words all stand elsewhere in the document, too"
        )
    about = (
        f"{spec.char_min}–{spec.char_max} characters and 1–{spec.word_max} words, {spec.buckets} buckets, {windows}. "
        f"The threshold is at margin {spec.threshold:.2f}. 95 % bootstrap intervals."
    )
    lines = [
        f"\n## The {channel} head",
        about,
        "",
        "| left out | attacks | harmless | AUROC | TPR at 1 % FPR | TPR at 3 % FPR | TPR, FPR at the threshold |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    runs = [(f"whole {group}, pooled", head.group_margins)]
    if channel == "user":
        runs.append(("rows at random", head.margins))
    for name, margins in runs:
        known = np.isfinite(margins)
        attacks, harmless = margins[known & (data.labels == 1)], margins[known & (data.labels == 0)]
        figures = " | ".join(
            str(bootstrap(figure, attacks, harmless)) for figure in (auroc, tpr_at(0.01), tpr_at(0.03))
        )
        at = f"{(attacks >= spec.threshold).mean():.3f}, {(harmless >= spec.threshold).mean():.4f}"
        lines.append(f"| {name} | {len(attacks)} | {len(harmless)} | {figures} | {at} |")
    lines += ["", *_by_group("language", "langs", head), "", *_by_group("family", "families", head)]
    return "\n".join(lines) + "\n"


def _beside(beside: BesideSpec) -> str:
    about = (
        "What is added to the margin of a message for what it asks of its system prompt (`beside.py`), each feature in "
        f"[0, 1], the sum from 0 to {BONUS_MAX:g}. Fitted to pairs of our own; it can only raise a score."
    )
    lines = [
        "\n## Beside the system prompt",
        about,
        "",
        "| feature | weight |",
        "| --- | --- |",
        *(f"| {name} | {weight:.2f} |" for name, weight in zip(FEATURES, beside.weights, strict=True)),
    ]
    return "\n".join(lines) + "\n"


def _by_group(title: str, column: str, head: "TrainedHead") -> list[str]:
    """Shares above the threshold by language (harmless rows) or by family (both classes)."""
    values, known = getattr(head.data, column), np.isfinite(head.margins)
    if column == "langs":
        known &= head.data.labels == 0
    lines = [f"| {title} | rows | above the threshold |", "| --- | --- | --- |"]
    for name, count in sorted(Counter(values[known].tolist()).items(), key=lambda item: (-item[1], item[0])):
        if count >= 20:
            share = (head.margins[known & (values == name)] >= head.spec.threshold).mean()
            lines.append(f"| {name} | {count} | {share:.3f} |")
    return lines


def _sources(rows: "Sequence[Row]") -> str:
    """One line for each repository at its commit; what follows the colon is a file within it."""
    lines = ["\n## Sources and licences", "| source | licence | rows | attacks |", "| --- | --- | --- | --- |"]
    counts = Counter((row.source.partition(":")[0], row.licence) for row in rows)
    attacks = Counter((row.source.partition(":")[0], row.licence) for row in rows if row.label)
    for (source, licence), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"| {source} | {licence} | {count} | {attacks[source, licence]} |")
    return "\n".join(lines) + "\n"
