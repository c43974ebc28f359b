"""HTTP: bodies that are streamed both ways, replies, ranges, and faults. What is asked and answered is elsewhere."""

import io
import json
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from .errors import HubError
from .storage import CHUNK_BYTES
from .traffic import Exchange, Fault, Traffic


MAXIMUM_JSON = 1 << 24
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class Reply:
    """A status, headers, and as body either bytes or a file (or the asked range of it)."""

    status: int = 200
    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, content, status: int = 200, **headers: str) -> "Reply":
        # YAML knows dates, JSON does not.
        body = json.dumps(content, default=str).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **headers})

    @classmethod
    def error(cls, error: HubError) -> "Reply":
        reply = cls.json({"error": error.message, **error.details}, error.status)
        # A header is one line of Latin-1, whatever the path was that the message quotes.
        reply.headers["X-Error-Message"] = re.sub(r"[^\x20-\x7e]", "?", error.message)
        if error.code is not None:
            reply.headers["X-Error-Code"] = error.code
        return reply


class ConnectionDroppedError(Exception):
    """The connection ends here, on purpose or because the client left."""


class Meter:
    """Counts the bytes of bodies and says where a fault interrupts them."""

    def __init__(self, exchange: Exchange, drop_after: int | None):
        self.exchange = exchange
        self.drop_after = drop_after

    def allow(self, size: int) -> int:
        """How many of so many bytes may still pass."""
        if self.drop_after is None:
            return size
        left = self.drop_after - self.exchange.bytes_in - self.exchange.bytes_out
        if left <= 0:
            raise ConnectionDroppedError
        return min(size, left)


class Body(io.RawIOBase):
    """The body of a request, of known length or in chunks."""

    def __init__(self, source, headers, meter: Meter):
        self._source = source
        self._meter = meter
        self._chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        length = headers.get("Content-Length", "0")
        if not re.fullmatch(r"\d{1,18}", length):
            raise HubError(400, "Invalid Content-Length")
        self._left = 0 if self._chunked else int(length)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if self._left == 0 and self._chunked:
            self._begin_chunk()
        if self._left == 0:
            return 0
        data = self._source.read(self._meter.allow(min(len(buffer), self._left)))
        if not data:
            raise ConnectionDroppedError
        buffer[: len(data)] = data
        self._left -= len(data)
        self._meter.exchange.bytes_in += len(data)
        if self._left == 0 and self._chunked:
            self._source.readline(8)
        return len(data)

    def _begin_chunk(self) -> None:
        size = self._source.readline(64).split(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
            raise ConnectionDroppedError
        self._left = int(size, 16)
        if self._left == 0:  # the last chunk; trailers, which nobody sends, end with an empty line
            self._chunked = False
            while self._source.readline(MAXIMUM_JSON).strip():
                pass

    def drain(self) -> None:
        """Reads what nobody wanted: the next request of the connection begins behind it."""
        buffer = bytearray(CHUNK_BYTES)
        while self.readinto(buffer):
            pass


@dataclass
class Request:
    """What was asked, by whom."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    lines: io.BufferedReader

    def read(self) -> bytes:
        data = self.lines.read(MAXIMUM_JSON)
        if self.lines.read(1):
            raise HubError(413, "Payload too large")
        return data

    def json(self) -> dict:
        try:
            content = json.loads(self.read() or b"{}")
        except ValueError as error:
            raise HubError(400, f"Invalid JSON: {error}") from error
        if not isinstance(content, dict):
            raise HubError(400, "Expected a JSON object")
        return content

    def chunks(self):
        while chunk := self.lines.read(CHUNK_BYTES):
            yield chunk

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


class HubHTTPServer(ThreadingHTTPServer):
    """Serves `answer(request) -> Reply`, one thread a connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, answer: Callable[[Request], Reply]):
        super().__init__(("127.0.0.1", port), Connection)
        self.answer = answer
        self.traffic = Traffic()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Connection(BaseHTTPRequestHandler):
    """One connection of a client, with one request after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each reply waits for 40 ms
    server: HubHTTPServer

    def serve(self) -> None:
        administers = urlsplit(self.path).path in ("/_faults", "/_log")
        exchange, fault = (
            (Exchange("", ""), None) if administers else self.server.traffic.begin(self.command, self.path)
        )
        meter = Meter(exchange, fault.after_bytes if fault and fault.action == "drop" else None)
        try:
            meter.allow(1)
            body = Body(self.rfile, self.headers, meter)
            reply = self.administer(body) if administers else self.reply(body, fault)
            body.drain()
            if fault is not None and fault.action == "lose-reply":
                raise ConnectionDroppedError
            exchange.status = reply.status
            self.send(reply, meter)
        except (ConnectionDroppedError, ConnectionError):
            self.close_connection = True
        except HubError as error:  # the request cannot be read, so that the next one cannot be found
            self.close_connection = True
            exchange.status = error.status
            self.send(Reply.error(error), meter)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def read_request(self, body: Body) -> Request:
        target = urlsplit(self.path)
        query = parse_qs(target.query, keep_blank_values=True)
        return Request(self.command, target.path, query, self.headers, io.BufferedReader(body, CHUNK_BYTES))

    def reply(self, body: Body, fault: Fault | None) -> Reply:
        if fault is not None and fault.action == "delay":
            time.sleep(fault.seconds)
        try:
            if fault is not None and fault.action == "status":
                reply = Reply.error(HubError(fault.status, f"Injected: {HTTPStatus(fault.status).phrase}"))
                if fault.retry_after is not None:
                    reply.headers["Retry-After"] = str(fault.retry_after)
                return reply
            return self.server.answer(self.read_request(body))
        except HubError as error:
            return Reply.error(error)
        except (ConnectionDroppedError, ConnectionError):
            raise
        except Exception:
            traceback.print_exc()
            return Reply.error(HubError(500, "Internal Server Error"))

    def administer(self, body: Body) -> Reply:
        """Adds and forgets faults (`POST`, `DELETE /_faults`); shows and forgets the log (`GET`, `DELETE /_log`)."""
        traffic, request = self.server.traffic, self.read_request(body)
        try:
            if request.method == "POST" and request.path == "/_faults":
                fault = Fault(**request.json())
                traffic.add_fault(fault)
                return Reply.json(asdict(fault))
            if request.method == "DELETE":
                traffic.clear_faults() if request.path == "/_faults" else traffic.clear_log()
            return Reply.json(traffic.log() if request.path == "/_log" else {})
        except TypeError as error:
            return Reply.error(HubError(400, str(error)))

    def send(self, reply: Reply, meter: Meter) -> None:
        """Sends a reply, of a file only the range that was asked for."""
        size = len(reply.body) if isinstance(reply.body, bytes) else reply.body.stat().st_size
        start, end = 0, size
        if isinstance(reply.body, Path):
            reply.headers["Accept-Ranges"] = "bytes"
            start, end = self.asked_range(size)
            if start >= end and size > 0:
                reply = Reply(416, b"", {"Content-Range": f"bytes */{size}"})
                start = end = 0
            elif (start, end) != (0, size):
                reply.status = 206
                reply.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            meter.exchange.status = reply.status
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(end - start))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            with io.BytesIO(reply.body) if isinstance(reply.body, bytes) else reply.body.open("rb") as file:
                file.seek(start)
                self.send_bytes(file, end - start, meter)

    def send_bytes(self, file, left: int, meter: Meter) -> None:
        while left > 0:
            chunk = file.read(meter.allow(min(CHUNK_BYTES, left)))
            # Counted first: whoever has received a byte finds it in the log.
            meter.exchange.bytes_out += len(chunk)
            self.wfile.write(chunk)
            left -= len(chunk)

    def asked_range(self, size: int) -> tuple[int, int]:
        """First byte and end of the range that was asked for; several ranges at once are answered by the whole."""
        asked = RANGE.fullmatch(self.headers.get("Range", "").strip())
        if asked is None or asked[1] == asked[2] == "":
            return 0, size
        if asked[1] == "":
            return max(size - int(asked[2]), 0), size
        return int(asked[1]), min(int(asked[2]) + 1, size) if asked[2] else size

    def log_message(self, *arguments) -> None:
        """The log is kept by `Traffic`."""
