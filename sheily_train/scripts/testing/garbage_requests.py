"""Requests that no honest client sends, as raw bytes, all of them made from a seed.

Half of them show the token; the others show none, or a wrong one, or the right one in a wrong place. Whoever shows it
may do what its owner may: train the anonymous run, or make a prediction. So the run whose state must not change is
protected in another way: no request is ever the next event of that run with the right owner and chain, and none brings
it a state that this network could load.

Two kinds are left out. An event of the right owner that is a little ahead of its turn is no garbage: it waits ten
seconds for those before it. And a state that fits is 150 MB, so that what is uploaded here has small tensors.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch

from sheily_train.colab.batches import (
    BINARY_FORM,
    DENDRITES,
    JSON_FORM,
    VECTOR,
    batch_to_binary,
    batch_to_json,
    feedback_to_binary,
    feedback_to_json,
    make_batch,
    make_feedback,
)
from sheily_train.colab.protocol import CHAIN_HEADER, DIGEST_HEADER, OWNER_HEADER, RUN_HEADER, SEQ_HEADER, Claim, Event
from sheily_train.colab.snapshots import Snapshot, pack_snapshot

PATHS = (
    "/train_layer2",
    "/feedback_dendritas",
    "/predict",
    "/status",
    "/info",
    "/diagnostico",
    "/metricas",
    "/run",
    "/state",
    "/metrics",
    "/openapi.json",
    "/health",
    "/docs",
)
PUBLIC = frozenset({"/health", "/docs"})
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "BREW", "*")
_TRAINING = ("/train_layer2", "/feedback_dendritas", "/predict")
_ODD_PATHS = (
    "/../state",
    "/state/..",
    "//health",
    "/health/",
    "/HEALTH",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/%00",
    "/docs%2f..%2fstate",
    "*",
    "http://127.0.0.1/health",
    "/train_layer2;x=1",
    "/static/../../token",
    "/" + "a" * 4000,
    "/\x7f",
    "/%ff%fe",
    "/?" + "q" * 3000,
)
_NAMES = (
    "../x",
    "a/b",
    "..",
    ".",
    "a\0b",
    "C:\\x",
    "x" * 65,
    "x" * 5000,
    "ñ",
    "con espacio",
    "",
    "-x",
    "_",
    "anonimo",
    "%2e",
)
_BROKEN_JSON = (
    b"",
    b"null",
    b"[]",
    b"{",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b"[" * 200_000,
    b'{"samples":' * 20_000,
    b'{"a":' + b"[" * 1100 + b"]" * 1100 + b"}",
    b'{"samples": NaN}',
    b'{"samples": [{"input_data": [' + b",".join([b"NaN"] * VECTOR) + b"]}]}",
    b'{"samples": [{"input_data": [' + b",".join([b"1e999"] * VECTOR) + b"]}]}",
    b'{"samples": [{"input_data": [' + b",".join([b"-1e308"] * VECTOR) + b"]}]}",
    b'{"samples": [{"input_data": [' + b",".join([b"9" * 400] * VECTOR) + b"]}]}",
    b'{"samples": [{"input_data": [' + b",".join([b'"1"'] * VECTOR) + b"]}]}",
    b'{"samples": [], "samples": {}}',
    b'{"samples": ["\\ud800"], "epochs": "\\udfff"}',
    b'{"samples": [{}], "epochs": 1' + b"0" * 5000 + b"}",
    b'{"ajustes_aplicados": [1e999], "validacion": true}',
    b'{"ajustes_aplicados": "\\ud800", "validacion": null}',
    b'{"ajustes_aplicados": [' + b",".join([b"0.1"] * DENDRITES) + b'], "validacion": 1}',
    b'{"run": "\\u0000"}',
    b'{"run": "../../x", "seed": 1, "seed": 2}',
    b'{"run": "\\ud800"}',
    b'{"run": {"run": "a"}, "owner": -1}',
    b'{"run": "b", "seed": 18446744073709551616}',
    b'{"run": "b", "owner": 1e15}',
    b'{"run": "b", "seed": true}',
    b'{"run": ' + b'"' + b"x" * 100_000 + b'"}',
    b'{"\\u0000": ' + b'{"": ' * 900 + b"1" + b"}" * 900 + b"}",
)
_HEADER_NAMES = (
    *(RUN_HEADER, SEQ_HEADER, OWNER_HEADER, DIGEST_HEADER, CHAIN_HEADER, "Sheily-Time", "Content-Type", "Origin"),
    *("Host", "Cookie", "X-Forwarded-For", "X-Forwarded-Proto", "Range", "If-Match", "Upgrade", "Connection", "TE"),
    *("Accept", "Transfer-Encoding", "Content-Encoding", "Expect", "X-HTTP-Method-Override", "Forwarded", "Via"),
)
_HEADER_VALUES = (
    *("", "x", "0", "-1", "1" * 400, "9" * 9000, "\xff\xfe\x80", "a\tb", "gzip", "identity", "websocket", "3"),
    *("bytes=0-1,2-3," * 300, "127.0.0.1", "[::1", "a@b:99999", "evil.example/../", "close, keep-alive", "trailers"),
    *("100-continue", "h2c", "*/*;q=9", "application/json;" + "x" * 900, BINARY_FORM, "²", "null"),
)


@dataclass(frozen=True)
class Target:
    """What is known of the worker: its token, and the last event and the state of the run that must not change."""

    token: str
    claim: Claim
    event: Event
    state: Snapshot


@dataclass(frozen=True)
class Shot:
    """One connection's worth of garbage.

    Attributes:
        kind: which of the makers below made it.
        known: whether it shows the right token in the right place.
        content: every byte that is sent.
        public: it asks for what everybody may read.
        unfinished: it leaves the worker waiting for more, so that an answer need not come.
    """

    kind: str
    known: bool
    content: bytes
    public: bool = False
    unfinished: bool = False


@dataclass
class Draft:
    """A request before its bytes."""

    method: str = "POST"
    path: str = "/train_layer2"
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    length: bool = True
    unfinished: bool = False

    @property
    def public(self) -> bool:
        """Whether everybody may read what it asks for, however its path is spelled."""
        return self.method in ("GET", "HEAD") and unquote(self.path.partition("?")[0]) in PUBLIC

    def content(self, more: list[tuple[str, str]]) -> bytes:
        """The request, with these headers too."""
        headers = [("Host", "127.0.0.1"), *self.headers, *more]
        if self.length:
            headers.append(("Content-Length", str(len(self.body))))
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        return "\r\n".join(lines).encode("utf-8", "surrogatepass") + self.body


class Garbage:
    """An endless, repeatable sequence of shots at one worker."""

    def __init__(self, seed: int, target: Target) -> None:
        self._chance = random.Random(seed)  # noqa: S311 - it must be repeatable
        self._target = target
        self._samples = _good_bodies(self._chance)
        self._makers: dict[str, Callable[[], Draft]] = {
            "anything": self._anything,
            "batch": self._mutated_body,
            "json": self._broken_json,
            "tensors": self._broken_tensors,
            "length": self._lying_length,
            "chunks": self._chunks,
            "claim": self._claim,
            "upload": self._upload,
            "run": self._attachment,
        }

    def __iter__(self) -> Iterator[Shot]:
        while True:
            known = self._chance.random() < 0.5
            kind = self._chance.choice((*self._makers, "head", "pipeline", "public"))
            if kind == "head":
                yield self._broken_head(known)
            elif kind == "pipeline":
                yield self._pipeline(known)
            elif kind == "public":
                path, method = self._chance.choice(sorted(PUBLIC)), self._chance.choice(("GET", "HEAD"))
                yield Shot(kind, False, Draft(method, path).content([("Connection", "close")]), public=True)
            else:
                draft = self._makers[kind]()
                content = draft.content([*self._tokens(known), ("Connection", "close")])
                yield Shot(kind, known, content, draft.public and not known, draft.unfinished)

    # Who asks

    def _tokens(self, known: bool) -> list[tuple[str, str]]:
        """The headers that show the token, or try to do without it."""
        token = self._target.token
        if known:
            return [("Authorization", f"Bearer {token}")]
        wrong = self._mutated(token.encode()).decode("latin-1").translate(_UNSENDABLE)
        return self._chance.choice(
            (
                [],
                [("Authorization", f"Bearer {wrong if wrong.strip() != token else 'x'}")],
                [("Authorization", f"Basic {token}")],
                [("Authorization", token)],
                [("Authorization", f"Bearer {token}, Bearer {token}")],
                [("Authorization", f"Bearer {token}"), ("Authorization", f"Bearer {token}")],
                [("Proxy-Authorization", f"Bearer {token}")],
                [("Cookie", f"token={token}")],
                [("X-Api-Key", token)],
            )
        )

    # What they ask

    def _anything(self) -> Draft:
        chance = self._chance
        path = chance.choice((chance.choice(PATHS), chance.choice(_ODD_PATHS), "/" + quote(self._text(30))))
        headers = [(chance.choice(_HEADER_NAMES), chance.choice(_HEADER_VALUES)) for _ in range(chance.randrange(6))]
        draft = Draft(chance.choice(_METHODS), path, headers, chance.randbytes(chance.choice((0, 0, 10, 3000))))
        if chance.random() < 0.3:
            draft.path += f"?token={self._target.token}&access_token={self._target.token}"
        draft.unfinished = any(name in ("Transfer-Encoding", "Expect") for name, _value in headers)
        return draft

    def _mutated_body(self) -> Draft:
        form, body = self._chance.choice(self._samples)
        for _ in range(self._chance.choice((1, 1, 2, 5))):
            body = self._mutated(body)
        if self._chance.random() < 0.1:
            form = self._chance.choice(("text/plain", JSON_FORM, BINARY_FORM, "multipart/form-data; boundary=x", ""))
        return Draft("POST", self._chance.choice(_TRAINING), [("Content-Type", form)], body)

    def _broken_json(self) -> Draft:
        path = self._chance.choice((*_TRAINING, "/run"))
        return Draft("POST", path, [("Content-Type", JSON_FORM)], self._chance.choice(_BROKEN_JSON))

    def _broken_tensors(self) -> Draft:
        return Draft(
            "POST", self._chance.choice(_TRAINING), [("Content-Type", BINARY_FORM)], hostile_tensors(self._chance)
        )

    def _lying_length(self) -> Draft:
        form, body = self._chance.choice(self._samples)
        said = self._chance.choice((len(body) // 2, len(body) + 1000, 0, "-1", "1e9", "", "0x10", "9" * 30, 2**40))
        more = [("Content-Length", str(len(body)))] if self._chance.random() < 0.2 else []
        headers = [("Content-Type", form), ("Content-Length", str(said)), *more]
        return Draft("POST", self._chance.choice(_TRAINING), headers, body, length=False, unfinished=True)

    def _chunks(self) -> Draft:
        chance, chunks = self._chance, b""
        for _ in range(chance.randrange(1, 5)):
            piece = chance.randbytes(chance.randrange(300))
            size = chance.choice((*[b"%x" % len(piece)] * 9, b"ffffffffffff", b"-5", b"zz", b"", b"0x10"))
            chunks += size + chance.choice((b"\r\n", b"\r\n", b";a=b\r\n")) + piece + b"\r\n"
        headers = [
            ("Content-Type", JSON_FORM),
            ("Transfer-Encoding", chance.choice(("chunked", "Chunked", "gzip, chunked"))),
        ]
        return Draft(
            "POST",
            chance.choice(_TRAINING),
            headers,
            chunks + chance.choice((b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"", b"0")),
            length=chance.random() < 0.2,
            unfinished=True,
        )

    def _claim(self) -> Draft:
        """An event whose headers are almost, but never quite, those of the run's next one."""
        chance, headers = self._chance, self._target.claim.headers()
        seq = self._target.claim.seq
        headers[SEQ_HEADER] = str(chance.choice((seq, seq, seq + 1, seq + 1, seq + 40, 10**14, 0, -1, 10**20, "²")))
        if chance.random() < 0.3:
            headers[OWNER_HEADER] = str(chance.choice((self._target.claim.owner + 1, 10**14)))
        if chance.random() < 0.3:
            headers[chance.choice((DIGEST_HEADER, CHAIN_HEADER))] = chance.randbytes(32).hex()
        if chance.random() < 0.3:
            headers[chance.choice(sorted(headers))] = chance.choice((*_NAMES[:12], self._text(40), "0" * 64))
        if chance.random() < 0.1:
            del headers[chance.choice(sorted(headers))]
        event = self._target.event
        form, body = chance.choice((*self._samples, (event.form, event.body), (event.form, event.body)))
        given = [("Content-Type", form), *((name, value.translate(_UNSENDABLE)) for name, value in headers.items())]
        return Draft("POST", chance.choice(_TRAINING[:2]), given, body)

    def _upload(self) -> Draft:
        """A state of the run that fits in all but its tensors, or in nothing."""
        chance, claim, state = self._chance, self._target.claim, self._target.state
        body = pack_snapshot(Snapshot(state.seq, state.facts, {"moments.count": torch.zeros(chance.randrange(5))}))
        if chance.random() < 0.7:
            body = chance.choice((self._mutated(body), hostile_tensors(chance), self._hostile_facts()))
        digest = hashlib.sha256(body).hexdigest()
        headers = {
            RUN_HEADER: chance.choice((claim.run, claim.run, claim.run, "anonimo", chance.choice(_NAMES[:12]))),
            OWNER_HEADER: str(chance.choice((claim.owner, claim.owner, claim.owner, 0, 999, "x"))),
            DIGEST_HEADER: chance.choice((digest, digest, digest, digest, "0" * 64)),
        }
        given = [
            ("Content-Type", BINARY_FORM),
            *((name, value.translate(_UNSENDABLE)) for name, value in headers.items()),
        ]
        return Draft("PUT", "/state", given, body)

    def _hostile_facts(self) -> bytes:
        """A state whose ledger and statistics are not of their kinds."""
        chance, state = self._chance, self._target.state
        facts = json.loads(json.dumps(state.facts))
        part = facts[chance.choice(("ledger", "statistics"))]
        values: tuple[Any, ...] = (
            None,
            -1,
            2**63,
            2**64 - 1,
            1.5,
            "x",
            [],
            {},
            True,
            "\0",
            {"1": ["a", "b"]},
            [[]],
            "9" * 5000,
        )
        part[chance.choice(sorted(part))] = chance.choice(values)
        return pack_snapshot(Snapshot(chance.choice((state.seq, -1, 10**13)), facts, {"x": torch.zeros(1)}))

    def _attachment(self) -> Draft:
        """``POST /run``: names that are none, and one good name that is not that of the protected run."""
        chance = self._chance
        asked: dict[str, Any] = {
            "run": chance.choice((*_NAMES, "otro", self._target.claim.run, 7, None, [])),
            "seed": chance.choice((2**63, -1, 1.5, "1", None, True)),
            "owner": chance.choice((0, 5, -1, 10**15, "x", 2.0)),
        }
        if asked["run"] == "otro":
            asked["seed"] = chance.choice((0, 0, 1))
        body = json.dumps(asked).encode()
        if asked["run"] != "otro" and chance.random() < 0.3:
            body = self._mutated(body)
        return Draft("POST", "/run", [("Content-Type", JSON_FORM)], body)

    # Connections that are no requests

    def _broken_head(self, known: bool) -> Shot:
        chance = self._chance
        token = "".join(f"{name}: {value}\r\n" for name, value in self._tokens(known)).encode("utf-8", "surrogatepass")
        content = chance.choice(
            (
                chance.randbytes(chance.randrange(1, 2000)),
                b"GET /status HTTP/1.1\r\n" + token + b"\0\r\n\r\n",
                b"GET /status HTTP/1.1\n" + token + b"\n",
                b"GET /status HTTP/9.9\r\n" + token + b"\r\n",
                b"GET /status\r\n\r\n",
                b"GET  /status  HTTP/1.1\r\n" + token + b"\r\n",
                b"GET /status HTTP/1.1\r\nHost: a\r\nHost: b\r\n" + token + b"\r\n",
                b"GET /status HTTP/1.1\r\n" + token + b"X: " + b"a" * 40_000 + b"\r\n\r\n",
                b"GET /status HTTP/1.1\r\n" + token + b"X: y\r\n" * 5000 + b"\r\n",
                b"GET /status HTTP/1.1\r\n" + token + b"X: y\r\n folded\r\n\r\n",
                b"GET /status HTTP/1.1\r\n" + token,
                b"POST /train_layer2 HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n"
                + token
                + b"\r\n0\r\n\r\nGET",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(200),
                b"\r\n" * 500,
            )
        )
        return Shot("head", known, content, unfinished=True)

    def _pipeline(self, known: bool) -> Shot:
        drafts = [self._makers[self._chance.choice(("json", "tensors", "claim", "run"))]() for _ in range(3)]
        content = b"".join(draft.content(self._tokens(known)) for draft in drafts)
        tail = self._chance.choice((b"", self._chance.randbytes(100), b"GET / HTTP/1.1\r\n"))
        return Shot("pipeline", known, content + tail, unfinished=True)

    # Bytes

    def _mutated(self, content: bytes) -> bytes:
        """The bytes, with a small harm done to them."""
        chance, at = self._chance, self._chance.randrange(len(content) + 1)
        length = chance.choice((1, 1, 2, 8, 64))
        harm = chance.randrange(6)
        if harm == 0:
            return content[:at]
        if harm == 1:
            return content[:at] + content[at + length :]
        if harm == 2:
            return content[:at] + chance.randbytes(length) + content[at + length :]
        if harm == 3:
            return content[:at] + content[at : at + length] * 2 + content[at + length :]
        if harm == 4:
            return content[:at] + chance.choice((b"\0", b'"', b"[", b"e999", b"-", b"\xff" * 8)) + content[at:]
        return content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]

    def _text(self, length: int) -> str:
        return "".join(
            chr(self._chance.choice((self._chance.randrange(33, 127), self._chance.randrange(161, 256))))
            for _ in range(length)
        )


_UNSENDABLE = {ord(sign): "?" for sign in "\r\n\0"}


def hostile_tensors(chance: random.Random) -> bytes:
    """A safetensors file whose header lies: about its length, types, shapes, offsets or names."""
    names = ("input_data", "anomaly_label", "epochs", "ajustes_aplicados", "validacion", "__metadata__", "x", "")
    entries = {}
    for name in chance.sample(names, chance.randrange(1, 4)):
        entries[name] = {
            "dtype": chance.choice(
                ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E5M2", "Q9", "")
            ),
            "shape": chance.choice(
                ([], [0], [1, VECTOR], [2, VECTOR], [2**40, 2**40], [-1], [16], [1], [0, VECTOR], [2**63])
            ),
            "data_offsets": chance.choice(
                ([0, 6400], [0, 64], [0, 0], [6400, 0], [0, 2**63], [32, 96], [0, 1], [-1, 4])
            ),
        }
    text = json.dumps(entries).encode()
    text = chance.choice(
        (
            text,
            text,
            text[:-1] + b"," + text[1:],  # every name twice
            b'{"a":' * 60_000,
            b'{"__metadata__": {"run": "' + b"[" * 100_000 + b'"}}',
            b'{"__metadata__": {"run": "{\\"seq\\": 1}"}}',
            text.ljust(200_000),
        )
    )
    said = chance.choice((len(text), len(text), len(text), 2**64 - 1, 2**63, len(text) + 1, 0, 10**8))
    return struct.pack("<Q", said) + text + chance.randbytes(chance.choice((0, 64, 6400)))


def _good_bodies(chance: random.Random) -> list[tuple[str, bytes]]:
    """Bodies that are as they should be, to be harmed."""
    rows = np.random.default_rng(chance.randrange(2**32)).normal(size=(2, VECTOR)).round(3)
    batch, feedback = make_batch(rows, [0, 1]), make_feedback([0.1] * DENDRITES, True)
    return [
        (JSON_FORM, batch_to_json(batch)),
        (BINARY_FORM, batch_to_binary(batch)),
        (JSON_FORM, feedback_to_json(feedback, "2026-01-31T12:00:00+00:00")),
        (BINARY_FORM, feedback_to_binary(feedback)),
    ]
