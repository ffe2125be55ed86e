"""What letting a request in costs: each door, limits, pseudonyms; and verifying a token that was not seen before.

CPU time of this process, through the functions that the gate calls, on an ASGI scope as uvicorn makes it. Run it as
`python -m tests.bench.identity --json`; the last line is one JSON object of µs a request.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collector.context import NOBODY, Exchange
from collector.requests import admit, caller_of
from tests.collector.doors import Site, make_site, token, tokens
from tests.collector.gating import CHAT

SECRET = "s" * 64


def scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """A chat request's scope."""
    usual = [(b"host", b"gate"), (b"accept", b"*/*"), (b"user-agent", b"bench"), (b"content-type", b"application/json")]
    return {"type": "http", "method": "POST", "path": CHAT, "client": ("127.0.0.1", 5), "headers": [*usual, *headers]}


def entering(site: Site, request: dict[str, Any]) -> Callable[[], None]:
    """What the gate does to know who asks and to count it."""

    def enter() -> None:
        at_hand = Exchange("r", NOBODY)
        at_hand.caller = caller_of(request, site.auditor, at_hand)
        admit(site.auditor, at_hand)
        if at_hand.lease is not None:
            at_hand.lease.release()

    return enter


def cpu_us(work: Callable[[], object], calls: int, repetitions: int) -> list[float]:
    """CPU µs a call, a figure for each repetition, in order of size."""
    figures = []
    for _ in range(repetitions):
        begin_ns = time.process_time_ns()
        for _ in range(calls):
            work()
        figures.append((time.process_time_ns() - begin_ns) / calls / 1_000)
    return sorted(figures)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="for the others' sake: it prints JSON anyway")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        plain, limited = Path(name, "plain"), Path(name, "limited")
        plain.mkdir()
        limited.mkdir()
        secret = plain / "proxy.secret"
        secret.touch(0o600)
        secret.write_text(SECRET)
        site = make_site(plain, tokens=tokens(plain), proxy={"secret_file": secret})
        bounds = {"requests_per_minute": 10**9, "tokens_per_minute": 10**9, "concurrent": 100}
        bounded = make_site(limited, limits=bounds)
        doors = {
            "api_key": entering(site, scope((b"authorization", b"Bearer " + site.api_key.encode()))),
            "api_key_with_limits": entering(bounded, scope((b"authorization", b"Bearer " + bounded.api_key.encode()))),
            "token_seen_before": entering(site, scope((b"authorization", b"Bearer " + token().encode()))),
            "proxy": entering(site, scope((b"x-inferwatch-proxy", SECRET.encode()), (b"x-inferwatch-user", b"carol"))),
        }
        runs = {f"{door}_us": cpu_us(work, options.calls, options.repetitions) for door, work in doors.items()}
        watched = site.identity._tokens
        assert watched is not None
        for kind, algorithm in (("rsa", "RS256"), ("ec", "ES256"), ("ed", "EdDSA")):
            raw = token(kind).encode()
            verify = lambda raw=raw: watched.value._verified(raw, time.time())  # noqa: E731  # measured at once
            runs[f"token_verified_{algorithm}_us"] = cpu_us(verify, options.calls // 50, options.repetitions)
    told: dict[str, Any] = {
        figure: {"min": round(of[0], 1), "median": round(of[len(of) // 2], 1), "max": round(of[-1], 1)}
        for figure, of in runs.items()
    }
    told |= {"calls": options.calls, "repetitions": options.repetitions, "cores": os.cpu_count(), "goals": []}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
