"""Makes tiny sequence classifiers, as real files for the guards' own loading code: of Prompt Guard 2's architecture, or
of BERT's, which reads 10 MB in seconds.

Needs torch and transformers. The model learns one thing in a second or two: whether one of the marked words stands
anywhere in a window.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

Kind = Literal["bert", "deberta"]
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
PLAIN = (
    "a", "the", "and", "to", "of", "in", "is", "it", "you", "he", "she", "we", "they", "was", "for", "on", "are",
    "as", "with", "be", "at", "this", "have", "from", "or", "by", "not", "but", "what", "all", "were", "when",
    "your", "can", "there", "use", "an", "each", "which", "do", "how", "their", "if", "will", "up", "about", "out",
    "many", "then", "them", "so", "some", "her", "would", "make", "like", "time", "has", "look", "two", "more",
    "write", "go", "see", "number", "no", "way", "could", "people", "my", "than", "first", "water", "been", "call",
    "who", "its", "now", "find", "long", "down", "day", "did", "get", "come", "made", "may", "part", "train",
    "leaves", "nine", "takes", "hours", "coast", "explain", "photosynthesis", "works", "simple", "words", "museum",
    "opens", "closes", "entry", "free", "python", "function", "sorts", "list", "names", "please", "thanks", "good",
    "bad", "dog", "cat", "house", "tree",
)  # fmt: skip
MARKED = ("ignore", "previous", "instructions", "jailbreak", "dan")


@cache
def made_classifier(kind: Kind = "bert", *, pair: bool = False) -> Path:
    """One for all tests of a session; not to be changed."""
    return write_classifier(Path(tempfile.mkdtemp(prefix="inferwatch-tiny-")), kind, pair=pair)


def write_classifier(
    folder: Path,
    kind: Kind = "bert",
    *,
    labels: Mapping[int, str] = {0: "BENIGN", 1: "MALICIOUS"},
    marked: Sequence[str] = MARKED,
    tokens_max: int = 256,
    pair: bool = False,
    seed: int = 0,
) -> Path:
    """Config, tokenizer and safetensors in `folder`. `pair`: the marked words count only after the first [SEP]."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    words = [*SPECIAL, *PLAIN, *marked]
    write_tokenizer(folder, words)
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(words), "num_hidden_layers": 1, "num_attention_heads": 1 if kind == "bert" else 2,
        "max_position_embeddings": tokens_max,
        "id2label": dict(labels), "label2id": {name: place for place, name in labels.items()}, "pad_token_id": 0,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    if kind == "bert":
        small = transformers.BertConfig(**shape, hidden_size=16, intermediate_size=16)
        model = transformers.BertForSequenceClassification(small)
    else:
        relative = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["c2p", "p2c"]}
        larger = transformers.DebertaV2Config(**shape, **relative, hidden_size=32, intermediate_size=32)
        model = transformers.DebertaV2ForSequenceClassification(larger)
    _teach(model, len(words), len(marked), pair)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """A tokenizer of whole words, lower case, [CLS] and [SEP] around."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def _teach(model: object, words: int, marked: int, pair: bool) -> None:
    """Steps until the loss stays small, on random windows, half of them with a marked word somewhere."""
    import torch

    assert isinstance(model, torch.nn.Module)
    draw = torch.Generator().manual_seed(1)
    steps = torch.optim.Adam(model.parameters(), lr=0.01)
    calm = 0
    for _ in range(500):
        length = int(torch.randint(6, 120, (1,), generator=draw))
        ids = torch.randint(3, words - marked, (48, length), generator=draw)
        wanted = torch.arange(48) % 2
        cut = length // 2
        where = torch.randint(cut + 1 if pair else 1, length - 1, (48, 1), generator=draw)
        which = torch.randint(words - marked, words, (48, 1), generator=draw)
        ids[:, 0], ids[:, -1] = 1, 2
        if pair:
            ids[:, cut] = 2
            where[wanted == 0] = torch.randint(1, max(2, cut), (24, 1), generator=draw)
            ids.scatter_(1, where, which)
        else:
            ids[wanted == 1] = ids[wanted == 1].scatter(1, where[wanted == 1], which[wanted == 1])
        ends = (ids == 2).int()
        more = {"token_type_ids": (ends.cumsum(dim=1) - ends).clamp(max=1).long()} if pair else {}
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=wanted, **more).loss
        calm = calm + 1 if loss.item() < 0.01 else 0
        if calm == 5:
            break
        steps.zero_grad()
        loss.backward()
        steps.step()


def change_json(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
