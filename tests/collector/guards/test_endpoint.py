"""What asks a judge elsewhere is done in time, believes nothing odd, and lets no word of the question out."""

import logging
import socket
import ssl
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from collector.guards.endpoint import BadAnswer, Endpoint, EndpointConfig, EndpointFailed, chat
from collector.guards.protocol import GuardRefused
from tests.collector.guards.judge_server import JudgeServer, serving

CANARY = "canary-8842"
BODY = {"model": "judge", "max_tokens": 8, "messages": [{"role": "user", "content": CANARY}]}


def ask(judge: JudgeServer, limit_s: float = 0.4, **settings: Any) -> Any:
    """One question to a new endpoint."""
    endpoint = Endpoint(EndpointConfig(url=judge.url, model="judge", **settings), "alignment")
    return endpoint.ask("/chat/completions", BODY, time.monotonic() + limit_s)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("redirect", EndpointFailed), ("hang", EndpointFailed), ("drip", EndpointFailed), ("500", EndpointFailed),
        ("drop", EndpointFailed), ("huge", BadAnswer), ("gzip", BadAnswer), ("nan", BadAnswer), ("not json", BadAnswer),
        ("no choices", BadAnswer), ("cut", BadAnswer),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_an_error_in_time(
    fault: Any, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """Each fault is an exception before the limit and a little, without a word in it, its causes or the log."""
    with serving(lambda _: "fine", fault=fault) as judge, caplog.at_level(logging.DEBUG):
        began_s = time.monotonic()
        with pytest.raises(error) as found:
            chat(ask(judge))
        assert time.monotonic() - began_s < 1.2
    told = "".join(traceback.format_exception_only(found.value)) + repr(found.value.__context__)
    assert CANARY not in told + caplog.text
    assert len(judge.paths) <= 2


def test_a_connection_is_kept_and_a_closed_one_is_made_anew() -> None:
    """Ten questions need one connection; after the server has let go of it, one more."""
    with serving(lambda _: "fine") as judge:
        endpoint = Endpoint(EndpointConfig(url=judge.url, model="judge"), "alignment")
        for _ in range(10):
            assert chat(endpoint.ask("/chat/completions", BODY, time.monotonic() + 5)).text == "fine"
        assert judge.connections == 1
        for kept in endpoint._idle:
            assert kept.sock is not None
            kept.sock.shutdown(socket.SHUT_RDWR)
        assert chat(endpoint.ask("/chat/completions", BODY, time.monotonic() + 5)).text == "fine"
        assert judge.connections == 2


def test_the_key_comes_from_a_file_that_nobody_else_reads(tmp_path: Path) -> None:
    """It is sent, it is in no repr, and a file that others can read is refused."""
    key = tmp_path / "key"
    key.write_text("secret-key-1234\n")
    key.chmod(0o600)
    with serving(lambda _: "fine", key="secret-key-1234") as judge:
        assert chat(ask(judge, 5, api_key_file=key)).text == "fine"
        with pytest.raises(EndpointFailed):
            ask(judge, 5)
    config = EndpointConfig(url=judge.url, model="judge", api_key_file=key)
    assert "secret-key" not in repr(config) + repr(Endpoint(config, "alignment"))
    key.chmod(0o644)
    with pytest.raises(GuardRefused, match="other users can read the alignment guard's API key"):
        Endpoint(config, "alignment")


def test_plain_http_stays_on_this_host() -> None:
    """Unless it is said that it may not."""
    for url in ("http://10.0.0.7/v1", "http://guard.example/v1"):
        with pytest.raises(ValidationError, match="plain HTTP"):
            EndpointConfig(url=url, model="m")
        assert EndpointConfig(url=url, model="m", plaintext_allowed=True).url == url
    for url in (
        "ftp://127.0.0.1/v1",
        "https://me:pw@guard.example/v1",
        "https:///v1",
        "https://guard.example/v1?key=1",
    ):
        with pytest.raises(ValidationError, match="url"):
            EndpointConfig(url=url, model="m")


def test_a_certificate_that_nobody_signed_is_refused(tmp_path: Path) -> None:
    """TLS is verified: name and issuer."""
    endpoint = Endpoint(EndpointConfig(url="https://127.0.0.1:1/v1", model="m"), "alignment")
    assert endpoint._tls is not None
    assert (endpoint._tls.verify_mode, endpoint._tls.check_hostname) == (ssl.CERT_REQUIRED, True)
    with pytest.raises(GuardRefused, match="no readable CA certificates"):
        Endpoint(EndpointConfig(url="https://127.0.0.1:1/v1", model="m", ca_file=tmp_path / "none.pem"), "alignment")
