"""The webhook sink against a real HTTP server that verifies with the official library."""

import asyncio
import itertools
import json
import ssl
import time
from datetime import UTC, datetime

import pytest
from standardwebhooks import Webhook

from sinks.config import WebhookConfig
from sinks.delivery import RetryLater, SinkSetupError
from sinks.endpoint import PinnedResolver, check_url
from sinks.formats import webhook as body_format
from sinks.webhook import WebhookSink, build, read_secret
from tests.sinks.receivers import SECRETS, certificate, hook_server
from tests.sinks.samples import GOLDEN, HOSTILE, OUTSIDE, as_json, delivery_of, finding, hostile


@pytest.fixture
def secret_files(tmp_path):
    paths = []
    for number, secret in enumerate(SECRETS):
        path = tmp_path / f"secret-{number}"
        path.write_text(secret + "\n")
        paths.append(path)
    return tuple(paths)


def sink_of(url, secret_files, **config):
    return build(WebhookConfig(url=url, secret_files=secret_files, **config))


async def test_a_finding_arrives_signed_with_every_secret(secret_files):
    """Both secrets of a rotation verify; the id is UID.REVISION; the data is the finding."""
    async with hook_server() as hook:
        sink = sink_of(hook.url, secret_files)
        await sink.send([finding("a", 1), finding("a", 2)])
        await sink.close()
    assert [message_id for message_id, _ in hook.messages] == ["a.1", "a.2"]
    assert hook.messages[0][1] == {
        "type": "finding.opened",
        "timestamp": "2026-11-20T12:01:01.000Z",
        "data": as_json(finding("a", 1)),
    }


def test_the_signature_is_the_published_one():
    """The vector that the library and an independent computation agree on."""
    path = OUTSIDE / "standard_webhooks_vector.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand")
    vector = json.loads(path.read_text())
    moment = datetime.fromtimestamp(vector["timestamp"], UTC)
    assert Webhook(vector["secret"]).sign(vector["id"], moment, vector["payload"]) == vector["signature"]


async def test_a_retry_has_the_same_id_and_body_and_a_new_timestamp(secret_files):
    """500 and 429 with Retry-After are tried again; the receiver can tell a repetition by the id."""
    ticks = itertools.count(step=7)
    async with hook_server() as hook:
        hook.answers = [500, (429, {"Retry-After": "0"})]
        config = WebhookConfig(url=hook.url, secret_files=secret_files)
        sink = WebhookSink(
            config,
            check_url(hook.url, allow_private=False),
            [read_secret(path) for path in secret_files],
            ssl.create_default_context(),
            now=lambda: time.time() - 60 + next(ticks),
        )
        letters = []
        made = delivery_of(sink, letters)
        await made.deliver([finding("a")])
        await made.close()
    assert [message_id for message_id, _ in hook.messages] == ["a.1"] * 3
    assert hook.messages[0] == hook.messages[1] == hook.messages[2]
    assert hook.stamps[0] < hook.stamps[1] < hook.stamps[2]
    assert (letters, made.totals["retried"]) == ([], 2)


@pytest.mark.parametrize(
    ("header", "waits_s"),
    [("7", 7.0), ("Thu, 01 Jan 1970 00:16:50 GMT", 10.0), ("", None), ("soon", None), ("-1", None), ("9" * 30, None)],
)
async def test_retry_after_is_read_as_seconds_and_as_a_date(secret_files, header, waits_s):
    """RFC 9110 allows both; nonsense is a plain failure."""
    sink = sink_of("https://example.com/", secret_files)
    sink._now = lambda: 1000.0
    with pytest.raises((RetryLater, OSError)) as failed:
        sink._judge(503, header)
    assert getattr(failed.value, "retry_after_s", None) == waits_s


async def test_410_switches_the_endpoint_off(secret_files):
    """Nothing more is sent to it, and each finding says why in the dead letter."""
    async with hook_server() as hook:
        hook.answers = [410]
        letters = []
        made = delivery_of(sink_of(hook.url, secret_files), letters)
        await made.deliver([finding("a"), finding("b")])
        await made.close()
    assert len(hook.messages) == 1
    assert [(uid, "410 Gone" in reason) for uid, _, reason in letters] == [("a", True), ("b", True)]


async def test_a_redirect_is_a_failure_and_is_not_followed(secret_files):
    """It is tried again at the same address: the new one was never checked."""
    async with hook_server() as other, hook_server() as hook:
        hook.answers = [(307, {"Location": other.url}), (302, {"Location": "http://169.254.169.254/"})]
        letters = []
        made = delivery_of(sink_of(hook.url, secret_files), letters)
        await made.deliver([finding("a")])
        await made.close()
    assert (other.messages, len(hook.messages), letters) == ([], 3, [])


@pytest.mark.parametrize("status", [400, 413, 415, 422])
async def test_a_finding_that_the_endpoint_rejects_is_a_dead_letter(secret_files, status):
    """Sending the same body again would not help, and the next finding is not held up."""
    async with hook_server() as hook:
        hook.answers = [status]
        letters = []
        made = delivery_of(sink_of(hook.url, secret_files), letters)
        await made.deliver([finding("a"), finding("b")])
        await made.close()
    assert [uid for uid, _, _ in letters] == ["a"]
    assert [message_id for message_id, _ in hook.messages] == ["a.1", "b.1"]


async def test_hang_and_reset_are_tried_again(secret_files):
    """A server that says nothing, or hangs up, costs one attempt each; no message names the URL's path."""

    async def hang(request):
        await asyncio.sleep(30)

    async def reset(request):
        request.transport.abort()
        await asyncio.sleep(1)

    async with hook_server() as hook:
        hook.answers = [hang, reset]
        sink = sink_of(hook.url, secret_files, timeout_s=0.2)
        said = []
        for _ in range(2):
            with pytest.raises(OSError, match=r"127\.0\.0\.1") as failed:
                await sink.send([finding("a")])
            said.append(str(failed.value))
        await sink.send([finding("a")])
        await sink.close()
    assert len(hook.messages) == 3
    assert said[0] == "127.0.0.1 gave no answer in 0.2 s"
    assert said[1].startswith("127.0.0.1 can't be reached: ")
    assert "token-in-path" not in "".join(said)


async def test_tls_is_checked(secret_files, tmp_path):
    """A certificate that nobody vouches for is an error that may pass; with its file it is trusted."""
    cert, context = certificate(tmp_path)
    async with hook_server(context) as hook:
        untrusted = sink_of(hook.url, secret_files)
        with pytest.raises(OSError, match=r"^127\.0\.0\.1 can't be reached: ClientConnectorCertificateError$"):
            await untrusted.send([finding("a")])
        await untrusted.close()
        trusted = sink_of(hook.url, secret_files, ca_file=cert)
        await trusted.send([finding("b")])
        await trusted.close()
    assert [message_id for message_id, _ in hook.messages] == ["b.1"]


async def test_a_name_is_judged_when_connecting(secret_files):
    """A public name that has come to lead to this machine is not connected to (DNS rebinding)."""
    async with hook_server() as hook:
        port = hook.url.split(":")[2].split("/")[0]

        async def resolve(host, port):
            return ["127.0.0.1"]

        url = f"https://example.com:{port}/"
        endpoint = check_url(url, allow_private=True)
        sink = WebhookSink(
            WebhookConfig(url=url, secret_files=secret_files),
            endpoint,
            [read_secret(secret_files[0])],
            ssl.create_default_context(),
            resolver=PinnedResolver(endpoint, resolve),
        )
        with pytest.raises(OSError, match=r"example\.com leads to 127\.0\.0\.1"):
            await sink.send([finding("a")])
        await sink.close()
    assert hook.messages == []


@pytest.mark.parametrize("uid", ["a\r\nx-injected: 1", "", "é", "a" * 65, "a b"])
async def test_a_uid_that_is_no_id_is_refused(secret_files, uid):
    """It would become a header."""
    async with hook_server() as hook:
        letters = []
        made = delivery_of(sink_of(hook.url, secret_files), letters)
        await made.deliver([finding(uid)])
        await made.close()
    assert (hook.messages, letters[0][2]) == ([], "its uid can't be a webhook-id")


@pytest.mark.parametrize("content", ["", "whsec_", "whsec_!!!", "QUJD" * 10, "whsec_QUJD", "whsec_" + "QUJD" * 40, "é"])
def test_a_secret_that_is_none_is_refused_without_being_told(tmp_path, content):
    """The sentence names the file, never what is in it."""
    path = tmp_path / "secret"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SinkSetupError) as refused:
        sink_of("https://example.com/", (path,))
    assert str(path) in str(refused.value)
    assert len(content) < 9 or content not in str(refused.value)


def test_a_missing_secret_and_a_bad_url_are_one_sentence_each(secret_files, tmp_path):
    """They name the setting."""
    with pytest.raises(SinkSetupError, match=r"sinks\.webhook\.secret_files: .*nope can't be read: No such file"):
        sink_of("https://example.com/", (tmp_path / "nope",))
    with pytest.raises(SinkSetupError, match=r"sinks\.webhook\.url: plain http is for this machine only"):
        sink_of("http://example.com/", secret_files)
    with pytest.raises(SinkSetupError, match=r"sinks\.webhook\.ca_file .* can't be used"):
        sink_of("https://example.com/", secret_files, ca_file=tmp_path / "nope")


async def test_the_secret_is_in_no_repr(secret_files):
    """Nor the URL's path in an error."""
    sink = sink_of("https://example.com/token", secret_files)
    assert not any(secret in f"{sink!r}{vars(sink)!r}" for secret in SECRETS)


def test_a_body_is_one_known_document():
    """The whole body of a plain finding, byte for byte."""
    assert body_format.encode(finding(), bytes_max=20_000) == (GOLDEN / "finding.webhook.json").read_bytes().rstrip(
        b"\n"
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_body_stays_under_its_limit(name):
    """Valid JSON of at most 20 KB whatever the values, and whole where it fits."""
    body = body_format.encode(hostile(HOSTILE[name]), bytes_max=20_000)
    assert len(body) <= 20_000
    said = json.loads(body)["data"]
    assert said["uid"] == "f" * 32
    if name not in ("megabyte", "surrogates"):
        assert said == as_json(hostile(HOSTILE[name]))
