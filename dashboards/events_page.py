"""Events as a table: hashes, pseudonyms, counts and verdicts. No text of a prompt is shown, since none is recorded."""

from collections.abc import Mapping, Sequence
from typing import Final

from dashboards.cells import brief, number_of
from dashboards.lookups import EVENTS_PAGE
from dashboards.markup import Markup, element, joined, shown
from dashboards.panel import Row
from dashboards.scope import VALUE_CHARACTERS_MAX, Scope, moment_ms
from dashboards.units import MISSING, clock, exact, short

FILTERS: Final = ("user", "session", "api_key", "address", "model", "prompt", "event", "trace", "only")
HEADS: Final = (
    "Time (UTC)",
    "Status",
    "Guards",
    "User / session",
    "Model",
    "Prompt hash",
    "In",
    "Out",
    "Latency",
    "Kafka",
)
_NUMBERS: Final = ("In", "Out", "Latency")
_TONES: Final = {"ok": "quiet", "error": "bad", "lost": "bad", "aborted": "quiet"}


def filters_of(query: Mapping[str, str]) -> dict[str, str]:
    """The filters that an address names, cut to a length no identifier has; the rest is empty."""
    return {name: query.get(name, "")[:VALUE_CHARACTERS_MAX] for name in FILTERS}


def events_article(rows: Sequence[Row], filters: Mapping[str, str], scope: Scope) -> Markup:
    """The page's main part."""
    asked = {name: value for name, value in filters.items() if value}
    chips = (
        element(
            "li",
            None,
            f"{name} {brief(value)} ",
            element(
                "a",
                {"href": scope.link("/events", **{key: other for key, other in asked.items() if key != name})}
                | {"aria-label": f"without {name}"},
                "×",
            ),
        )
        for name, value in asked.items()
    )
    blocked = {**asked, "only": "" if asked.get("only") else "blocked"}
    told = f"The newest {EVENTS_PAGE}; narrow the time to see older ones." if len(rows) >= EVENTS_PAGE else ""
    return element(
        "article",
        {"class": "events"},
        element("h1", None, "Events"),
        element(
            "ul",
            {"class": "filters"},
            chips,
            element("li", None, element("a", {"href": scope.link("/events", **blocked)}, "only blocked"))
            if not asked.get("only")
            else None,
        ),
        events_table(rows, scope)
        if rows
        else element("p", {"class": "sentence"}, "No such events in this time range."),
        element("p", {"class": "note"}, told) if told else None,
    )


def events_table(rows: Sequence[Row], scope: Scope) -> Markup:
    """One row an event, newest first."""
    heads = (element("th", {"scope": "col", "class": "number" if head in _NUMBERS else None}, head) for head in HEADS)
    return element(
        "div",
        {"class": "scroll", "tabindex": 0, "role": "group", "aria-label": "Events"},
        element(
            "table",
            {"class": "rows"},
            element("caption", {"class": "unseen"}, "Events"),
            element("thead", None, element("tr", None, heads)),
            element("tbody", None, (_event(row, scope) for row in rows)),
        ),
    )


def _event(row: Row, scope: Scope) -> Markup:
    at_ms = moment_ms(row["timestamp"])
    event_id = shown(row["event_id"], 40)
    flags = [name for name in ("late", "duplicate", "quarantined") if row.get(name)]
    status = shown(row["status"], 20)
    tone = _TONES.get(status, "watch")
    user, session = str(row["user_id"]), str(row["session_id"])
    who = element(
        "a",
        {"href": scope.link("/events", user=user, session=session), "title": shown(f"{user}/{session}", 200)},
        brief(f"{user}/{session}"),
    )
    prompt = str(row["prompt_hash"])
    hashed = element(
        "a", {"href": scope.link("/events", prompt=prompt), "title": shown(prompt, 100)}, shown(prompt, 18)
    )
    latency = number_of(row["latency_ms"])
    cells = (
        (None, element("time", {"title": f"event {event_id}"}, clock(at_ms) + f".{int(at_ms) % 1000:03d}")),
        (None, joined([element("span", {"class": f"state {tone}"}, status), *(_flag(name) for name in flags)])),
        (None, verdicts(row)),
        ("as-entity", who if user or session else MISSING),
        (None, shown(row["model_version"], 40)),
        ("as-hash", hashed if prompt else MISSING),
        ("number", exact(number_of(row["prompt_tokens"]))),
        ("number", exact(number_of(row["response_tokens"]))),
        ("number", short(latency, "ms")),
        ("as-evidence", f"{row['kafka_partition']} @ {row['kafka_offset']}"),
    )
    return element("tr", None, (element("td", {"class": name}, content) for name, content in cells))


def _flag(name: str) -> Markup:
    return element("span", {"class": "flag"}, name)


def verdicts(row: Row) -> Markup | str:
    """The guards that did not allow, with stage, decision and score; `all allow` where every one did."""
    names = ("guard_names", "guard_stages", "guard_decisions", "guard_scores")
    columns = [value if isinstance(value := row.get(name), list | tuple) else () for name in names]
    results = list(zip(*columns, strict=True))
    if not results:
        return MISSING
    told = [
        f"{shown(guard, 30)} {shown(decision, 10)} {short(number_of(score))} ({shown(stage, 10)})"
        for guard, stage, decision, score in results
        if decision != "allow"
    ]
    return "; ".join(told[:3]) or "all allow"
