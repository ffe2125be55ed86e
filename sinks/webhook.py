"""The webhook sink: each revision of a finding as one signed POST, by the Standard Webhooks specification (v1).

Guarantee: delivered when the endpoint answered 2xx. `webhook-id` is UID.REVISION, the same in every attempt and after a
crash: receivers drop what they have seen. Redirects are failures. 410 switches the endpoint off until the next start;
400, 413, 415 and 422 refuse this finding alone; everything else is tried again, for a person can mend a wrong key.
"""

import asyncio
import base64
import binascii
import re
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

import aiohttp
import structlog
from standardwebhooks import Webhook

from detectors.finding import Finding
from sinks.config import WebhookConfig
from sinks.delivery import Refused, RetryLater, SinkSetupError
from sinks.endpoint import Endpoint, EndpointForbidden, PinnedResolver, check_url
from sinks.formats import webhook

log = structlog.get_logger(__name__)

_ID: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")
_BAD_FINDING: Final = (400, 413, 415, 422)
_PREFIX: Final = "whsec_"


def build(config: WebhookConfig) -> "WebhookSink":
    """The sink of `[sinks.webhook]`. Raises `SinkSetupError` for a URL or a secret that can't be used."""
    try:
        endpoint = check_url(config.url, allow_private=config.allow_private)
        tls = ssl.create_default_context(cafile=config.ca_file)
    except EndpointForbidden as error:
        raise SinkSetupError(f"sinks.webhook.url: {error}") from None
    except (OSError, ssl.SSLError):
        raise SinkSetupError(f"sinks.webhook.ca_file {config.ca_file} can't be used") from None
    return WebhookSink(config, endpoint, [read_secret(path) for path in config.secret_files], tls)


def read_secret(path: Path) -> Webhook:
    """The signer for the `whsec_…` secret in `path`. Raises `SinkSetupError`; no message quotes the secret."""
    try:
        text = path.read_text(encoding="ascii").strip()
        key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except OSError as error:
        raise SinkSetupError(f"sinks.webhook.secret_files: {path} can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, binascii.Error):
        raise SinkSetupError(f"sinks.webhook.secret_files: {path} holds no whsec_ and base64") from None
    if not text.startswith(_PREFIX) or not 24 <= len(key) <= 64:
        raise SinkSetupError(f"sinks.webhook.secret_files: {path} must hold whsec_ and base64 of 24 to 64 bytes")
    return Webhook(text)


class WebhookSink:
    """Posts to one endpoint, one finding at a time."""

    name = "webhook"
    batch_max = 1

    def __init__(
        self,
        config: WebhookConfig,
        endpoint: Endpoint,
        signers: Sequence[Webhook],
        tls: ssl.SSLContext,
        *,
        resolver: PinnedResolver | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`now`: seconds since the epoch, for the timestamp of each attempt."""
        self._config = config
        self._endpoint = endpoint
        self._signers = signers
        self._tls = tls
        self._resolver = resolver or PinnedResolver(endpoint)
        self._now = now
        self._session: aiohttp.ClientSession | None = None
        self._gone = False

    async def send(self, findings: Sequence[Finding]) -> None:
        """Posts each. Raises `Refused`, `RetryLater`, or `OSError` when the endpoint failed or is away."""
        for finding in findings:
            if self._gone:
                raise Refused("the endpoint answered 410 Gone and is switched off until the next start")
            if not _ID.fullmatch(finding.uid):
                raise Refused("its uid can't be a webhook-id")
            body = webhook.encode(finding, bytes_max=self._config.body_max_bytes)
            await self._post(body, self._headers(f"{finding.uid}.{finding.revision}", body))

    async def close(self) -> None:
        """Closes the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _headers(self, message_id: str, body: bytes) -> dict[str, str]:
        """The three headers, signed with every secret so that the receiver may change over in its own time."""
        stamp = int(self._now())
        moment = datetime.fromtimestamp(stamp, UTC)
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(stamp),
            "webhook-signature": " ".join(signer.sign(message_id, moment, body.decode()) for signer in self._signers),
            "content-type": "application/json",
            "user-agent": "inferwatch",
        }

    async def _post(self, body: bytes, headers: dict[str, str]) -> None:
        try:
            async with (
                asyncio.timeout(self._config.timeout_s),
                self._client().post(self._endpoint.url, data=body, headers=headers, allow_redirects=False) as answer,
            ):
                status, retry_after = answer.status, answer.headers.get("retry-after", "")
                answer.close()
        except TimeoutError:
            raise TimeoutError(f"{self._endpoint.host} gave no answer in {self._config.timeout_s:g} s") from None
        except EndpointForbidden as error:
            raise OSError(str(error)) from None
        except aiohttp.ClientError as error:
            # The library's message may hold the URL, and a URL may hold a token.
            raise OSError(f"{self._endpoint.host} can't be reached: {type(error).__name__}") from None
        self._judge(status, retry_after)

    def _judge(self, status: int, retry_after: str) -> None:
        if 200 <= status < 300:
            return
        said = f"{self._endpoint.host} answered {status}"
        if status == 410:
            self._gone = True
            log.error("webhook switched off", host=self._endpoint.host, status=status)
            raise Refused(f"{said} Gone and is switched off until the next start")
        if status in _BAD_FINDING:
            raise Refused(said)
        wait_s = _seconds(retry_after, self._now())
        if wait_s is not None:
            raise RetryLater(said, wait_s)
        raise OSError(said)

    def _client(self) -> aiohttp.ClientSession:
        """No proxy, no cookies, no redirects, no name looked up twice: what was checked is what is connected to."""
        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(
                resolver=self._resolver, use_dns_cache=False, ssl=self._tls, limit=1, force_close=True
            )
            self._session = aiohttp.ClientSession(
                connector=connector, trust_env=False, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            )
        return self._session


def _seconds(retry_after: str, now: float) -> float | None:
    """Retry-After, in seconds or as a date (RFC 9110, 10.2.3); None where it is absent or nonsense."""
    text = retry_after.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None
