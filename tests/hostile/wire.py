"""Hostile HTTP, byte by byte: requests that two parsers may read in two ways, and mutations of a good one.

Each case is made of a good key's header or of none. What is smuggled inside is a whole request without a key.
"""

import asyncio
import json
import random
from collections.abc import Iterator
from typing import NamedTuple

CHAT = b"/v1/chat/completions"
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]}).encode()
LENGTH = b"Content-Length: %d" % len(BODY)
INNER = b"POST " + CHAT + b" HTTP/1.1\r\nHost: inner\r\n" + LENGTH + b"\r\n\r\n" + BODY
CHUNKED = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"
TE = b"Transfer-Encoding: chunked"
CONCURRENT = 40
PATIENCE_S = 0.6
PATHS = (
    b"//v1/chat/completions", b"/v1//chat/completions", b"/v1/../v1/chat/completions", b"/v1/./chat/completions",
    b"/%2e/v1/chat/completions", b"/v1%2Fchat/completions", b"/v1/chat%2fcompletions", b"/v1/chat/completions/",
    b"/v1/chat/completions.", b"/v1/chat/completions..", b"/v1/chat/completions%20", b"/v1/chat/completions%00",
    b"/v1/chat/completions;x=1", b"/v1/chat/completions%3f", b"/v1/chat/completions#x", b"/V1/chat/completions",
    b"/v1/Chat/Completions", b"/v1/chat/completion%73", b"\\v1\\chat\\completions", b"/v1/chat/completions\x00",
    b"/v1/chat/completions\xc3\xa9", b"/v1/chat/%c0%ae%c0%ae/completions", b"/v1/chat/\xef\xbc\x8fcompletions",
    b"/health/../v1/chat/completions", b"/health;/../v1/chat/completions", b"http://inner/v1/chat/completions",
    b"HTTP://127.0.0.1/v1/chat/completions", b"inner:80", b"*", b"", b"v1/chat/completions",
    b"/v1/chat/completions?a=b",
    b"/health?x=/v1/chat/completions", b"/%76%31/chat/completions", b"/v1/chat/completions%0d%0aX: y", b"/health%00",
    b"/health/", b"/health/v1/chat/completions", b"/api/generate", b"/api/%67enerate", b"/api/pull",
    b"/" + b"a" * 9_000,
)  # fmt: skip
METHODS = (
    b"HEAD", b"OPTIONS", b"CONNECT", b"TRACE", b"PUT", b"PATCH", b"DELETE", b"post", b"Post", b"POSTX", b"P\x00ST",
    b"PRI", b"PROPFIND", b"", b" POST", b"POST\t", b"GET",
)  # fmt: skip
LENGTHS = (
    b"Content-Length: +%d" % len(BODY), b"Content-Length: -1", b"Content-Length: 0x10", b"Content-Length: 0",
    b"Content-Length: %d, %d" % (len(BODY), len(BODY)), b"Content-Length: 99999999999999999999", b"Content-Length:",
    b"Content-Length : %d" % len(BODY), b"Content-Length: %d\x0b" % len(BODY), b"Content_Length: 5",
    b"content-length: 5",
    LENGTH + b"\r\n" + LENGTH, LENGTH + b"\r\nContent-Length: 0", b"Content-Length: 0\r\n" + LENGTH,
    b"Content-Length: 1e2", b"Content-Length: \xd9\xa3", LENGTH + b"\r\nContent-Length: " + b"9" * 30,
)  # fmt: skip
CODINGS = (
    b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding: identity, chunked",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding:\tchunked",
    b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    b"Transfer-Encoding: \r\n chunked", b"transfer-encoding: CHUNKED", b"Transfer-Encoding: 'chunked'",
    b"X: y\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked\x00", b"\x00Transfer-Encoding: chunked",
    b"Transfer_Encoding: chunked", b"TE: chunked", b"Transfer-Encoding: chunked, chunked",
)  # fmt: skip
CHUNKS = (
    b"%x;x=y\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n",
    b'%x;x="\r\n' % len(BODY) + BODY + b"\r\n0\r\n\r\n",
    b"0%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n",
    b"0x%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n",
    b"-5\r\n" + BODY + b"\r\n0\r\n\r\n",
    b"FFFFFFFFFFFFFFFFF\r\n" + BODY,
    b"%x\n" % len(BODY) + BODY + b"\n0\n\n",
    b"%x\r\n" % (len(BODY) - 3) + BODY + b"\r\n0\r\n\r\n",
    b"%x\r\n" % len(BODY) + BODY + b"0\r\n\r\n",
    CHUNKED[:-4],
    b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nAuthorization: Bearer other\r\nX-Api-Key: other\r\n\r\n",
    b"0\r\n\r\n" + INNER,
    b"5\r\nabc",
    b"\r\n",
)


BITS = (
    b"\r\n", b"\n", b"\r", b"\x00", b" ", b"\t", b":", b",", b"chunked", b"0\r\n\r\n", b"/", b"%2f", b"..", LENGTH, TE,
    b"Authorization: Bearer x", b"X-Api-Key: x", b"Host: y", b"\xff", INNER, b"HTTP/1.1", b'"',
)  # fmt: skip


class Case(NamedTuple):
    """What is sent on one connection. `keyed`: whether a good key stands in its outer request."""

    name: str
    raw: bytes
    keyed: bool


def request(
    *, method: bytes = b"POST", path: bytes = CHAT, headers: tuple[bytes, ...] = (LENGTH,), body: bytes = BODY,
    version: bytes = b"HTTP/1.1", host: bytes = b"Host: x\r\n", end: bytes = b"\r\n",
) -> bytes:  # fmt: skip
    """One request; every part may be wrong."""
    lines = [method + b" " + path + b" " + version, *((host.rstrip(b"\r\n"),) if host else ()), *headers, b"", b""]
    return end.join(lines) + body


def cases(key: str) -> Iterator[Case]:
    """Every case, with a good key and without one."""
    auth = b"Authorization: Bearer " + key.encode()
    for keyed, keys in ((True, (auth,)), (False, ())):
        for name, raw in _requests(keys):
            yield Case(name, raw, keyed)
    for name, keys in _keys(key.encode()):
        yield Case(name, request(headers=(*keys, LENGTH)), keyed=True)


def _requests(keys: tuple[bytes, ...]) -> Iterator[tuple[str, bytes]]:
    plain = (*keys, LENGTH)
    yield "good", request(headers=plain)
    yield from ((f"path {path[:40]!r}", request(path=path, headers=plain)) for path in PATHS)
    yield from ((f"method {method!r}", request(method=method, headers=plain)) for method in METHODS)
    yield from ((f"length {length!r}", request(headers=(*keys, length), body=BODY + INNER)) for length in LENGTHS)
    for coding in (TE, *CODINGS):
        yield f"coding {coding!r}", request(headers=(*keys, coding), body=CHUNKED + INNER)
        yield f"CL and {coding!r}", request(headers=(*plain, coding), body=CHUNKED + INNER)
        yield f"{coding!r} and CL", request(headers=(*keys, coding, b"Content-Length: 5"), body=CHUNKED + INNER)
    yield from ((f"chunk {chunk[:20]!r}", request(headers=(*keys, TE), body=chunk + INNER)) for chunk in CHUNKS)
    yield "pipelined", request(headers=plain) + INNER + request(headers=plain) + INNER
    yield "body longer than said", request(headers=plain, body=BODY + INNER)
    yield "GET with a body", request(method=b"GET", path=b"/health", headers=plain, body=INNER)
    yield "folded header", request(headers=(*keys, b"X: y\r\n " + LENGTH, LENGTH))
    yield "folded key", request(headers=(b"Authorization:\r\n Bearer x", *plain))
    yield "no host", request(headers=plain, host=b"")
    yield "two hosts", request(headers=plain, host=b"Host: a\r\nHost: b\r\n")
    yield "odd host", request(headers=plain, host=b"Host: a@b/../c\r\n")
    yield "bare LF", request(headers=plain, end=b"\n")
    yield "bare CR", request(headers=plain, end=b"\r")
    yield "HTTP/1.0", request(headers=plain, version=b"HTTP/1.0") + INNER
    yield "HTTP/0.9", b"GET /health\r\n\r\n" + INNER
    yield from (
        (f"version {v!r}", request(headers=plain, version=v)) for v in (b"HTTP/2.0", b"HTTP/1.2", b"http/1.1", b"")
    )
    yield "h2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00" + INNER
    h2c = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
    yield "h2c", request(headers=(*plain, *h2c), body=BODY + INNER)
    socket = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: AAAA")
    yield "websocket", request(method=b"GET", path=b"/v1/realtime", headers=(*keys, *socket), body=INNER)
    yield "websocket to chat", request(method=b"GET", headers=(*keys, *socket), body=INNER)
    yield "expect", request(headers=(*plain, b"Expect: 100-continue"))
    yield "giant header", request(headers=(*plain, b"X: " + b"y" * 70_000))
    yield "many headers", request(headers=(*plain, *(b"X-%d: y" % n for n in range(3_000))))
    yield "NUL header", request(headers=(*plain, b"X: a\x00b"))
    yield "split header", request(headers=(*plain, b"X: a\r\n\r\n" + INNER))
    yield "doubled JSON key", request(headers=(*keys, b"Content-Length: 29"), body=b'{"prompt":"a","prompt":"bcd"}')
    yield "half a body", request(headers=(*keys, b"Content-Length: 5000"))
    yield "half a head", request(headers=plain)[:60]
    yield "nothing", b""
    yield "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100


def _keys(key: bytes) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    good = b"Authorization: Bearer " + key
    yield "good then bad key", (good, b"Authorization: Bearer other")
    yield "bad then good key", (b"Authorization: Bearer other", good)
    yield "two names", (good, b"X-Api-Key: other")
    yield "key in a list", (b"Authorization: Bearer other, Bearer " + key,)
    yield "key twice", (good, good)
    yield "odd scheme", (b"Authorization: bEaReR  " + key,)
    yield "space before the colon", (b"Authorization : Bearer " + key,)
    yield "underscore", (b"X_Api_Key: " + key,)
    yield "key with NUL", (good + b"\x00",)
    yield "key with tail", (good + b"x",)


def mutations(key: str, seed: int, count: int) -> Iterator[Case]:
    """A good request, damaged in one to four places."""
    chosen = random.Random(seed)  # noqa: S311 - damage that can be made again
    auth = b"Authorization: Bearer " + key.encode()
    for number in range(count):
        keyed = chosen.random() < 0.5
        raw = bytearray(request(headers=(*((auth,) if keyed else ()), LENGTH)) + INNER)
        for _ in range(chosen.randint(1, 4)):
            place = chosen.randrange(len(raw))
            match chosen.randrange(5):
                case 0:
                    raw[place] = chosen.randrange(256)
                case 1:
                    raw[place:place] = chosen.choice(BITS)
                case 2:
                    del raw[place : place + chosen.randint(1, 20)]
                case 3:
                    end = place + chosen.randint(1, 60)
                    raw[place:place] = raw[place:end]
                case _:
                    raw[place : place + 1] = raw[place : place + 1].swapcase()
        yield Case(f"mutation {number} of seed {seed}", bytes(raw), keyed)


async def _send(port: int, case: Case, at_once: asyncio.Semaphore) -> bytes:
    async with at_once:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = b""
        try:
            writer.write(case.raw)
            await writer.drain()
            while piece := await asyncio.wait_for(reader.read(65_536), PATIENCE_S):
                answer += piece
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()
        return answer


async def send_all(port: int, chosen: list[Case]) -> list[bytes]:
    """All answers' bytes, each case on a connection of its own."""
    at_once = asyncio.Semaphore(CONCURRENT)
    return await asyncio.gather(*(_send(port, case, at_once) for case in chosen))
