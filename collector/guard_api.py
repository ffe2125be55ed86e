"""`POST /v1/guard`: judges texts for whoever puts a prompt together, before it does: one chunk, mail or page at a time.

The gate answers it itself, so it is there before vLLM and before any server behind the proxy, behind the same doors,
limits and bounds. Guarantee: each call that is answered has its event, a rejection with status `ok` and reason
`guard_api` that holds the worst verdict of each guard and stage, and `blocked` as it was answered, so that who tries
variations here is seen as one who tries them on the model; neither event nor answer holds a piece of a text.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any, Final, NamedTuple

import orjson

from collector.auditor import STAGES, Auditor
from collector.context import Exchange
from collector.event import GuardResult, Stage
from collector.guards.protocol import Context
from collector.guards.verdicts import worst
from collector.requests import Refusal, caller_of, parse

TEXTS_MAX: Final = 256
_FIELDS: Final = frozenset({"texts", "system", "prompt", "user", "session_id"})
_TEXT_FIELDS: Final = frozenset({"text", "stage", "id"})
_ID_CHARS_MAX: Final = 128


class _Text(NamedTuple):
    stage: Stage
    text: str
    id: str


async def answer(auditor: Auditor, scope: MutableMapping[str, Any], at_hand: Exchange, raw: bytes) -> bytes:
    """The answer to one call, its event written. Raises Refusal, Unaudited."""
    body = parse(raw)
    at_hand.caller = caller = caller_of(scope, auditor, at_hand, body)
    texts = _texts(body)
    names = caller.names or auditor.identity.names(caller.tenant)
    context = Context(caller.tenant, at_hand.route, _string(body, "system"), _string(body, "prompt"), names.session)
    judged = await auditor.threads.admit(auditor.judge_each, [text[:2] for text in texts], context)
    blocked = any(blocks for _, blocks in judged)
    auditor.reject(
        at_hand,
        reason="guard_api",
        http_status=200,
        status="ok",
        verdicts=worst(result for results, _ in judged for result in results),
        told={"prompt_hash": names.digest("\n".join(text.text for text in texts)), "blocked": blocked},
    )
    told = [_told(text, *verdict) for text, verdict in zip(texts, judged, strict=True)]
    return orjson.dumps({"id": at_hand.http_request_id, "blocked": blocked, "texts": told})


def _texts(body: Mapping[str, object]) -> list[_Text]:
    """The texts of a body. Raises Refusal, naming what is wrong and quoting nothing."""
    if not body.keys() <= _FIELDS:
        raise _bad(f"There are only the fields {', '.join(sorted(_FIELDS))}.")
    texts = body.get("texts")
    if not isinstance(texts, list) or not 1 <= len(texts) <= TEXTS_MAX:
        raise _bad(f"`texts` is a list of 1 to {TEXTS_MAX} texts.")
    return [_text(number, text) for number, text in enumerate(texts)]


def _text(number: int, given: object) -> _Text:
    one = {"text": given} if isinstance(given, str) else given
    if not isinstance(one, dict) or not one.keys() <= _TEXT_FIELDS or not isinstance(one.get("text"), str):
        raise _bad(f"`texts[{number}]` is a string, or an object with `text` and maybe `stage` and `id`.")
    stage, name = one.get("stage", "retrieved"), one.get("id", "")
    if stage not in STAGES:
        raise _bad(f"`texts[{number}].stage` is one of {', '.join(STAGES)}.")
    if not isinstance(name, str) or len(name) > _ID_CHARS_MAX:
        raise _bad(f"`texts[{number}].id` is a string of at most {_ID_CHARS_MAX} characters.")
    return _Text(stage, one["text"], name.encode("utf-8", "replace").decode())


def _string(body: Mapping[str, object], name: str) -> str:
    value = body.get(name, "")
    if not isinstance(value, str):
        raise _bad(f"`{name}` is a string.")
    return value


def _told(text: _Text, results: list[GuardResult], blocks: bool) -> dict[str, object]:
    """What the caller learns of one text: `shadow` where a guard that only watches would have blocked, `unjudged` where
    no guard is for such texts.
    """
    watched = any(result.decision == "shadow" for result in results)
    verdicts = [
        {
            "guard": result.guard,
            "version": result.version,
            "decision": result.decision,
            "score": result.score,
            "label": result.label,
            "error": result.error,
        }
        for result in results
    ]
    decision = "block" if blocks else "shadow" if watched else "allow" if results else "unjudged"
    return {**({"id": text.id} if text.id else {}), "stage": text.stage, "decision": decision, "verdicts": verdicts}


def _bad(sentence: str) -> Refusal:
    return Refusal(400, "bad_guard_request", sentence)
