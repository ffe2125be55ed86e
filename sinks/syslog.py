"""The syslog sink: CEF in RFC 5424 messages over TCP or TLS, counted in octets.

Guarantee: `send` returns when the receiver's TCP stack has acknowledged every byte. Syslog has no acknowledgement of
its own, so what the receiver had taken but not handled when it died is lost there. A broken connection may double the
messages of its last batch (same externalId and revision).
"""

import asyncio
import fcntl
import os
import socket
import ssl
import struct
import termios
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Final

from detectors.finding import Finding
from sinks.config import SyslogConfig
from sinks.delivery import SinkSetupError
from sinks.formats import cef, syslog

_SEVERITY: Final = {"info": 6, "low": 5, "medium": 4, "high": 3, "critical": 2}
_HEADER_BYTES_MAX: Final = 800
"""Most that the RFC's header fields, our structured data and the spaces between take."""
_POLL_S: Final = 0.005


def build(config: SyslogConfig) -> "SyslogSink":
    """The sink of `[sinks.syslog]`. Raises `SinkSetupError` when a certificate or key can't be used."""
    context: ssl.SSLContext | None = None
    if config.tls:
        try:
            context = ssl.create_default_context(cafile=config.ca_file)
            if config.client_cert_file is not None:
                context.load_cert_chain(config.client_cert_file, config.client_key_file, password="")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
            raise SinkSetupError(f"sinks.syslog: a certificate or key file can't be used: {reason}") from None
    return SyslogSink(
        config, context, host=config.hostname or socket.gethostname(), product_version=version("inferwatch")
    )


class SyslogSink:
    """Keeps one connection, made when first needed and again after a failure."""

    name = "syslog"
    batch_max = 100

    def __init__(self, config: SyslogConfig, tls: ssl.SSLContext | None, *, host: str, product_version: str) -> None:
        self._config = config
        self._tls = tls
        self._host = host
        self._product_version = product_version
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, findings: Sequence[Finding]) -> None:
        """One framed message each. Raises `OSError` or `TimeoutError` when the receiver doesn't take them."""
        frames = b"".join(syslog.frame(self.message(finding)) for finding in findings)
        try:
            async with asyncio.timeout(self._config.timeout_s):
                reader, writer = await self._connected()
                writer.write(frames)
                await writer.drain()
                await _acknowledged(reader, writer)
        except BaseException:
            await self.close()
            raise

    def message(self, finding: Finding) -> bytes:
        """The message without its frame, at most `message_max_bytes`."""
        number = self._config.enterprise_number
        ids = {"uid": finding.uid[:64], "revision": str(finding.revision)}
        return syslog.message(
            cef.encode(
                finding,
                product_version=self._product_version,
                bytes_max=self._config.message_max_bytes - _HEADER_BYTES_MAX,
            ),
            facility=self._config.facility,
            severity=_SEVERITY[finding.severity],
            timestamp_us=finding.updated_us,
            host=self._host,
            app="inferwatch",
            process_id=str(os.getpid()),
            message_id=finding.detector,
            data={f"finding@{number}": ids} if number else None,
        )

    async def close(self) -> None:
        """Closes the connection."""
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await streams[1].wait_closed()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is not None:
            reader, writer = self._streams
            if not reader.at_eof() and not writer.is_closing():
                return self._streams
            await self.close()
        reader, writer = await asyncio.open_connection(self._config.host, self._config.port, ssl=self._tls)
        writer.transport.set_write_buffer_limits(0)
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._streams = reader, writer
        return reader, writer


async def _acknowledged(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Waits until nothing of ours is unacknowledged in the kernel; the caller limits the time."""
    connection = writer.get_extra_info("socket")
    while True:
        if reader.at_eof() or writer.is_closing():
            raise ConnectionResetError("the receiver closed the connection")
        (waiting,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4))
        if waiting == 0:
            return
        await asyncio.sleep(_POLL_S)
