"""Trains the injection guard: `inferwatch guards train DATA_DIR --out FILE`.

DATA_DIR holds `*.jsonl` or `*.jsonl.gz` files, a row a line: text, label (0 harmless, 1 attack), family, lang,
channel (user or document), source, licence. Texts of our own (`authored`) are added. The same data and seed give the
same bytes. Beside FILE it writes FILE's model card with the figures of this very run.

How: two logistic regressions on `ngrams`, families evened out, so that a large collection doesn't drown a small one,
and both classes alike. Only a window of an attack document holds the attack: it is fitted repeatedly, and
the worst window of each is kept (Andrews et al. 2003, multiple-instance learning). Thresholds come from rows that were
left out of the fit, alone or with their whole family (user) or source (document).
"""

import gzip
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from collector.guards.among import shared
from collector.guards.authored import AuthoredRow, Pair, draw, draw_documents, draw_pairs
from collector.guards.beside import features
from collector.guards.injection import METADATA_KEY, BesideSpec, Channel, HeadSpec, WeightsSpec
from collector.guards.model_card import card
from collector.guards.ngrams import FORMAT, Buckets, NgramSpec, buckets_of, cut, share
from collector.guards.normaliser import normalise

SOURCE_OWN: Final = "authored (this project)"
SPECS: Final[Mapping[Channel, NgramSpec]] = {
    "user": NgramSpec(buckets=260_000, char_min=1, char_max=4, word_max=2, window=600, step=300),
    "document": NgramSpec(buckets=260_000, char_min=1, char_max=4, word_max=2, window=250, step=125, sentence=40),
}
STAND_OUT: Final[Mapping[Channel, float]] = {"user": 0.0, "document": 2.0}
"""What is taken off the margin of a window whose words all stand elsewhere in its row, too."""
EVENING: Final[Mapping[Channel, float]] = {"user": 1.0, "document": 0.5}
"""A row weighs its family's size to minus this power: at 1 each family the same, at 0 each row."""
FOLDS: Final = 6
FALSE_POSITIVE_RATE: Final[Mapping[Channel, float]] = {"user": 0.0075, "document": 0.01}
FALSE_POSITIVE_RATE_LANGUAGE: Final = 0.03
LANGUAGE_ROWS_MIN: Final = 60
SEVERAL: Final = "ml"
"""What rows of no one language are marked with."""
OTHER_CHANNEL_WEIGHT: Final = 0.3
INVERSE_L2: Final[Mapping[Channel, float]] = {"user": 10.0, "document": 3.0}
PAIRS_PER_KIND: Final = 400
"""Messages under system prompts, of each label and kind of prompt."""
CHANCE_PAIRS: Final = 4_000
"""Harmless messages under system prompts of others."""
ROUNDS: Final = 2
NOT_FOR: Final[Mapping[Channel, frozenset[str]]] = {
    # Notes about attacks, no attacks. A plain request is poison only where it stands in a document.
    "user": frozenset({"inj_patt", "ind_naive"}),
    "document": frozenset({"inj_patt"}),
}
SUFFIX_CHARS_MIN: Final = 30
"""Adversarial suffixes shorter than this are noise that any line of code resembles."""
SYSTEM_PROMPTS: Final = "b_sysprompt"
"""What operators write: trained on as harmless, but left out where a threshold for users is chosen."""

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Row(msgspec.Struct, frozen=True):
    """One training text."""

    text: str
    label: int
    family: str
    lang: str
    channel: Channel
    source: str
    licence: str


class BadTrainingData(ValueError):
    """The data can't be trained on. One sentence with the file and line, never the text."""


def load_rows(folder: Path) -> list[Row]:
    """All rows of the folder, files in name order. Raises `BadTrainingData`."""
    files = sorted(path for path in folder.glob("*") if path.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise BadTrainingData(f"no .jsonl or .jsonl.gz file in {folder}")
    decoder = msgspec.json.Decoder(Row)
    rows = []
    for path in files:
        raw = path.read_bytes()
        lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise BadTrainingData(f"{path.name} line {number} is no training row") from None
            if row.label not in (0, 1) or not row.text.strip():
                raise BadTrainingData(f"{path.name} line {number}: label must be 0 or 1 and text must not be empty")
            rows.append(row)
    return rows


def own_rows(seed: int) -> list[Row]:
    """The texts of our own, attacks and look-alikes, as rows of both channels."""
    drawn: dict[Channel, Iterable[AuthoredRow]] = {
        "user": draw(seed, attacks_per_technique=150, benign_per_kind=200, per_language=80),
        "document": draw_documents(seed, per_kind=250),
    }
    return [
        Row(text, label, family, lang, channel, SOURCE_OWN, "Apache-2.0")
        for channel, rows in drawn.items()
        for text, label, family, lang in rows
    ]


def wanted_rows(rows: Sequence[Row], channel: Channel) -> list[Row]:
    """The rows that a channel's head is trained on, those of the other channel included."""
    return [
        row
        for row in rows
        if row.family not in NOT_FOR[channel] and not (row.family == "jb_suffix" and len(row.text) < SUFFIX_CHARS_MIN)
    ]


@dataclass(frozen=True)
class Corpus:
    """Rows as windows of features, for one head."""

    rows: Sequence[Row]
    windows: Any
    """CSR matrix (windows, buckets); each n-gram of a window as `share` says."""
    known: Floats
    """(windows,): the share of a window's words that the rest of its row has (`among`)."""
    row_of: NDArray[np.int64]
    """(windows,): the row each window belongs to."""
    labels: NDArray[np.int64]
    channels: NDArray[np.str_]
    families: NDArray[np.str_]
    sources: NDArray[np.str_]
    langs: NDArray[np.str_]


def corpus(rows: Sequence[Row], spec: NgramSpec) -> Corpus:
    """The features of all rows. Memory: 12 bytes for each distinct n-gram of each window."""
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]  # noqa: PLC0415 - training only; no stubs

    indices: list[Buckets] = []
    known: list[float] = []
    counts = []
    for row in rows:
        folded, spans = cut(normalise(row.text).text, spec)
        indices += buckets_of(folded, spans, spec)
        known += shared(folded, spans)
        counts.append(len(spans))
    lengths = [len(buckets) for buckets in indices]
    sizes = np.array(lengths)
    data = np.repeat([share(size) for size in lengths], sizes)
    ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
    return Corpus(
        rows=rows,
        windows=csr_matrix((data, np.concatenate(indices), ends), shape=(len(sizes), spec.buckets)),
        known=np.array(known),
        row_of=np.repeat(np.arange(len(rows)), counts),
        labels=np.array([row.label for row in rows]),
        channels=np.array([row.channel for row in rows]),
        families=np.array([row.family for row in rows]),
        sources=np.array([row.source for row in rows]),
        langs=np.array([row.lang for row in rows]),
    )


def row_weights(data: Corpus, train: Mask, channel: Channel) -> Floats:
    """(rows,): large families less by row, the other channel less, both classes the same in all."""
    sizes = Counter(data.families[train].tolist())
    weights = np.array(
        [sizes[family] ** -EVENING[channel] if sizes[family] else 0.0 for family in data.families.tolist()]
    )
    weights[data.channels != channel] *= OTHER_CHANNEL_WEIGHT
    weights[~train] = 0
    for label in (0, 1):
        chosen = train & (data.labels == label)
        if not chosen.any():
            raise BadTrainingData(f"no {('harmless', 'attack')[label]} rows to train the {channel} head on")
        weights[chosen] *= train.sum() / 2 / weights[chosen].sum()
    return weights


def fit(data: Corpus, train: Mask, channel: Channel) -> tuple[Floats, float]:
    """(weights, bias) fitted to the rows of `train`. Deterministic."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - training only
    from threadpoolctl import (  # type: ignore[import-untyped]  # noqa: PLC0415 - training only; no stubs
        threadpool_limits,
    )

    weights = row_weights(data, train, channel)
    shares = weights[data.row_of] / np.bincount(data.row_of)[data.row_of]
    used = np.flatnonzero(train[data.row_of])
    poisoned = ((data.channels == "document") & (data.labels == 1))[data.row_of]
    kept = used
    for turn in range(ROUNDS):
        model = LogisticRegression(C=INVERSE_L2[channel], solver="liblinear", tol=0.1)
        with threadpool_limits(1):  # several threads sum in another order, and the weights are others
            model.fit(data.windows[kept], data.labels[data.row_of[kept]], sample_weight=shares[kept])
        if turn == ROUNDS - 1 or not poisoned[used].any():
            break
        margins = np.full(len(data.row_of), -np.inf)
        margins[used] = model.decision_function(data.windows[used])
        kept = used[~poisoned[used] | (margins[used] >= worst(margins, data)[data.row_of[used]])]
        shares = np.where(poisoned, weights[data.row_of], shares)
    return model.coef_[0], float(model.intercept_[0])


def worst(margins: Floats, data: Corpus) -> Floats:
    """(rows,): the largest margin among each row's windows."""
    found = np.full(len(data.rows), -np.inf)
    np.maximum.at(found, data.row_of, margins)
    return found


def left_out(data: Corpus, channel: Channel, groups: NDArray[np.str_]) -> tuple[Floats, NDArray[np.int64]]:
    """(margins, folds) per row: each row of the channel is scored by a fit that saw no row of its group.

    Rows of our own and of the other channel are always trained on, never scored: margin NaN, fold -1.
    """
    scored = (data.channels == channel) & (data.sources != SOURCE_OWN)
    folds = np.full(len(data.rows), -1)
    for label in (0, 1):
        chosen = scored & (data.labels == label)
        names = np.unique(groups[chosen])
        np.random.default_rng(1).shuffle(names)
        for place, name in enumerate(names):
            folds[(chosen if channel == "user" else scored) & (groups == name)] = place % FOLDS
    margins = np.full(len(data.rows), np.nan)
    for fold in np.unique(folds[folds >= 0]):
        weights, bias = fit(data, folds != fold, channel)
        found = data.windows @ weights + bias - STAND_OUT[channel] * data.known
        margins[folds == fold] = worst(found, data)[folds == fold]
    return margins, folds


def choose_threshold(data: Corpus, margins: Floats, group_margins: Floats, channel: Channel) -> float:
    """The margin that keeps false alarms on left-out harmless rows within both rates.

    Overall as new rows of known kinds score, by language also as rows of kinds that no fit has seen.
    """
    known = np.isfinite(margins) & (data.labels == 0) & (data.families != SYSTEM_PROMPTS)
    threshold = float(np.quantile(margins[known], 1 - FALSE_POSITIVE_RATE[channel]))
    for lang, count in Counter(data.langs[known].tolist()).items():
        if count >= LANGUAGE_ROWS_MIN and lang != SEVERAL:
            chosen = known & (data.langs == lang)
            for seen in (margins, group_margins):
                threshold = max(threshold, float(np.quantile(seen[chosen], 1 - FALSE_POSITIVE_RATE_LANGUAGE)))
    return threshold


def choose_slope(data: Corpus, margins: Floats) -> float:
    """How fast the score rises with the margin: Platt's method (1999), the threshold kept at 0.5."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - training only

    known = np.isfinite(margins)
    model = LogisticRegression(class_weight="balanced").fit(margins[known, None], data.labels[known])
    return float(np.clip(model.coef_[0, 0], 0.1, 10))


@dataclass(frozen=True)
class TrainedHead:
    """A head, and what the run saw of it."""

    spec: HeadSpec
    weights: NDArray[np.float16]
    data: Corpus
    margins: Floats
    """(rows,): margins of left-out rows, NaN where a row was never left out."""
    group_margins: Floats
    """The same, a whole family (user) or source (document) left out at a time."""
    group_folds: NDArray[np.int64]


def train_head(rows: Sequence[Row], channel: Channel, seed: int, tell: Callable[[str], None]) -> TrainedHead:
    """One head, its threshold and calibration. Raises `BadTrainingData`."""
    wanted = wanted_rows(rows, channel)
    ngrams = SPECS[channel]
    data = corpus(wanted, ngrams)
    tell(f"{channel}: {len(wanted)} rows, {data.windows.shape[0]} windows")
    group_margins, folds = left_out(data, channel, data.families if channel == "user" else data.sources)
    tell(f"{channel}: judged with whole {'families' if channel == 'user' else 'sources'} left out")
    margins = group_margins
    if channel == "user":
        shuffled = np.random.default_rng(seed).integers(0, FOLDS, len(wanted)).astype(np.str_)
        margins, _ = left_out(data, channel, shuffled)
        tell(f"{channel}: judged with rows left out at random")
    weights, bias = fit(data, np.ones(len(wanted), dtype=bool), channel)
    spec = HeadSpec(
        **asdict(ngrams),
        stand_out=STAND_OUT[channel],
        bias=round(bias, 6),
        threshold=round(choose_threshold(data, margins, group_margins, channel), 6),
        slope=round(choose_slope(data, margins), 6),
    )
    return TrainedHead(spec, weights.astype(np.float16), data, margins, group_margins, folds)


def train_beside(rows: Sequence[Row], slope: float, seed: int) -> BesideSpec:
    """What a message's features beside its system prompt say, as log-odds in units of the margin (`slope` a unit).

    Fitted to pairs of our own, and to harmless messages under system prompts that they were not written for, operators'
    own among them: words that meet by chance are no sign.
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - training only

    pairs = list(draw_pairs(seed, PAIRS_PER_KIND))
    chance = np.random.default_rng(seed)
    systems = [pair.system for pair in pairs] + [row.text for row in rows if row.family == SYSTEM_PROMPTS] * 4
    harmless = [row.text for row in rows if row.label == 0 and row.channel == "user" and row.family != SYSTEM_PROMPTS]
    picked = chance.choice(np.array(harmless, dtype=object), min(CHANCE_PAIRS, len(harmless)), replace=False)
    pairs += [Pair(systems[int(chance.integers(len(systems)))], normalise(text).text, 0) for text in picked]
    said = np.array([features(pair.text, pair.system) for pair in pairs])
    model = LogisticRegression(C=1.0).fit(said, np.array([pair.label for pair in pairs]))
    return BesideSpec(weights=tuple(round(float(weight) / slope, 4) for weight in model.coef_[0]))


def weights_bytes(heads: Mapping[Channel, TrainedHead], beside: BesideSpec) -> bytes:
    """The weights file: a float16 tensor a head, the rest in one metadata entry: equal runs, equal bytes."""
    from safetensors.numpy import save  # noqa: PLC0415 - training only

    spec = WeightsSpec(format=FORMAT, heads={channel: head.spec for channel, head in heads.items()}, beside=beside)
    return bytes(
        save({channel: head.weights for channel, head in heads.items()}, {METADATA_KEY: spec.model_dump_json()})
    )


def train_guard(data: Path, out: Path, seed: int, tell: Callable[[str], None]) -> None:
    """Writes the weights to `out` and the card of this run beside them. Raises `BadTrainingData`, OSError; where `out`
    can't be written, that is known before the fit, which takes minutes."""
    rows = load_rows(data)
    out.parent.mkdir(parents=True, exist_ok=True)
    there = out.exists()
    out.open("ab").close()
    if not there:
        out.unlink()
    everything = [*rows, *own_rows(seed)]
    heads: dict[Channel, TrainedHead] = {channel: train_head(everything, channel, seed, tell) for channel in SPECS}
    beside = train_beside(rows, heads["user"].spec.slope, seed)
    raw = weights_bytes(heads, beside)
    out.write_bytes(raw)
    out.with_name("MODEL_CARD.md").write_text(card(heads, beside, everything, raw, seed), encoding="utf-8")
    tell(f"wrote {out} ({len(raw)} bytes)")
