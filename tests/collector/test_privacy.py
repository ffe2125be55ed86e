"""What somebody with the topic can learn, and what not: each row of the table in docs/privacy.md, tried out.

The reader here has every event of the collector, the code, and a dictionary of texts; no key unless the test says so.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collector.audit import EngineRequest
from collector.auditor import Auditor
from collector.doors import Identity
from collector.guards.config import GuardsConfig
from collector.guards.stack import GuardStack
from collector.identity import KeyRing, Pseudonyms, plain_digest
from collector.minhash import MINHASH_PLACES, MinHash, similarity
from collector.routes import GateConfig
from tests.collector.gating import Recorder

TENANT_KEYS = {"default": bytes(range(32)), "acme": bytes(range(32, 64))}
DICTIONARY = ["yes", "no", "What is my account balance?", "How do I reset my password?", "Is my salary above average?"]
SECRET_ASKED = DICTIONARY[4]
LONG = "Please review the termination letter for the employee in the Hamburg office and make it sound kinder."
LIKE_LONG = LONG.replace("Hamburg", "Munich")


def event_of(
    text: str, tenant: str = "default", user: str = "alice", prompt_hash: Any = "hmac", key_id: str = "", **more: Any
) -> Any:
    """What the collector writes for a prompt: all that a reader of the topic has of it."""
    names = Pseudonyms(more.pop("key", TENANT_KEYS[tenant]), prompt_hash=prompt_hash)
    identity = Identity(keys=KeyRing({}), pseudonyms={tenant: names})
    written: list[dict[str, Any]] = []

    class Keep(Recorder):
        def begin(self, **fields: Any) -> dict[str, Any]:
            written.append(fields)
            return fields

    guards = GuardStack(GuardsConfig(order=()))
    auditor = Auditor(Keep(), guards, identity, GateConfig(tenant=tenant), model_version="m@1")  # type: ignore[arg-type]
    auditor.caller = lambda asked, **_: Auditor.caller(auditor, asked, user=user, key_id=key_id)  # type: ignore[method-assign]
    auditor.open(EngineRequest("generate", text, prompt_tokens=len(text.split()), **more))
    return written[0]["known"]


def test_equal_and_like_prompts_are_visible_within_a_tenant_and_epoch() -> None:
    """That is what they are for: the same text by two users has one digest, a like one a like MinHash."""
    one, same, like, other = (event_of(text, user=user) for text, user in (
        (LONG, "alice"), (LONG, "bob"), (LIKE_LONG, "carol"), ("Write a poem about the sea at night, please.", "dora"),
    ))  # fmt: skip
    assert one["user_id"] != same["user_id"]
    assert one["prompt_hash"] == same["prompt_hash"] != like["prompt_hash"]
    assert one["minhash"] == same["minhash"]
    assert similarity(one["minhash"], like["minhash"]) > 0.6
    assert similarity(one["minhash"], other["minhash"]) < 0.2


@pytest.mark.parametrize("what", ["tenant", "epoch"])
def test_neither_people_nor_prompts_meet_across_tenants_or_epochs(what: str) -> None:
    """The same user with the same text shares no value but counts, times, and the model."""
    one = event_of(LONG)
    other = event_of(LONG, "acme") if what == "tenant" else event_of(LONG, key=bytes(range(1, 33)))
    keyed = ("user_id", "prompt_hash", "turn_hash", "key_epoch")
    assert all(one[name] and one[name] != other[name] for name in keyed)
    assert similarity(one["minhash"], other["minhash"]) < 0.1


def test_the_id_of_an_api_key_is_one_and_the_same_in_all_epochs() -> None:
    """It is in the clear, so whose key it is, is known for as long as the file of API keys says so."""
    one, other = (event_of(LONG, key=key, key_id="key_1") for key in (TENANT_KEYS["default"], bytes(range(1, 33))))
    assert (one["key_id"], one["key_id"]) == (other["key_id"], "key_1")
    assert one["api_key"] != other["api_key"]


def test_values_of_minhashes_tell_pieces_apart_without_asking() -> None:
    """Short prompts stand out: one piece, so between two of them the ratio is the same at all places. By one of them
    each value of another MinHash becomes the number of a piece of five characters, and common pieces are counted."""
    signer = MinHash(TENANT_KEYS["default"])
    asked = (
        "the merger with Acme closes on Friday",
        "please draft a mail about the merger",
        "Write a poem, a short one",
    )
    signatures = [signer.signature(text).astype(np.uint64) for text in asked]
    short = next(each for text in ("hi", "ok", "yes", "no") if (each := signer.signature(text))[0] % 2)
    assert all((short % 2).tolist())
    inverse = [pow(int(value), -1, 2**32) for value in short]
    pieces = [{int(v) * i % 2**32 for v, i in zip(each, inverse, strict=True)} for each in signatures]
    assert [len(pieces[0] & other) > 0 for other in pieces] == [True, True, False]


def _guessed(event: Any, hashes: dict[str, str]) -> str | None:
    return next((text for text, digest in hashes.items() if digest in event.values()), None)


def test_a_dictionary_finds_nothing_without_the_key_and_everything_under_plain_sha256() -> None:
    """Why `prompt_hash = "sha256"` is not the default: five guesses name the question somebody asked."""
    guesses = {text: plain_digest(text.encode()) for text in DICTIONARY}
    assert _guessed(event_of(SECRET_ASKED, prompt_hash="sha256"), guesses) == SECRET_ASKED
    assert _guessed(event_of(SECRET_ASKED), guesses) is None
    wrong_key = Pseudonyms(b"k" * 32)
    assert _guessed(event_of(SECRET_ASKED), {text: wrong_key.digest(text) for text in DICTIONARY}) is None
    for key in (b"", b"k" * 32, TENANT_KEYS["acme"]):
        likeness = [similarity(MinHash(key).encode(text), event_of(SECRET_ASKED)["minhash"]) for text in DICTIONARY]
        assert max(likeness) < 0.2


def test_sizes_are_visible_and_may_say_what_was_asked() -> None:
    """Token counts are in the event: where only two answers are possible, the length tells them apart."""
    sizes = {text: event_of(text)["prompt_tokens"] for text in ("yes please do", "no")}
    assert sizes == {"yes please do": 3, "no": 1}


def test_a_stolen_key_makes_guessing_possible_of_whole_and_of_partly_known_texts() -> None:
    """Digests confirm a guessed text; the MinHash confirms one that is only nearly right. So keys are what to guard."""
    event, stolen = event_of(LONG), Pseudonyms(TENANT_KEYS["default"])
    assert stolen.digest(LONG) == event["prompt_hash"]
    assert stolen.user("alice") == event["user_id"]
    templates = [LONG.replace("Hamburg", city).replace("kinder", "nicer") for city in ("Paris", "Rome", "Hamburg")]
    likeness = [similarity(stolen.minhash(text), event["minhash"]) for text in templates]
    assert max(likeness) == likeness[2] > 0.75


def test_who_may_ask_and_read_can_confirm_a_guess_and_leaves_an_event_for_each(tmp_path: Path) -> None:
    """An oracle: the collector hashes what a client sends. It needs a key of the same tenant and epoch."""
    event = event_of(SECRET_ASKED)
    tried = [event_of(text, user="mallory") for text in DICTIONARY]
    assert [each["prompt_hash"] == event["prompt_hash"] for each in tried] == [False, False, False, False, True]
    assert {each["user_id"] for each in tried} == {Pseudonyms(TENANT_KEYS["default"]).user("mallory")}
    elsewhere = [event_of(text, "acme", user="mallory") for text in DICTIONARY]
    assert not any(each["prompt_hash"] == event["prompt_hash"] for each in elsewhere)


def test_who_may_ask_and_read_can_recognise_pieces_of_others_prompts() -> None:
    """A MinHash is no MAC. One question per 5-gram gives its 64 values; places of a signature that match name it.

    The docs say so: reading the topic and asking are rights for different people.
    """
    signer = MinHash(TENANT_KEYS["default"])
    victim = signer.signature("the merger with Acme closes on Friday")
    vocabulary = [" Acme", "Frida", "salar", "merge", "passw", "Berli"]
    matches = {word: int(np.count_nonzero(signer.signature(word) == victim)) for word in vocabulary}
    assert {word for word, places in matches.items() if places} == {" Acme", "Frida", "merge"}
    assert len(victim) == MINHASH_PLACES
