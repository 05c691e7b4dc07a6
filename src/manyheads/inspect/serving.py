"""`serve()`: the page of `view` on this machine alone, with any zoom and any token exact.

GET only, below an address that cannot be guessed:

    /TOKEN/                                                          the page
    /TOKEN/zoom?input=&layer=&head=&queries=a,b&keys=a,b&rows=&columns=   float32 [rows, columns]
    /TOKEN/row?input=&layer=&head=&row=                              float32 [Lk], a query's weights
    /TOKEN/column?input=&layer=&head=&key=                           float32 [Lq], a key's

Numbers are little-endian. What cannot be answered is {"error": "..."}: 400 for what makes no sense,
403 for another Host, 404 for another address.
"""

from __future__ import annotations

import json
import re
import secrets
import select
import socket
import socketserver
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from manyheads.arguments import whole_number
from manyheads.errors import ArgumentError
from manyheads.inspect import page as pages
from manyheads.inspect.exact import Exact
from manyheads.inspect.records import Seen
from manyheads.inspect.sheets import Floats

ADDRESS = "127.0.0.1"
#: A page elsewhere may have its own name resolve to 127.0.0.1 (DNS rebinding); its requests carry
#: that name. Any port: a tunnel's is another.
_OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(
    seen: Seen,
    tokens: Sequence[str],
    *,
    key_tokens: Sequence[str] | None = None,
    batch: int = 0,
    detail: Iterable[pages.HeadName] | None = None,
    compare: tuple[Any, ...] | None = None,
    title: str = "Attention",
    max_megabytes: float = 3.0,
    port: int = 0,
) -> Server:
    """The page of `view`, on 127.0.0.1, that computes exact zooms and single tokens when asked.

    Only who knows its `url` gets anything, which no other user of the machine can guess.

    Args:
        seen: what `observe(..., keep_megabytes=...)` recorded, each layer called once.
        tokens: as for `view`, as all that follow but the last. compare: another such record.
        key_tokens: the keys' own text.
        batch: which batch element.
        detail: the heads whose single tokens are in the page itself.
        compare: (seen, tokens) or (seen, tokens, key_tokens) of another input.
        title: what stands above it all.
        max_megabytes: how large the page may be.
        port: where to listen; 0: at a free one.

    Returns:
        The server, listening. It answers inside `with server:`, or in `server.serve_forever()`.

    Raises:
        ArgumentError: as `view`; no queries and keys were kept; the port is not free.
        ArgumentTypeError: as `view`.

    >>> import torch, manyheads as mh
    >>> from manyheads.inspect import serve
    >>> model = mh.MultiHeadAttention(8, 2, mask=mh.Causal())
    >>> with mh.observe(model, mh.HeatMap(), keep_megabytes=1) as seen:
    ...     _ = model(torch.randn(1, 5, 8))
    >>> with serve(seen, ["a", " page", " of", " five", " tokens"]) as server:
    ...     server.url
    'http://127.0.0.1:.../.../'
    """
    if not 0 <= whole_number(port, "port") <= 65535:
        raise ArgumentError(
            f"port is {port}; expected 0 to 65535: leave it out for a free one of the system's."
        )
    sheets = pages.sheets_of(seen, tokens, key_tokens, batch, compare)
    others = [] if compare is None else [compare[0]]
    exact = Exact(list(zip([seen, *others], sheets, strict=True)), batch)
    page = pages.page_of(
        sheets, detail=detail, title=title, max_megabytes=max_megabytes, served=True
    )
    return Server(page, exact, port)


class Server:
    """What `serve` returns: a page and its exact numbers, until it is closed.

    url: where a browser finds it. kept_bytes: what its queries and keys take in memory.
    """

    def __init__(self, page: pages.Page, exact: Exact, port: int) -> None:
        self.kept_bytes = exact.size
        try:
            self._listener = _Listener(page, exact, port)
        except OSError as problem:
            raise ArgumentError(
                f"cannot listen at port {port}: got {problem.strerror}; expected a free one; give "
                "another, or leave it out for one of the system's"
            ) from problem
        self.url = f"http://{ADDRESS}:{self._listener.server_address[1]}/{self._listener.secret}/"
        self._thread: Thread | None = None

    def serve_forever(self) -> None:
        """Answer, until Ctrl-C (which raises nothing here); then close."""
        try:
            self._listener.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self._listener.server_close()

    def start(self) -> Server:
        """Answer in a thread of its own, until `close`."""
        if self._thread is None:
            self._thread = Thread(
                target=self._listener.serve_forever, args=(0.05,), name="manyheads", daemon=True
            )
            self._thread.start()
        return self

    def close(self) -> None:
        """Stop, and give the port back; may be called again."""
        if self._thread is not None:
            self._listener.shutdown()
            self._thread.join()
            self._thread = None
        self._listener.server_close()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Server({self.url!r}, {self.kept_bytes / 1e6:.1f} MB of queries and keys)"


class _Listener(ThreadingHTTPServer):
    """The socket, and what its handlers share."""

    def __init__(self, page: pages.Page, exact: Exact, port: int) -> None:
        self.page = page.html.encode()
        self.exact = exact
        self.secret = secrets.token_urlsafe(16)
        self.computing = Lock()  # one at a time: each uses all threads of torch
        self._connections: set[Any] = set()
        super().__init__((ADDRESS, port), _Handler)

    def server_bind(self) -> None:
        """Without asking for this machine's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Connections that are kept alive end too: their handlers would go on answering."""
        super().server_close()
        for connection in list(self._connections):
            with suppress(OSError):  # has ended meanwhile
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Refused(Exception):
    """What a request gets instead of an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "manyheads"
    sys_version = ""
    timeout = 60.0  # of silence
    server: _Listener

    def do_GET(self) -> None:
        try:
            kind, body = self._answer()
        except _Refused as problem:
            self._send(problem.status, "application/json", _error(problem))
        except ArgumentError as problem:
            self._send(400, "application/json", _error(problem))
        except ConnectionError:
            self.close_connection = True
        except Exception as problem:
            self.server.handle_error(self.request, self.client_address)  # shows where it was
            self._send(500, "application/json", _error(f"{type(problem).__name__}: {problem}"))
        else:
            self._send(200, kind, body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the library does not print."""

    def _answer(self) -> tuple[str, bytes]:
        """(content type, body)."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _OWN_HOST.fullmatch(hosts[0].strip()):
            raise _Refused(
                403,
                f"not for you: got Host {', '.join(hosts) or 'none'}; expected {ADDRESS} or "
                "localhost; open the address that manyheads gave",
            )
        address = urlsplit(self.path)
        found = re.fullmatch(r"/([^/]*)/(|zoom|row|column)", address.path)
        secret, name = found.groups() if found else ("", "")
        if not secrets.compare_digest(secret.encode(), self.server.secret.encode()):
            raise _Refused(404, "nothing is here; expected the address that manyheads gave")
        if not name:
            return "text/html; charset=utf-8", self.server.page
        asked = _Asked(address.query)
        with self.server.computing:
            if self._gone():
                raise ConnectionAbortedError
            numbers = _computed(self.server.exact, name, asked)
        return "application/octet-stream", numbers.astype("<f4").tobytes()

    def _gone(self) -> bool:
        """Whether the browser has hung up: it wants another part by now."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Asked:
    """The numbers of a request."""

    def __init__(self, query: str) -> None:
        self._given = parse_qs(query, keep_blank_values=True)

    def numbers(self, name: str, count: int = 1) -> tuple[int, ...]:
        given = self._given.get(name, [])
        text = ", ".join(given) or "nothing"
        # A few digits: int() of a million takes seconds.
        one = r"-?\d{1,12}"
        if len(given) != 1 or not re.fullmatch(",".join([one] * count), given[0], re.ASCII):
            form = "a whole number" if count == 1 else "begin,end"
            raise ArgumentError(f"{name} cannot be read: got {text[:80]}; expected {form}")
        return tuple(map(int, given[0].split(",")))

    def number(self, name: str) -> int:
        return self.numbers(name)[0]

    def pair(self, name: str) -> tuple[int, int]:
        begin, end = self.numbers(name, 2)
        return begin, end


def _computed(exact: Exact, name: str, asked: _Asked) -> Floats:
    where = asked.number("input"), asked.number("layer"), asked.number("head")
    if name == "row":
        return exact.row(*where, asked.number("row"))
    if name == "column":
        return exact.column(*where, asked.number("key"))
    cells = asked.number("rows"), asked.number("columns")
    return exact.zoom(*where, asked.pair("queries"), asked.pair("keys"), cells)


def _error(problem: object) -> bytes:
    return json.dumps({"error": str(problem)}).encode()
