"""The demo's webhook receiver: a small server on loopback that checks each signature with the official library."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final, Self

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

BODY_BYTES_MAX: Final = 64 * 1024


class Receiver:
    """Counts messages by id; a wrong signature is refused with 401. Use as a context manager."""

    def __init__(self, secret: str) -> None:
        self._webhook = Webhook(secret)
        self._seen: set[str] = set()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/findings"

    @property
    def delivered(self) -> int:
        """Distinct messages whose signature was right."""
        with self._lock:
            return len(self._seen)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="webhook-receiver", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, body: bytes, headers: dict[str, str]) -> int:
        try:
            self._webhook.verify(body, headers)
        except WebhookVerificationError:
            return 401
        with self._lock:
            self._seen.add(headers["webhook-id"])
        return 204

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_POST(self) -> None:
                size = int(self.headers.get("content-length") or 0)
                headers = {name.lower(): value for name, value in self.headers.items()}
                status = receiver._take(self.rfile.read(size), headers) if 0 < size <= BODY_BYTES_MAX else 413
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Quiet: the demo prints what counts."""

        return Handler
