"""The served page: zooms, rows and columns against the formula; whom it answers, and when not."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import pytest
import torch
from cases import Case, build
from formulas import Dense, heat_map
from observed import HOSTILE, measured, words
from tolerance import assert_close_to_oracle
from torch import Tensor, nn

import manyheads as mh
from manyheads.inspect import Server, serve

MEASURES = (mh.HeatMap(8, 8), mh.TopKeys(3), mh.Entropy())
CASES = [
    Case("causal", "alibi", (6, 3), lengths=(37, 37), sinks=True),
    Case("window", "relative", (6, 2), lengths=(29, 37), softcap=2.0, layout="rows_first"),
    Case("left_padding", "none", (3, 3), lengths=(23, 31), scale=-0.7),
    Case("lengths", "none", (2, 1), lengths=(13, 31), dtype=torch.bfloat16),
    Case("outside", "dense", (2, 2), lengths=(19, 29), dtype=torch.float16),
    Case("dense", "none", (3, 1), lengths=(17, 23), dtype=torch.float64),
    Case("none", "none", (2, 2), lengths=(7, 41), batch=1),
]
OTHERS = {"input": 0, "layer": 0, "head": 0}
ZOOM = {**OTHERS, "queries": "2,9", "keys": "1,11", "rows": 7, "columns": 10}


class Attend(nn.Module):
    """Calls the function with what it was made with."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mh.attention(query, key, value, **self.arguments)


class Asker:
    """Asks a server over a connection of its own."""

    def __init__(self, server: Server) -> None:
        self.address = urlsplit(server.url)

    def get(
        self, path: str = "", given: dict[str, Any] | None = None, **headers: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        assert self.address.port is not None
        connection = http.client.HTTPConnection("127.0.0.1", self.address.port, timeout=20)
        query = "?" + urlencode(given, safe=",") if given else ""
        where = path if path.startswith("/") else self.address.path + path
        connection.request("GET", where + query, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer, body

    def numbers(self, path: str, **given: Any) -> Tensor:
        answer, body = self.get(path, given)
        assert answer.status == 200, body
        assert answer.getheader("Content-Type") == "application/octet-stream"
        return torch.from_numpy(np.frombuffer(body, "<f4").copy())

    def refusal(self, path: str = "", given: dict[str, Any] | None = None, **headers: str) -> Any:
        """(status, what it says)"""
        answer, body = self.get(path, given, **headers)
        assert answer.getheader("Content-Type") == "application/json"
        return answer.status, json.loads(body)["error"]


# --- what it answers ------------------------------------------------------------------------------


def observed(case: Case, **options: Any) -> mh.Seen:
    """The case's call, kept; what a cache or a careless model does to its tensors later is not."""
    built = build(case)
    model = Attend(**built.arguments)
    tensors = [x.clone() for x in (built.problem.query, built.problem.key, built.problem.value)]
    with torch.inference_mode(), mh.observe(model, *MEASURES, keep_megabytes=1, **options) as seen:
        model(*tensors)
        for tensor in (*tensors, built.problem.sinks):  # a parameter, that is trained on
            if tensor is not None:
                tensor.fill_(torch.nan)
    return seen


def assert_weights(
    found: Tensor, case: Case, batch: int, head: int, window: Any, cells: Any
) -> None:
    """The rule for a window of the map, [rows, columns]."""
    built = build(case)
    accumulate = torch.float64 if case.dtype == torch.float64 else torch.float32
    formula = heat_map(*cells, *window)
    oracle, plain = (
        formula(Dense(built, case, dtype))[batch, head][None, None]
        for dtype in (torch.float64, accumulate)
    )
    # Sent as float32, whatever it was computed in.
    assert_close_to_oracle(found[None, None], oracle, plain.float(), torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_answers_are_those_of_the_formula(case: Case) -> None:
    (q_len, k_len), batch, head = case.lengths, case.batch - 1, case.heads[0] - 1
    texts = {"tokens": words(q_len), "key_tokens": words(k_len)}
    with serve(observed(case), **texts, batch=batch) as server:
        ask = Asker(server)
        where = {"input": 0, "layer": 0, "head": head}
        windows = [((0, q_len), (0, k_len)), ((2, 7), (0, k_len)), ((q_len - 5, q_len), (3, 17))]
        for (q0, q1), (k0, k1) in windows:
            for cells in ((q1 - q0, k1 - k0), (3, 5), (1, 1)):
                rows, columns = cells
                found = ask.numbers(
                    "zoom", **where, queries=f"{q0},{q1}", keys=f"{k0},{k1}", rows=rows,
                    columns=columns,
                )  # fmt: skip
                window = slice(q0, q1), slice(k0, k1)
                assert_weights(found.view(cells), case, batch, head, window, cells)
        everything = slice(None), slice(None)
        rows = torch.stack([ask.numbers("row", **where, row=row) for row in range(q_len)])
        assert_weights(rows, case, batch, head, everything, case.lengths)
        columns = [ask.numbers("column", **where, key=key) for key in range(k_len)]
        assert_weights(torch.stack(columns, 1), case, batch, head, everything, case.lengths)


def test_a_cache_may_count_on() -> None:
    """A static cache adds to its query offset in place."""
    start, x = torch.tensor([4, 9], dtype=torch.int32), torch.randn(2, 3, 31, 7)
    model = Attend(mask=mh.Causal(), query_start=start)
    with torch.no_grad(), mh.observe(model, *MEASURES, keep_megabytes=1) as seen:
        model(x[:, :, :5], x, x)
    start.add_(5)
    with serve(seen, words(5), key_tokens=words(14), batch=1) as server:
        row = Asker(server).numbers("row", **OTHERS, row=2)
    assert (row[:12] > 0).all() and not row[12:].any()


def two_layers(seed: int = 3, length: int = 11, **options: Any) -> mh.Seen:
    torch.manual_seed(seed)
    model = nn.Sequential(*(mh.MultiHeadAttention(15, 3, mask=mh.Causal()) for _ in range(2)))
    with torch.no_grad(), mh.observe(model, *MEASURES, mh.WeightRows((7,)), **options) as seen:
        model(torch.randn(1, length, 15))
    return seen


def test_layers_heads_and_inputs_are_told_apart() -> None:
    """The heads' own numbers, where only some of them were measured."""
    one, two = (two_layers(s, heads=(2, 0), keep_megabytes=1) for s in (3, 5))
    with serve(one, words(11), compare=(two, words(11))) as server:
        for which, seen in enumerate((one, two)):
            for layer, name in enumerate(seen.layers):
                (record,) = seen[name]
                for place, head in enumerate((2, 0)):
                    found = Asker(server).numbers("row", input=which, layer=layer, head=head, row=7)
                    expected = record[mh.WeightRows((7,))][0, place, 0]
                    torch.testing.assert_close(found, expected)


def test_what_is_kept_is_counted() -> None:
    seen = two_layers(keep_megabytes=1)
    assert seen.kept is not None
    assert seen.kept.size == 2 * 2 * 11 * 15 * 4  # layers, query and key, tokens, numbers, bytes
    with serve(seen, words(11)) as server:
        assert server.kept_bytes == seen.kept.size and "0.0 MB" in repr(server)
    assert two_layers().kept is None
    grouped = observed(Case("dense_shared", "none", (6, 2), lengths=(29, 37)))
    assert grouped.kept is not None
    assert grouped.kept.size == 2 * (6 * 29 + 2 * 37) * 17 * 4 + 29 * 37  # and the mask


def test_layers_share_a_mask() -> None:
    mask, x = torch.rand(31, 31) > 0.5, torch.randn(1, 31, 6)
    model = nn.Sequential(*(mh.MultiHeadAttention(6, 1, mask=mh.Dense(mask)) for _ in range(3)))
    with torch.no_grad(), mh.observe(model, *MEASURES, keep_megabytes=1) as seen:
        model(x)
    assert seen.kept is not None
    assert 31 * 31 <= seen.kept.size - 3 * 2 * 31 * 6 * 4 < 2 * 31 * 31


def test_too_much_to_keep_is_refused() -> None:
    with pytest.raises(mh.ArgumentError) as caught:
        two_layers(length=41, keep_megabytes=0.006)
    for part in (
        "0.0 MB after 1 calls",
        "layer '1'",
        "expected at most 0.0 MB",
        "--keep-megabytes",
    ):
        assert part in str(caught.value)
    with pytest.raises(mh.ArgumentError, match="keep_megabytes=0; expected a number above 0"):
        two_layers(keep_megabytes=0)


# --- whom it answers ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve(two_layers(keep_megabytes=1), words(11)) as running:
        yield running


def test_the_page(server: Server) -> None:
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{22}/", server.url)
    answer, body = Asker(server).get()
    html = body.decode()
    assert answer.status == 200 and answer.getheader("Content-Type") == "text/html; charset=utf-8"
    assert "fetch(" in html and "connect-src &#x27;self&#x27;" in html
    assert answer.getheader("X-Content-Type-Options") == "nosniff"
    assert answer.getheader("Content-Security-Policy") == "frame-ancestors 'none'"
    assert answer.getheader("Cache-Control") == "no-store"
    plain = mh.view(two_layers(), words(11)).html
    assert "fetch(" not in plain and "connect-src" not in plain


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:80", "LocalHost:1234"])
def test_its_own_names(server: Server, host: str) -> None:
    assert Asker(server).get("", Host=host)[0].status == 200


@pytest.mark.parametrize(
    "host", ["example.com", "127.0.0.1.example.com", "localhost@example.com", "10.0.0.1", "", "0"]
)
@pytest.mark.parametrize("path", ["", "zoom"])
def test_other_names_are_refused(server: Server, host: str, path: str) -> None:
    status, words_ = Asker(server).refusal(path, ZOOM if path else None, Host=host)
    assert status == 403 and f"got Host {host or ''}" in words_ and "127.0.0.1 or" in words_


def raw(server: Server, request: bytes) -> bytes:
    address = urlsplit(server.url)
    with socket.create_connection(("127.0.0.1", address.port), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_no_name_or_two_are_refused(server: Server) -> None:
    path = urlsplit(server.url).path.encode()
    assert b" 403 " in raw(server, b"GET %b HTTP/1.1\r\n\r\n" % path).split(b"\r\n")[0]
    two = b"Host: localhost\r\nHost: example.com\r\n"
    assert b" 403 " in raw(server, b"GET %b HTTP/1.1\r\n%b\r\n" % (path, two)).split(b"\r\n")[0]


def test_only_who_knows_the_address(server: Server) -> None:
    ask, secret = Asker(server), urlsplit(server.url).path.strip("/")
    wrong = secret[:-1] + ("a" if secret[-1] != "a" else "b")
    paths = ["/", f"/{wrong}/", f"/{secret}", f"/{secret}/other", f"/{secret}/../", "/\xe9/", "//"]
    for path in [*paths, f"/{secret}/zoom/", f"/{secret}//", f"/{secret}/zoom%0a"]:
        assert ask.refusal(path.replace("\xe9", "%E9"))[0] == 404, path
    for method in (b"POST", b"PUT", b"OPTIONS"):
        request = b"%b /%b/ HTTP/1.1\r\nHost: localhost\r\n\r\n" % (method, secret.encode())
        assert b" 501 " in raw(server, request).split(b"\r\n")[0]


def test_it_listens_nowhere_else(server: Server) -> None:
    port = urlsplit(server.url).port
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=5)


# Path, what is changed in ZOOM (None: left out) -> what the answer must hold.
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown layer": ("zoom", {"layer": 2}, "layer is not there: got 2; expected 0 to 1"),
    "layer below": ("zoom", {"layer": -1}, "layer is not there: got -1; expected 0 to 1"),
    "unknown head": ("zoom", {"head": 3}, "head is not there: got 3; expected one of [0, 1, 2]"),
    "unknown input": ("zoom", {"input": 1}, "input is not there: got 1; expected 0 to 0"),
    "no layer": ("zoom", {"layer": None}, "layer cannot be read: got nothing; expected a whole"),
    "a layer's name": ("zoom", {"layer": "0.self"}, "layer cannot be read: got 0.self"),
    "a long number": ("zoom", {"layer": "9" * 5000}, "layer cannot be read: got 99"),
    "another's digits": ("zoom", {"layer": "\u0661"}, "layer cannot be read"),
    "queries past the end": ("zoom", {"queries": "2,12"}, "got 2,12; expected begin,end with 0 <="),
    "queries turned round": ("zoom", {"queries": "9,2"}, "queries are not there: got 9,2"),
    "no queries": ("zoom", {"queries": "2,2"}, "queries are not there: got 2,2"),
    "keys below": ("zoom", {"keys": "-1,4"}, "keys are not there: got -1,4"),
    "one key": ("zoom", {"keys": "4"}, "keys cannot be read: got 4; expected begin,end"),
    "no rows": ("zoom", {"rows": 0}, "rows is not there: got 0; expected 1 to 1024"),
    "too many columns": ("zoom", {"columns": 1025}, "columns is not there: got 1025"),
    "row past the end": ("row", {"row": 11}, "row is not there: got 11; expected 0 to 10"),
    "row below": ("row", {"row": -1}, "row is not there: got -1; expected 0 to 10"),
    "no row": ("row", {}, "row cannot be read: got nothing"),
    "key past the end": ("column", {"key": 11}, "key is not there: got 11; expected 0 to 10"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(server: Server, name: str) -> None:
    path, change, expected = BAD[name]
    given = {**ZOOM, **change}
    status, message = Asker(server).refusal(path, {k: v for k, v in given.items() if v is not None})
    assert status == 400 and expected in message and len(message) < 250
    assert Asker(server).numbers("zoom", **ZOOM).shape == (70,)  # it goes on


def test_a_number_given_twice(server: Server) -> None:
    ask = Asker(server)
    query = urlencode(ZOOM, safe=",")
    answer, body = ask.get(f"zoom?{query}&layer=1")
    assert answer.status == 400 and b"layer cannot be read: got 0, 1" in body


def test_an_unexpected_error_is_told(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(server._listener.exact, "row", fails)
    assert Asker(server).refusal("row", {**OTHERS, "row": 1}) == (500, "RuntimeError: no such luck")
    assert "no such luck" in capfd.readouterr().err


def test_one_that_hangs_up_is_no_error(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    computed = []
    exact, row = server._listener.exact, server._listener.exact.row
    exact.row = lambda *where: computed.append(where) or row(*where)  # type: ignore[method-assign]
    address = urlsplit(server.url)
    request = (
        f"GET {address.path}row?input=0&layer=0&head=0&row=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    )
    with server._listener.computing:  # somebody else's turn
        with socket.create_connection(("127.0.0.1", address.port), timeout=20) as connection:
            connection.sendall(request.encode())
        assert Asker(server).get()[0].status == 200  # the page itself waits for nobody
    assert Asker(server).numbers("row", **OTHERS, row=2).shape == (11,)
    del exact.row
    assert all(where[-1] == 2 for where in computed)
    assert capfd.readouterr().err == ""


# --- beginning and end ----------------------------------------------------------------------------


def test_shutdown() -> None:
    seen = two_layers(keep_megabytes=1)
    before = set(threading.enumerate())
    with serve(seen, words(11)) as server:
        assert server.start() is server
        address = urlsplit(server.url)
        port = address.port
        kept_alive = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        for _ in range(2):
            kept_alive.request("GET", address.path)
            assert len(kept_alive.getresponse().read()) > 1000
    server.close()
    kept_alive.auto_open = 0
    with pytest.raises((OSError, http.client.HTTPException)):
        kept_alive.request("GET", address.path)
        kept_alive.getresponse()
    assert "manyheads" not in {one.name for one in set(threading.enumerate()) - before}
    with pytest.raises(ConnectionRefusedError):
        Asker(server).get()
    with serve(seen, words(11), port=port) as again:  # the port is free again
        assert urlsplit(again.url).port == port and again.url != server.url
        with pytest.raises(
            mh.ArgumentError, match=rf"at port {port}: got .*in use; .*give another"
        ):
            serve(seen, words(11), port=port)
    serve(seen, words(11)).close()  # one that never answered


def test_ctrl_c_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(two_layers(keep_megabytes=1), words(11))

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server._listener, "service_actions", interrupted)
    server.serve_forever()
    with pytest.raises(ConnectionRefusedError):
        Asker(server).get()


def test_hostile_tokens_are_text_here_too() -> None:
    seen = two_layers(length=len(HOSTILE), keep_megabytes=1)
    with serve(seen, HOSTILE, title="</title><script>") as server:
        html = Asker(server).get()[1].decode()
    assert "</title><script>" not in html and HOSTILE[0] not in html


def stepwise() -> mh.Seen:
    model = mh.MultiHeadAttention(6, 2, mask=mh.Causal())
    cache = mh.KVCache()
    with torch.no_grad(), mh.observe(model, *MEASURES, keep_megabytes=1) as seen:
        for length in (3, 1, 1):
            model(torch.randn(1, length, 6), cache=cache)
    return seen


CANNOT = {
    "nothing kept": (
        lambda: serve(two_layers(), words(11)), "without queries and keys", "keep_mega",
    ),
    "a file": (
        lambda: serve(measured(*MEASURES), words(11)), "without queries and keys", "keep_mega",
    ),
    "the other's not kept": (
        lambda: serve(two_layers(keep_megabytes=1), words(11), compare=(two_layers(), words(11))),
        "without queries and keys", "keep_megabytes",
    ),
    "step by step": (
        lambda: serve(stepwise(), words(5)), "got 3 calls", "one of all tokens", "model(ids)",
    ),
    "a port below": (lambda: serve(two_layers(keep_megabytes=1), words(11), port=-1), "0 to 65535"),
    "tokens": (lambda: serve(two_layers(keep_megabytes=1), words(7)), "got 7; expected 11"),
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_served(name: str) -> None:
    call, *parts = CANNOT[name]
    with pytest.raises(mh.ArgumentError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


def test_a_record_of_another_is_not_computed_from() -> None:
    seen, other = two_layers(keep_megabytes=1), two_layers()
    mixed = mh.Seen(other)
    mixed.kept = seen.kept
    assert mixed.kept is not None
    mixed.kept._calls.pop(("1", 0))
    with pytest.raises(mh.ArgumentError, match="queries and keys of '1' are not there"):
        serve(mixed, words(11))
