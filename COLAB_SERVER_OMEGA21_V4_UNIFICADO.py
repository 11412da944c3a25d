# OMEGA 21: el trabajador de Sheily Train en una sola celda
#
# Qué hace: instala lo que falte, arranca en esta máquina la red CortezaCognitivaV4 detrás de una dirección pública con
# token, y muestra esa dirección. Tu PC genera los datos, los envía aquí, y guarda todo lo que hace falta para seguir en
# otra máquina si esta se apaga: aquí no hay nada que perder.
#
# Tres pasos:
#   1. En Colab: Entorno de ejecución → Cambiar tipo de entorno de ejecución → GPU.
#   2. Pega este archivo entero en una celda y ejecútala. Tarda un minuto la primera vez.
#   3. Copia la dirección entera que aparece al final (https://…#token=…) y, en tu PC:
#         ./conectar_colab.sh 'https://…#token=…'
#      Quien tenga esa dirección puede usar el trabajador: no la publiques.
#
# Las condiciones de Colab excluyen de los entornos gratuitos, entre otros usos, el control remoto y los trabajadores de
# cómputo distribuido, y permiten cortarlos sin avisar: para contar con el trabajador hace falta saldo de unidades de
# cómputo, o una máquina de otra clase (https://research.google.com/colaboratory/faq.html).
#
# Licencia: Apache-2.0. SPDX-License-Identifier: Apache-2.0
# Generado a partir de los módulos de sheily_train por sheily_train/scripts/deployment/build_colab_cell.py: los cambios
# se hacen allí.
# ruff: noqa
# fmt: off

from __future__ import annotations

TUNEL = "auto"  # auto (cloudflared y, si no puede ser, ngrok), cloudflared, ngrok, o none: sin dirección pública
PUERTO = 8000  # 0 toma uno libre
CARPETA = "omega21"  # aquí queda el estado; con la misma carpeta, el trabajador sigue donde estaba y con el mismo token


# ----------------------------------------------------------------------------------------------------------------------
# Paquetes que faltan
# ----------------------------------------------------------------------------------------------------------------------

import importlib
import re
import subprocess
import sys
from importlib import metadata


def _es(text: str) -> str:
    """The text itself: the program's messages are written in Spanish."""
    return text


def install_missing(requirements: list[str]) -> None:
    """Install what is absent or too old; without anything to install, nothing is started.

    pip is given all of them even if one is missing, so that it keeps them compatible; it leaves the others as they are.

    Args:
        requirements: in the form ``fastapi>=0.128``.

    Raises:
        SystemExit: pip failed, or a package that this process already uses was replaced.
    """
    missing = [requirement for requirement in requirements if _is_missing(requirement)]
    if not missing:
        return
    print(_es("Instalando: {packages}").format(packages=", ".join(missing)))
    in_use = [module for module in map(_module_of, missing) if module in sys.modules]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(
            _es("pip no pudo instalar {packages}:\n{words}").format(
                packages=", ".join(missing), words=done.stdout.strip()[-2000:]
            )
        )
    importlib.invalidate_caches()
    if in_use:
        raise SystemExit(
            _es(
                "Se actualizaron paquetes que ya estaban en uso: {packages}. Reinicia la sesión (en Colab: "
                "Entorno de ejecución → Reiniciar sesión) y ejecuta otra vez la celda."
            ).format(packages=", ".join(in_use))
        )


def _is_missing(requirement: str) -> bool:
    name, _sign, least = requirement.partition(">=")
    try:
        return _version_numbers(metadata.version(name)) < _version_numbers(least)
    except metadata.PackageNotFoundError:
        return True


def _module_of(requirement: str) -> str:
    return requirement.partition(">=")[0].replace("-", "_")


def _version_numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


install_missing([
    "fastapi>=0.128",
    "filelock>=3.20.3",
    "h11>=0.16",
    "limits>=5",
    "orjson>=3.11.6",
    "prometheus-client>=0.21",
    "safetensors>=0.5",
    "starlette>=1.3.1",
    "uvicorn>=0.38",
])

if "trabajador" in globals():
    globals().pop("trabajador").stop()  # la celda se ejecuta otra vez: el de antes guarda su estado y deja el sitio


# ----------------------------------------------------------------------------------------------------------------------
# Importaciones
# ----------------------------------------------------------------------------------------------------------------------

import asyncio
import atexit
import errno
import hashlib
import hmac
import ipaddress
import itertools
import json
import logging
import math
import os
import platform
import queue
import secrets
import shutil
import signal
import socket
import threading
import time
import urllib.request
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache, partial
from http.client import HTTPException as BrokenDownload
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Self, TypeVar

import h11
import numpy as np
import orjson
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, StreamingResponse
from filelock import FileLock, Timeout
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors, save as save_safetensors
from safetensors.torch import load as load_torch_tensors, save as pack_torch_tensors
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor, nn
from torch.nn import functional
from uvicorn.protocols.http.h11_impl import H11Protocol


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/loopback.py
#
# Which hosts can only mean this machine.
# ----------------------------------------------------------------------------------------------------------------------

def is_loopback(host: str) -> bool:
    """Whether a host name or number can only mean this machine."""
    name = host.strip("[]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/errors.py
#
# The one family of errors.
#
#     SheilyError              1   anything the program can explain
#     ├── RequestError         2   a flag, setting or name that cannot be used
#     ├── DataError            3   a branch's rows: file:line, found, expected, mend
#     ├── BaseModelError       4   a base model that is absent, damaged or cannot be loaded
#     ├── ResourceError        5   too little memory or disk
#     ├── BusyError            6   another process holds the branch
#     ├── TrainingError        7   the run itself went wrong (a loss that is not a number, …)
#     ├── MissingExtraError    8   an optional package that is not installed
#     ├── WorkerError          9   a worker's answer that cannot be used: an HTML page, a cut body, another history
#     │   ├── UnreachableError 10  no answer after every retry; nothing is lost, the run waits
#     │   ├── RefusedError     11  a request that a worker does not accept: token, samples, order, owner
#     │   ├── OutOfStep        12  a worker that is not where the client thought, and stays so when attached to again
#     │   └── NoRuns           13  a plain OMEGA 21 v4.0 worker, asked to go on with a run
#     └── Interrupted        130   stopped by Ctrl-C or SIGTERM, with everything saved
#
# The number is the exit code of the command line. Anything else that is raised is a defect of the program: it leaves with
# 70 and one line too, and shows its traceback with ``--debug``.
#
# To add an error: is there a caller who would catch it apart from its parent? If not, raise the parent.
# ----------------------------------------------------------------------------------------------------------------------

INTERNAL_ERROR = 70


def internal_error_text(error: Exception) -> str:
    """One line for an exception that the program did not expect."""
    return _es("Fallo inesperado: {kind}: {error}. La traza se ve con --debug.").format(
        kind=type(error).__name__, error=" ".join(str(error).split())
    )


class SheilyError(Exception):
    """An explained failure: ``message`` says where and what was found, ``mend`` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, mend: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.message} {self.mend}".rstrip()


class RequestError(SheilyError):
    """A flag, a setting or a name that cannot be used."""

    exit_code = 2


class DataError(SheilyError):
    """Rows that cannot be trained on."""

    exit_code = 3


class BaseModelError(SheilyError):
    """A base model that is absent, damaged or cannot be loaded."""

    exit_code = 4


class ResourceError(SheilyError):
    """Too little memory or disk for what was asked."""

    exit_code = 5


class BusyError(SheilyError):
    """Another process holds the branch."""

    exit_code = 6


class TrainingError(SheilyError):
    """The run itself went wrong."""

    exit_code = 7


class MissingExtraError(SheilyError):
    """An optional package that is not installed.

    Args:
        package: the distribution that is missing, as ``wandb``.
        extra: the extra of ``sheily-train`` that brings it.
        purpose: what it is needed for, as a Spanish noun phrase.
    """

    exit_code = 8

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            _es("Falta el paquete «{package}», necesario para {purpose}.").format(package=package, purpose=purpose),
            mend=_es("Instálalo con: pip install 'sheily-train[{extra}]'").format(extra=extra),
        )


class WorkerError(SheilyError):
    """A worker's answer that cannot be used."""

    exit_code = 9


class UnreachableError(WorkerError):
    """No answer from the worker after every retry."""

    exit_code = 10


class RefusedError(WorkerError):
    """A request that the worker does not accept; nothing was changed by it.

    Raised on the worker, sent as a 4xx with ``status``, ``error``, ``help`` and ``code``, raised again by the client.

    Args:
        message: what was found, and what was expected.
        mend: what to do about it; ``help`` on the wire.
        status: the HTTP status.
        code: one word for programs: ``invalid``, ``auth``, ``gap``, ``conflict``, ``fenced``, ``busy``, …
        facts: further fields of the answer, as ``{"expected": 7}``.
    """

    exit_code = 11

    def __init__(
        self, message: str, *, mend: str = "", status: int = 400, code: str = "invalid", **facts: int | str
    ) -> None:
        super().__init__(message, mend=mend)
        self.status = status
        self.code = code
        self.facts = facts


class OutOfStep(WorkerError):
    """The worker is not where the client thought: it is attached to again.

    Args:
        code: the worker's word for it: ``gap``, ``detached``, ``restarted``, or ``behind``.
        expected: the event it waits for, if it said so.
    """

    exit_code = 12

    def __init__(self, code: str, message: str, expected: int | None = None) -> None:
        super().__init__(message, mend=_es("Repite la orden."))
        self.code, self.expected = code, expected


class NoRuns(WorkerError):
    """The worker has no ``POST /run``: a plain v4.0."""

    exit_code = 13


class Interrupted(SheilyError):
    """Stopped by Ctrl-C or SIGTERM; what was reached is saved."""

    exit_code = 130


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/protocol.py
#
# How a batch is applied exactly once: what client and worker say to each other about a run, and who may say it.
#
# A run is a sequence of events numbered 1, 2, 3, … Each event (a batch, or feedback) has a digest of its kind, time and
# exact bytes, and a chain value that joins it to all before it:
#
#     chain(0) = sha256(run id, seed)        chain(n) = sha256(chain(n−1), digest(n))
#
# Two ends that agree on chain(n) agree on every byte of the first n events, so they hold the same state. Where a run goes
# on with another machine's numbers, that is mixed into its chain too (:func:`rebase_digest`). The client keeps every
# event in its journal; the worker keeps a :class:`Ledger`: the last number, its chain, and the latest answers.
#
#     seq == last + 1, chain fits      apply it, store the answer
#     seq == last + 1, chain does not  conflict 422: the two ends have different histories
#     seq <= last, same digest         the stored answer again, nothing is applied
#     seq <= last, another digest      conflict 422
#     seq > last + 1                   gap 409, with the number expected
#     an owner older than the latest   fenced 409: another client took the run over
#
# This module reads no clock, no socket and no disk.
# ----------------------------------------------------------------------------------------------------------------------

PROTOCOL = 1
STATE_LIMIT = 1024 * 1024 * 1024
"""Bytes of a run's state on the wire, either way; this network's has some 150 million."""
ANSWERS_KEPT = 64
ANONYMOUS_RUN = "anonimo"
"""The run of clients that name none."""

RUN_HEADER = "Sheily-Run"
SEQ_HEADER = "Sheily-Seq"
OWNER_HEADER = "Sheily-Owner"
TIME_HEADER = "Sheily-Time"
DIGEST_HEADER = "Sheily-Digest"
CHAIN_HEADER = "Sheily-Chain"
REBASE_HEADER = "Sheily-Rebase"

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)")


class Kind(StrEnum):
    """What an event does."""

    TRAIN = "train"
    FEEDBACK = "feedback"


@dataclass(frozen=True)
class Event:
    """One change of a run's state, with the exact bytes that make it.

    Attributes:
        seq: its number, from 1.
        time: when the client wrote it down, ISO 8601; it becomes the answer's ``timestamp``.
        form: the media type of ``body``.
    """

    seq: int
    kind: Kind
    time: str
    form: str
    body: bytes

    def digest(self) -> str:
        """The sha256 of everything that decides what the event does and what its answer says."""
        return _sha256(self.kind, self.time, self.form, self.body)


@dataclass(frozen=True)
class Claim:
    """What an event's headers say: whose it is, and where in the run's history it stands."""

    run: str
    seq: int
    owner: int
    time: str
    digest: str
    chain: str

    def headers(self) -> dict[str, str]:
        """The claim as HTTP headers."""
        return {
            RUN_HEADER: self.run,
            SEQ_HEADER: str(self.seq),
            OWNER_HEADER: str(self.owner),
            TIME_HEADER: self.time,
            DIGEST_HEADER: self.digest,
            CHAIN_HEADER: self.chain,
        }

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> Self | None:
        """The claim in a request's headers; ``None`` when it names no run, as plain v4.0 clients do.

        Raises :class:`RefusedError` when a header is missing or malformed.
        """
        if headers.get(RUN_HEADER) is None:
            return None
        return cls(
            run=check_run_id(headers[RUN_HEADER]),
            seq=_number(headers, SEQ_HEADER),
            owner=_number(headers, OWNER_HEADER),
            time=_text(headers, TIME_HEADER, _TIME),
            digest=_text(headers, DIGEST_HEADER, _HEX),
            chain=_text(headers, CHAIN_HEADER, _HEX),
        )


def first_chain(run: str, seed: int) -> str:
    """The chain value before the first event."""
    return _sha256(f"sheily-omega-{PROTOCOL}", run, str(seed))


def next_chain(chain: str, digest: str) -> str:
    """The chain value after an event."""
    return _sha256(chain, digest)


def rebase_digest(seq: int, time: str, left: str, taken: str) -> str:
    """What is mixed into the chain where a run goes on with another machine's numbers after event ``seq``."""
    return _sha256("rebase", str(seq), time, left, taken)


def check_hash(value: object, name: str) -> str:
    """The value itself, when it is a hash in hexadecimal; else :class:`RefusedError`."""
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        found = value[:80] if isinstance(value, str) else type(value).__name__
        raise RefusedError(
            _es("«{name}» es «{found}»; se esperaban 64 cifras hexadecimales.").format(name=name, found=found)
        )
    return value


def check_run_id(run: str) -> str:
    """The id itself, when it can name a folder anywhere; else :class:`RefusedError`."""
    if not _RUN_ID.fullmatch(run):
        raise RefusedError(
            _es("«{run}» no vale como nombre de entrenamiento.").format(run=run[:80]),
            mend=_es("Usa de 1 a 64 letras sin acento, cifras, guiones y guiones bajos."),
        )
    return run


@dataclass
class Ledger:
    """What one end knows of a run: enough to tell what has been applied and to answer again.

    Attributes:
        owner: the latest client; each one that attaches gets a higher number.
        last_seq: the number of the last event applied; 0 before the first.
        chain: the chain value after it.
        answers: the latest answers, by event: its digest and its exact bytes.
    """

    run: str
    seed: int
    owner: int = 0
    last_seq: int = 0
    chain: str = ""
    answers: dict[int, tuple[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_run_id(self.run)
        self.chain = self.chain or first_chain(self.run, self.seed)

    def attach(self, owner: int) -> int:
        """Give the run to a new client, which knows of ``owner`` as its latest; returns the new number."""
        self.owner = max(self.owner, owner) + 1
        return self.owner

    def check_owner(self, owner: int) -> None:
        """Refuse a client that is not the latest."""
        if owner != self.owner:
            raise RefusedError(
                _es("Otro cliente se hizo cargo de «{run}».").format(run=self.run),
                mend=_es("Sigue desde un solo sitio; para tomarlo aquí, repite la orden con --continuar."),
                status=409,
                code="fenced",
            )

    def judge(self, claim: Claim) -> bytes | None:
        """The stored answer of an event applied before; ``None`` when the event is the next one to apply.

        Raises :class:`RefusedError` (``fenced``, ``conflict``, ``gap`` or ``forgotten``) for any other.
        """
        self.check_owner(claim.owner)
        if claim.seq > self.last_seq + 1:
            raise RefusedError(
                _es("Llegó el evento {found} y toca el {expected}.").format(found=claim.seq, expected=self.last_seq + 1),
                mend=_es("El cliente reenvía los que faltan desde su diario."),
                status=409,
                code="gap",
                expected=self.last_seq + 1,
            )
        if claim.seq == self.last_seq + 1:
            if claim.chain != next_chain(self.chain, claim.digest):
                raise self._conflict(claim.seq)
            return None
        if claim.seq not in self.answers:
            raise RefusedError(
                _es("El evento {seq} ya se aplicó y su respuesta ya no se guarda.").format(seq=claim.seq),
                mend=_es("El diario de este cliente es más antiguo que el trabajador: empieza otro entrenamiento."),
                status=409,
                code="forgotten",
            )
        digest, answer = self.answers[claim.seq]
        if digest != claim.digest:
            raise self._conflict(claim.seq)
        return answer

    def record(self, claim: Claim, answer: bytes) -> None:
        """Note that the next event was applied, and what was answered."""
        self.last_seq, self.chain = claim.seq, claim.chain
        self.answers[claim.seq] = (claim.digest, answer)
        self.answers.pop(claim.seq - ANSWERS_KEPT, None)

    def to_json(self) -> dict[str, Any]:
        """The ledger as JSON values."""
        answers = {str(seq): [digest, answer.decode()] for seq, (digest, answer) in self.answers.items()}
        return {
            "run": self.run,
            "seed": self.seed,
            "owner": self.owner,
            "last_seq": self.last_seq,
            "chain": self.chain,
            "answers": answers,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The ledger that :meth:`to_json` gave."""
        answers = {int(seq): (digest, answer.encode()) for seq, (digest, answer) in value["answers"].items()}
        return cls(**{**value, "answers": answers})

    def _conflict(self, seq: int) -> RefusedError:
        return RefusedError(
            _es("El evento {seq} no es el que este trabajador aplicó o espera: las dos historias difieren.").format(
                seq=seq
            ),
            mend=_es("Empieza otro entrenamiento, o usa el diario de este."),
            status=422,
            code="conflict",
        )


def another_seed(run: str, found: int, asked: int) -> RefusedError:
    """The refusal of a run that began with another seed."""
    return RefusedError(
        _es("«{run}» se empezó con la semilla {found}, no con {asked}.").format(run=run, found=found, asked=asked),
        mend=_es("Usa esa semilla, u otro nombre de entrenamiento."),
        status=422,
        code="conflict",
    )


def _sha256(*parts: str | bytes) -> str:
    """The sha256 of the parts, each preceded by its length, so that no two sequences of parts look alike."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _text(headers: Mapping[str, str], name: str, pattern: re.Pattern[str]) -> str:
    value = headers.get(name, "")
    if not pattern.fullmatch(value):
        raise RefusedError(_es("La cabecera {name} falta o no vale: «{found}».").format(name=name, found=value[:80]))
    return value


def _number(headers: Mapping[str, str], name: str) -> int:
    value = headers.get(name, "")
    if not re.fullmatch(r"[1-9]\d{0,14}", value):
        raise RefusedError(_es("La cabecera {name} falta o no vale: «{found}».").format(name=name, found=value[:80]))
    return int(value)


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/security.py
#
# Who may speak to a worker, and how much: the token, the limits and the headers, before the app sees a request.
#
# The worker's address is public, so every rule holds before a byte of the body is read, or while it streams:
#
#     no token, a wrong one          401; only ``/health`` and the empty page ``/docs`` answer without it
#     wrong tokens, many             429 with Retry-After; the right token is never locked out by them
#     two Authorization headers      400
#     a compressed body              415
#     a body that is too long        413, by what it says and by what it is
#     a body that is too slow        408
#     a web page in a browser        403 where there is no token: another site could speak through the browser of a
#                                    person who runs a worker with ``--no-auth``
# ----------------------------------------------------------------------------------------------------------------------

BODY_LIMIT = 192 * 1024 * 1024
"""Bytes of a body: the largest batch as JSON fits."""
BODY_SECONDS = 90.0
"""Seconds for a whole body; tunnels cut a request at 100."""

WRONG_TOKENS_A_MINUTE = 20
_PUBLIC_PATHS = frozenset({"/health", "/docs"})
_UPLOAD = ("PUT", "/state")
_LINGER_BYTES = 4 * 1024 * 1024
_LINGER_SECONDS = 2.0
_TOKEN_SHAPE = re.compile(r"[A-Za-z0-9._~-]{20,512}")
_DATA_POLICY = b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_DOCS_POLICY = (
    b"default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    b"style-src 'unsafe-inline' https://cdn.jsdelivr.net; font-src https://cdn.jsdelivr.net; "
    b"img-src 'self' data: https://cdn.jsdelivr.net; connect-src 'self'; "
    b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def new_token() -> str:
    """A token of 256 random bits, in letters that an address can carry."""
    return secrets.token_urlsafe(32)


def check_token(token: str, mend: str = "") -> str:
    """The token itself, when an HTTP header can carry it and it cannot be guessed; else :class:`RequestError`."""
    if not _TOKEN_SHAPE.fullmatch(token):
        raise RequestError(
            _es("El token no vale: se esperaban de 20 a 512 letras sin acento, cifras o los signos . _ ~ -"),
            mend=mend or _es("Quita --token y SHEILY_WORKER_TOKEN, y el trabajador hará uno."),
        )
    return token


class Guard:
    """ASGI middleware that lets through only requests that are allowed and bodies that are bounded.

    Args:
        app: what answers the requests that pass. It never sees the Authorization header.
        token: what ``Authorization: Bearer`` must carry; ``None`` asks for none, and then only programs of this
            machine are answered.
        body_limit: the most bytes of a request's body.
        body_seconds: the most seconds from the first read of a body to its last byte.
        upload_limit: the most bytes of ``PUT /state``, for which the seconds grow in proportion.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        *,
        body_limit: int = BODY_LIMIT,
        body_seconds: float = BODY_SECONDS,
        upload_limit: int = STATE_LIMIT,
    ) -> None:
        if token is not None and not token.strip():
            raise RequestError(_es("El token está vacío."))
        self._app = app
        self._token = None if token is None else token.encode()
        self._body_limit = body_limit
        self._body_seconds = body_seconds
        self._upload_limit = upload_limit
        self._failures = MovingWindowRateLimiter(MemoryStorage())
        self._failure_rate = RateLimitItemPerMinute(WRONG_TOKENS_A_MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection: HTTP is checked, lifespan passes, anything else is closed."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit, seconds = self._body_limit, self._body_seconds
        if (scope["method"], scope["path"]) == _UPLOAD:
            limit, seconds = self._upload_limit, seconds * max(1.0, self._upload_limit / self._body_limit)
        exchange = _GuardedExchange(scope, receive, send, limit, seconds)
        try:
            self._check_caller(scope)
            _check_body_headers(scope, limit)
        except RefusedError as refusal:
            await exchange.refuse(refusal)
            return
        headers = [header for header in scope["headers"] if header[0] != b"authorization"]
        try:
            await self._app({**scope, "headers": headers}, exchange.receive, exchange.send)
        except Exception:
            if not exchange.refused:  # the app's way to say that the client left; it has been answered
                raise

    def _check_caller(self, scope: Scope) -> None:
        """Refuse whoever may not speak to this worker."""
        if self._token is None:
            _check_this_machine(scope)
            return
        if scope["path"] in _PUBLIC_PATHS and scope["method"] in ("GET", "HEAD"):
            return
        given = _header_values(scope, b"authorization")
        if len(given) > 1:
            raise RefusedError(
                _es("La petición trae {count} cabeceras Authorization.").format(count=len(given)), code="auth"
            )
        if not given:
            raise _token_refusal(_es("Falta el token de este trabajador."))
        scheme, _space, token = given[0].partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token):
            return
        if not self._failures.hit(self._failure_rate):
            raise self._too_many_failures()
        raise _token_refusal(_es("El token no es el de este trabajador."))

    def _too_many_failures(self) -> RefusedError:
        reset = self._failures.get_window_stats(self._failure_rate).reset_time
        return RefusedError(
            _es("Demasiados tokens equivocados."),
            mend=_es("Espera, y copia de nuevo la dirección entera que muestra el trabajador."),
            status=429,
            code="auth",
            retry_after=max(1, math.ceil(reset - time.time())),
        )


def refusal_messages(error: RefusedError) -> tuple[Message, Message]:
    """A refusal as the two ASGI messages of an answer: JSON with status, error, help, code and the error's facts."""
    content = orjson.dumps(
        {"status": "error", "error": error.message, "help": error.mend, "code": error.code, **error.facts}
    )
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="sheily"'))
    if "retry_after" in error.facts:
        headers.append((b"retry-after", str(error.facts["retry_after"]).encode()))
    start = {"type": "http.response.start", "status": error.status, "headers": headers}
    return start, {"type": "http.response.body", "body": content}


class _GuardedExchange:
    """One request and its answer: counts and times what comes in, and adds the headers to what goes out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int, seconds: float) -> None:
        self.refused = False
        self._receive = receive
        self._send = send
        self._limit = limit
        self._seconds = seconds
        self._deadline: float | None = None
        self._size = 0
        self._body_is_due = _announces_body(scope)
        self._expects_continue = bool(_header_values(scope, b"expect"))
        self._policy = _DOCS_POLICY if scope["path"] == "/docs" else _DATA_POLICY
        self._answer_began = False

    async def receive(self) -> Message:
        """The next piece of the body; once the request was refused, the news that the client has left."""
        if self.refused:
            return {"type": "http.disconnect"}
        try:
            message = await self._within_time()
        except TimeoutError:
            return await self._cut_off(_slow_refusal(self._seconds))
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            return await self._cut_off(_size_refusal(self._limit))
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the app's answer, unless the request was refused meanwhile."""
        if self.refused:
            return
        if message["type"] == "http.response.start":
            self._answer_began = True
            message = {**message, "headers": self._safe_headers(list(message.get("headers", ())))}
        await self._send(message)

    async def refuse(self, error: RefusedError) -> None:
        """Answer in the app's place, and end the connection."""
        self.refused = True
        start, body = refusal_messages(error)
        await self._send({**start, "headers": self._safe_headers(start["headers"])})
        await self._send({**body, "more_body": True})
        await self._linger()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _within_time(self) -> Message:
        if not self._body_is_due:
            return await self._receive()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._seconds
        async with asyncio.timeout_at(self._deadline):
            message = await self._receive()
        self._body_is_due = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def _cut_off(self, refusal: RefusedError) -> Message:
        if self._answer_began:
            self.refused = True
        else:
            await self.refuse(refusal)
        return {"type": "http.disconnect"}

    async def _linger(self) -> None:
        """Throw away a little of a body that is still arriving.

        A connection closed over unread bytes is reset, and a sender in mid-body would see that in place of the answer.
        """
        left = _LINGER_BYTES
        if self._expects_continue:
            return
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while self._body_is_due and left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    self._body_is_due = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            return

    def _safe_headers(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The headers and those of safety that the app did not set itself."""
        present = {name.lower() for name, _value in headers}
        wanted = (*_SAFE_HEADERS, (b"content-security-policy", self._policy))
        headers += [header for header in wanted if header[0] not in present]
        if self._body_is_due:  # what is left of the body is never read: the connection cannot be used again
            headers.append((b"connection", b"close"))
        return headers


def _header_values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]


def _announces_body(scope: Scope) -> bool:
    lengths = _header_values(scope, b"content-length")
    return bool(_header_values(scope, b"transfer-encoding")) or any(length != b"0" for length in lengths)


def _check_this_machine(scope: Scope) -> None:
    """Refuse what a web page of another site sends through a browser, under any name that leads to this machine."""
    hosts = _header_values(scope, b"host")
    origins = [value.partition(b"://")[2] for value in _header_values(scope, b"origin")]
    if not hosts or not all(_names_loopback(value.decode("latin-1")) for value in hosts + origins):
        raise RefusedError(
            _es("Un trabajador con --no-auth solo atiende a programas de su propia máquina."),
            mend=_es("Llámalo por http://127.0.0.1 o arráncalo sin --no-auth."),
            status=403,
            code="auth",
        )


def _names_loopback(host_and_port: str) -> bool:
    return is_loopback(re.sub(r":\d+$", "", host_and_port))


def _check_body_headers(scope: Scope, limit: int) -> None:
    """Refuse a body that its headers already show to be compressed, too long or of no length."""
    encodings = _header_values(scope, b"content-encoding")
    if any(encoding.strip().lower() != b"identity" for encoding in encodings):
        raise RefusedError(
            _es("El cuerpo viene comprimido; se esperaba sin Content-Encoding."), status=415, code="encoding"
        )
    for length in _header_values(scope, b"content-length"):
        if not length.isdigit():
            raise RefusedError(_es("La cabecera Content-Length no es un número."))
        if len(length) > 18 or int(length) > limit:
            raise _size_refusal(limit)


def _token_refusal(message: str) -> RefusedError:
    return RefusedError(
        message,
        mend=_es("Copia la dirección entera que muestra el trabajador, con lo que sigue a «#»."),
        status=401,
        code="auth",
    )


def _size_refusal(limit: int) -> RefusedError:
    return RefusedError(
        _es("El cuerpo pasa de {limit} bytes.").format(limit=limit),
        mend=_es("Divide el lote."),
        status=413,
        code="too_large",
        limit=limit,
    )


def _slow_refusal(seconds: float) -> RefusedError:
    return RefusedError(
        _es("El cuerpo no llegó entero en {seconds:g} s.").format(seconds=seconds),
        mend=_es("Envía lotes más pequeños, o en forma binaria."),
        status=408,
        code="slow",
    )


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/tunnels.py
#
# A way in from outside to a port of this machine: cloudflared or ngrok, started, watched and closed.
#
# Both give an address of their own choosing, which changes at every start, and end where a company's server decides; the
# worker's token holds there as anywhere. ``ssh -L`` needs none of this.
# ----------------------------------------------------------------------------------------------------------------------

TunnelKind = Literal["cloudflared", "ngrok", "none"]

TUNNEL_SECONDS = 60.0
_QUICK_TUNNEL = re.compile(r"https://(?!api\.)[a-z0-9-]+\.trycloudflare\.com")
_LAST_WORDS = 5


class Tunnel:
    """An open tunnel.

    Attributes:
        url: the public address, without a slash at the end.
    """

    def __init__(
        self,
        url: str,
        process: subprocess.Popen[str] | None = None,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._process = process
        self._on_death = on_death
        self._closing = threading.Event()
        if process is not None:
            threading.Thread(target=self._watch, args=(process,), name="sheily-tunnel", daemon=True).start()

    def close(self) -> None:
        """End the tunnel's program; whoever watches for its death is not told."""
        self._closing.set()
        if self._process is not None:
            _end_program(self._process)

    def _watch(self, process: subprocess.Popen[str]) -> None:
        process.wait()
        if not self._closing.is_set() and self._on_death is not None:
            self._on_death()


def open_tunnel(
    kind: TunnelKind, port: int, *, seconds: float = TUNNEL_SECONDS, on_death: Callable[[], None] | None = None
) -> Tunnel:
    """Open a tunnel to a port of this machine and wait for its address.

    Args:
        kind: ``none`` gives the loopback address and starts nothing.
        port: where the worker listens on 127.0.0.1.
        seconds: the longest wait for the address.
        on_death: called from another thread when the tunnel ends by itself.

    Raises:
        RequestError: cloudflared is not installed, or ngrok has no authtoken.
        MissingExtraError: ngrok without pyngrok.
        SheilyError: the tunnel's program ended or gave no address.
    """
    if kind == "cloudflared":
        return _open_cloudflared(port, seconds, on_death)
    if kind == "ngrok":
        return _open_ngrok(port, seconds, on_death)
    return Tunnel(f"http://127.0.0.1:{port}")


def _open_cloudflared(port: int, seconds: float, on_death: Callable[[], None] | None) -> Tunnel:
    program = shutil.which("cloudflared")
    if program is None:
        raise RequestError(
            _es("No se encontró el programa cloudflared."),
            mend=_es(
                "Instálalo (developers.cloudflare.com, «cloudflared downloads»), usa --tunnel ngrok, "
                "o llega al puerto con: ssh -L {port}:127.0.0.1:{port} MÁQUINA"
            ).format(port=port),
        )
    # A session of its own: Ctrl-C in the terminal reaches the worker only, which answers what it has in hand first.
    try:
        process = subprocess.Popen(
            [program, "tunnel", "--no-autoupdate", "--url", f"http://127.0.0.1:{port}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:  # a program for another kind of machine, or damaged
        raise SheilyError(
            _es("{program} no se pudo arrancar: {reason}.").format(program=program, reason=error.strerror),
            mend=_es("Instálalo de nuevo, o usa --tunnel ngrok."),
        ) from error
    address: Future[str] = Future()
    last_words: deque[str] = deque(maxlen=_LAST_WORDS)
    threading.Thread(target=_read_cloudflared, args=(process, address, last_words), daemon=True).start()
    try:
        url = address.result(seconds)
    except BaseException as error:  # Ctrl-C too: the program must not be left behind
        _end_program(process)
        if not isinstance(error, TimeoutError | EOFError):
            raise
        raise SheilyError(
            _es("cloudflared no dio ninguna dirección. Lo último que dijo: {words}").format(
                words=" / ".join(last_words) or _es("nada")
            ),
            mend=_es("Prueba otra vez, o usa --tunnel ngrok."),
        ) from error
    return Tunnel(url, process, on_death)


def _read_cloudflared(process: subprocess.Popen[str], address: Future[str], last_words: deque[str]) -> None:
    """Read all that cloudflared says, as long as it lives: a full pipe would stop it."""
    if process.stdout is not None:
        with process.stdout:
            for line in process.stdout:
                last_words.append(line.strip())
                if not address.done() and (found := _QUICK_TUNNEL.search(line)):
                    address.set_result(found[0])
    if not address.done():
        address.set_exception(EOFError())


def _open_ngrok(port: int, seconds: float, on_death: Callable[[], None] | None) -> Tunnel:
    try:
        from pyngrok import conf, exception, ngrok
    except ImportError as error:
        raise MissingExtraError("pyngrok", "ngrok", _es("el túnel de ngrok")) from error
    token = os.environ.get("NGROK_AUTHTOKEN", "").strip()
    if not token:
        raise RequestError(
            _es("ngrok pide una cuenta: falta la variable NGROK_AUTHTOKEN."),
            mend=_es("Copia tu authtoken de dashboard.ngrok.com y ponlo en NGROK_AUTHTOKEN, o usa --tunnel cloudflared."),
        )
    settings = conf.PyngrokConfig(
        ngrok_path=shutil.which("ngrok"), auth_token=token, startup_timeout=int(seconds), start_new_session=True
    )
    try:
        url = ngrok.connect(f"http://127.0.0.1:{port}", pyngrok_config=settings).public_url
        process = ngrok.get_ngrok_process(settings).proc
    except (exception.PyngrokError, OSError) as error:
        ngrok.kill(settings)
        raise SheilyError(
            _es("ngrok no abrió el túnel: {reason}").format(reason=" ".join(str(error).replace(token, "…").split())),
            mend=_es("Comprueba NGROK_AUTHTOKEN y la red, o usa --tunnel cloudflared."),
        ) from None
    return Tunnel(url or "", process, on_death)


def _end_program(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/batches.py
#
# What the client sends and the worker learns from, and its two forms on the wire: JSON and safetensors.
#
# JSON is what OMEGA 21 v4.0 clients speak. The binary form is two to five times smaller: a safetensors file with the
# tensors ``input_data`` (float32 [N, 1600]), ``anomaly_label`` (int8 [N], −1 where there is no label; may be absent) and
# ``epochs`` (int32 [1]; may be absent), or ``ajustes_aplicados`` (float32 [16]) and ``validacion`` (uint8 [1]).
#
# Whatever is not exactly that raises :class:`~sheily_train.errors.RefusedError`, which names the sample.
# ----------------------------------------------------------------------------------------------------------------------

VECTOR = 1600
DENDRITES = 16
COHERENCE = 64
NO_LABEL = -1

MAX_SAMPLES = 4096
MAX_EPOCHS = 100
MAX_MAGNITUDE = 1e9
MAX_HEADER_BYTES = 64 * 1024

JSON_FORM = "application/json"
BINARY_FORM = "application/x-safetensors"


@dataclass(frozen=True)
class Batch:
    """Vectors to learn from, or to judge.

    Attributes:
        input_data: float32 [N, 1600], finite, contiguous.
        labels: int8 [N]; 1 anomaly, 0 normal, −1 unknown.
        epochs: how often the worker passes over the batch.
    """

    input_data: NDArray[np.float32]
    labels: NDArray[np.int8]
    epochs: int = 1

    def __len__(self) -> int:
        return len(self.input_data)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(np.ascontiguousarray(self.input_data[part]), self.labels[part], self.epochs)


@dataclass(frozen=True)
class Feedback:
    """What came of applying a batch's dendrite adjustments: float32 [16] in −1..1, and whether it was good."""

    adjustments: NDArray[np.float32]
    validated: bool


def make_batch(input_data: Any, labels: Any = None, epochs: int = 1) -> Batch:
    """A checked batch from anything numpy can read: [N, 1600] numbers and, maybe, N labels (0, 1, −1 or None)."""
    if not isinstance(epochs, int) or isinstance(epochs, bool) or not 1 <= epochs <= MAX_EPOCHS:
        raise RefusedError(
            _es("«epochs» es {found}; se esperaba un entero de 1 a {limit}.").format(
                found=shown(epochs), limit=MAX_EPOCHS
            )
        )
    inputs_NV = _matrix(input_data)
    return Batch(inputs_NV, _labels(labels, len(inputs_NV)), epochs)


def make_feedback(adjustments: Any, validated: Any) -> Feedback:
    """Checked feedback from a sequence of 16 numbers in −1..1 and a boolean."""
    if not isinstance(validated, bool | np.bool_):
        raise RefusedError(_es("«validacion» es {found}; se esperaba true o false.").format(found=shown(validated)))
    values_D = _numbers(adjustments, _es("«ajustes_aplicados»"))
    if values_D.shape != (DENDRITES,):
        raise RefusedError(
            _es("«ajustes_aplicados»: se esperaban {expected} números, llegaron {found}.").format(
                expected=DENDRITES, found=values_D.size
            )
        )
    if not np.all(np.abs(values_D) <= 1):
        raise RefusedError(_es("«ajustes_aplicados» tiene valores fuera de −1..1."))
    return Feedback(values_D, bool(validated))


def batch_from_json(body: bytes) -> Batch:
    """The batch in a v4.0 body: ``{"samples": [{"input_data": [1600], "anomaly_label": 0 or 1}], "epochs": 1}``."""
    content = _json_object(body)
    samples = content.get("samples")
    if not isinstance(samples, list):
        raise RefusedError(_es("Falta «samples»: una lista de objetos con «input_data»."))
    _check_count(len(samples))
    rows, labels = [], []
    for index, sample in enumerate(samples):
        row = sample.get("input_data") if isinstance(sample, dict) else None
        if not isinstance(row, list):
            raise RefusedError(_es("Muestra {index}: falta «input_data», una lista de números.").format(index=index))
        if len(row) != VECTOR:
            raise RefusedError(
                _es("Se esperaban {expected}, llegaron {found}, muestra {index}.").format(
                    expected=VECTOR, found=len(row), index=index
                ),
                mend=_es("Cada «input_data» lleva {expected} números.").format(expected=VECTOR),
            )
        rows.append(row)
        labels.append(sample.get("anomaly_label"))
    return make_batch(rows, labels, content.get("epochs", 1))


def batch_to_json(batch: Batch) -> bytes:
    """A v4.0 body; the numbers read back are the very float32 values."""
    samples = [
        {"input_data": row} if label == NO_LABEL else {"input_data": row, "anomaly_label": int(label)}
        for row, label in zip(batch.input_data, batch.labels, strict=True)
    ]
    return orjson.dumps({"samples": samples, "epochs": batch.epochs}, option=orjson.OPT_SERIALIZE_NUMPY)


def batch_from_binary(body: bytes) -> Batch:
    """The batch in a safetensors body."""
    tensors = _tensors(body, {"input_data", "anomaly_label", "epochs"})
    if "input_data" not in tensors:
        raise RefusedError(_es("Falta el tensor «input_data»."))
    epochs = tensors.get("epochs", np.array([1]))
    if epochs.size != 1 or epochs.dtype.kind not in "iu":
        raise RefusedError(_es("El tensor «epochs» no es un entero."))
    return make_batch(tensors["input_data"], tensors.get("anomaly_label"), int(epochs.item()))


def batch_to_binary(batch: Batch) -> bytes:
    """A safetensors body."""
    tensors: dict[str, NDArray[Any]] = {"input_data": batch.input_data, "epochs": np.array([batch.epochs], np.int32)}
    if np.any(batch.labels != NO_LABEL):
        tensors["anomaly_label"] = batch.labels
    return save_safetensors(tensors)


def feedback_from_json(body: bytes) -> Feedback:
    """The feedback in a v4.0 body: ``{"ajustes_aplicados": [16], "validacion": bool, "timestamp": …}``."""
    content = _json_object(body)
    for name in ("ajustes_aplicados", "validacion"):
        if name not in content:
            raise RefusedError(_es("Falta «{name}».").format(name=name))
    return make_feedback(content["ajustes_aplicados"], content["validacion"])


def feedback_to_json(feedback: Feedback, timestamp: str) -> bytes:
    """A v4.0 body."""
    content = {
        "ajustes_aplicados": feedback.adjustments,
        "validacion": feedback.validated,
        "timestamp": timestamp,
    }
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def feedback_from_binary(body: bytes) -> Feedback:
    """The feedback in a safetensors body."""
    tensors = _tensors(body, {"ajustes_aplicados", "validacion"})
    if len(tensors) != 2:
        raise RefusedError(_es("Faltan los tensores «ajustes_aplicados» y «validacion»."))
    validated = tensors["validacion"]
    if validated.size != 1 or validated.item() not in (0, 1):
        raise RefusedError(_es("El tensor «validacion» no es 0 ni 1."))
    return make_feedback(tensors["ajustes_aplicados"], bool(validated.item()))


def feedback_to_binary(feedback: Feedback) -> bytes:
    """A safetensors body."""
    return save_safetensors(
        {"ajustes_aplicados": feedback.adjustments, "validacion": np.array([feedback.validated], np.uint8)}
    )


def shown(value: Any) -> str:
    """The beginning of a value that cannot be used; of one that is nested too deep to be written, what it is."""
    try:
        return repr(value)[:40]
    except RecursionError:
        return type(value).__name__


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_SAMPLES:
        raise RefusedError(
            _es("El lote trae {found} muestras; se esperaban de 1 a {limit}.").format(found=count, limit=MAX_SAMPLES),
            mend=_es("Divide el lote.") if count else _es("Pon alguna muestra."),
            status=413 if count else 400,
        )


def _matrix(input_data: Any) -> NDArray[np.float32]:
    inputs_NV = _numbers(input_data, _es("«input_data»"))
    if inputs_NV.ndim != 2 or inputs_NV.shape[1] != VECTOR:
        raise RefusedError(
            _es("«input_data» tiene forma {found}; se esperaba [N, {expected}].").format(
                found=list(inputs_NV.shape), expected=VECTOR
            )
        )
    _check_count(len(inputs_NV))
    with np.errstate(invalid="ignore"):
        unusable = np.flatnonzero(~np.all(np.abs(inputs_NV) <= MAX_MAGNITUDE, axis=1))
    if unusable.size:
        raise RefusedError(
            _es("Muestra {index}: hay un valor no finito o mayor que {limit:g} en magnitud.").format(
                index=unusable[0], limit=MAX_MAGNITUDE
            ),
            mend=_es("Quita o corrige esa muestra."),
        )
    return inputs_NV


def _numbers(values: Any, name: str) -> NDArray[np.float32]:
    """The values as contiguous float32; text, nulls, booleans and ragged lists are refused, never converted."""
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "fiu":
        raise RefusedError(_es("{name}: se esperaban solo números.").format(name=name))
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)


def _labels(labels: Any, count: int) -> NDArray[np.int8]:
    values = [None] * count if labels is None else labels if isinstance(labels, list) else np.asarray(labels).tolist()
    if not isinstance(values, list) or len(values) != count:
        raise RefusedError(_es("Se esperaba una etiqueta por muestra: {count} en total.").format(count=count))
    for index, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or value not in (0, 1, NO_LABEL)):
            raise RefusedError(
                _es("Muestra {index}: «anomaly_label» es {found}; se esperaba 0 o 1.").format(
                    index=index, found=shown(value)
                )
            )
    return np.array([NO_LABEL if value is None else value for value in values], np.int8)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RefusedError(
            _es("El cuerpo no es JSON que se pueda leer: {reason}.").format(reason=str(error).rstrip(".")),
            mend=_es("NaN, Infinity y números sin fin no son JSON."),
        ) from error
    if not isinstance(content, dict):
        raise RefusedError(_es("El cuerpo JSON no es un objeto."))
    return content


def _tensors(body: bytes, known: set[str]) -> dict[str, NDArray[Any]]:
    header = int.from_bytes(body[:8], "little")
    if len(body) < 8 or header > min(MAX_HEADER_BYTES, len(body) - 8):
        raise RefusedError(_es("El cuerpo no es un archivo safetensors entero."))
    try:
        tensors: dict[str, NDArray[Any]] = load_safetensors(body)
    except (SafetensorError, KeyError, ValueError) as error:
        raise RefusedError(_es("El cuerpo no es un archivo safetensors entero.")) from error
    if unknown := sorted(set(tensors) - known):
        raise RefusedError(
            _es("Tensor desconocido: «{name}»; se esperaban {known}.").format(
                name=unknown[0], known=", ".join(sorted(known))
            )
        )
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/docs_page.py
#
# The page at ``/docs``: it holds no data, takes the token from its address or a field, and shows Swagger UI.
# ----------------------------------------------------------------------------------------------------------------------

DOCS_PAGE = """<!doctype html>
<html lang="es">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>OMEGA 21: documentación</title>
<link rel="stylesheet" href="https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/swagger-ui.css">
<style>
  body { font-family: sans-serif; margin: 0 auto; max-width: 80rem; padding: 1rem; }
  input { width: 30rem; max-width: 90%; padding: .4rem; }
  #notice { color: #a00; }
</style>
</head>
<body>
<form id="form" hidden>
  <h1>OMEGA 21</h1>
  <label>Token del trabajador (lo que sigue a «#token=» en su dirección)<br>
    <input id="token" type="password" autocomplete="off" autofocus></label>
  <button>Abrir</button>
</form>
<p id="notice" role="alert"></p>
<div id="ui"></div>
<script>
const form = document.getElementById("form"), field = document.getElementById("token");
const notice = document.getElementById("notice");
const noUI = "No se pudo cargar Swagger UI: hace falta acceso a cdn.jsdelivr.net. " +
  "La descripción de la API está en /openapi.json (con la cabecera Authorization: Bearer).";

function loadUI() {
  return new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/swagger-ui-bundle.js";
    script.onload = done;
    script.onerror = failed;
    document.head.append(script);
  });
}

async function open(token) {
  const headers = token ? {Authorization: "Bearer " + token} : {};
  let answer;
  try {
    answer = await fetch("openapi.json", {headers});
  } catch {
    notice.textContent = "El trabajador no responde.";
    return;
  }
  if (!answer.ok) {
    form.hidden = false;
    notice.textContent = token ? "El trabajador no acepta ese token." : "";
    return;
  }
  const spec = await answer.json();
  form.hidden = true;
  notice.textContent = "";
  try {
    if (!window.SwaggerUIBundle) await loadUI();
  } catch {
    notice.textContent = noUI;
    return;
  }
  SwaggerUIBundle({spec, dom_id: "#ui", requestInterceptor: (request) => {
    Object.assign(request.headers, headers);
    return request;
  }});
}

form.addEventListener("submit", (event) => { event.preventDefault(); open(field.value.trim()); });
const handed = new URLSearchParams(location.hash.slice(1)).get("token") || "";
if (handed) history.replaceState(null, "", location.pathname);
open(handed);
</script>
</body>
</html>
"""


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/intake.py
#
# What the worker reads from a request: its media type, its body, its headers. What cannot be used is refused.
# ----------------------------------------------------------------------------------------------------------------------

MAX_SEED = 2**63 - 1
MAX_OWNER = 10**14


@dataclass(frozen=True)
class RunRequest:
    """What ``POST /run`` asks for: a run, its seed, the highest owner known, and two chain values or nothing.

    Attributes:
        chain: that before the first event of a run that is new.
        rebase: that of the worker's own state, which is to be set aside.
    """

    run: str
    seed: int
    owner: int
    chain: str
    rebase: str


def body_form(request: Request) -> str:
    """The media type of the body: one of the two that are known; none at all means JSON."""
    form = request.headers.get("content-type", JSON_FORM).partition(";")[0].strip().lower()
    if form not in (JSON_FORM, BINARY_FORM):
        raise unknown_form(f"{JSON_FORM}, {BINARY_FORM}")
    return form


async def whole_body(request: Request) -> bytes:
    """Every byte of the body; one that was cut raises :class:`RefusedError`."""
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise damaged_body() from error


def read_event(event: Event, expected: str | None) -> tuple[str, Batch | Feedback]:
    """The event's digest, which must be the one expected, and what its body holds. Not for the event loop."""
    digest = event.digest()
    if expected is not None and digest != expected:
        raise damaged_body()
    return digest, read_content(event.kind, event.form, event.body)


def read_content(kind: Kind, form: str, body: bytes) -> Batch | Feedback:
    """What a body of that kind and media type holds."""
    if kind is Kind.TRAIN:
        return batch_from_json(body) if form == JSON_FORM else batch_from_binary(body)
    return feedback_from_json(body) if form == JSON_FORM else feedback_from_binary(body)


def read_run_request(form: str, body: bytes) -> RunRequest:
    """The body of ``POST /run``."""
    if form != JSON_FORM:
        raise unknown_form(JSON_FORM)
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RefusedError(_es("El cuerpo no es JSON que se pueda leer.")) from error
    if not isinstance(content, dict) or not isinstance(content.get("run"), str):
        raise RefusedError(_es("Falta «run», el nombre del entrenamiento."))
    seed, owner = content.get("seed", 0), content.get("owner", 0)
    for name, value, limit in (("seed", seed, MAX_SEED), ("owner", owner, MAX_OWNER)):
        if type(value) is not int or not 0 <= value <= limit:
            raise RefusedError(
                _es("«{name}» es {found}; se esperaba un entero de 0 a {limit}.").format(
                    name=name, found=shown(value), limit=limit
                )
            )
    chain, rebase = (check_hash(content[name], name) if name in content else "" for name in ("chain", "rebase"))
    return RunRequest(check_run_id(content["run"]), seed, owner, chain, rebase)


def required_run(request: Request) -> str:
    """The run that the headers must name."""
    if RUN_HEADER not in request.headers:
        raise RefusedError(_es("Falta la cabecera {name}.").format(name=RUN_HEADER))
    return check_run_id(request.headers[RUN_HEADER])


def required_owner(request: Request) -> int:
    """The owner that the headers must name."""
    text = request.headers.get(OWNER_HEADER, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise RefusedError(_es("Falta la cabecera {name}, un número.").format(name=OWNER_HEADER))
    return int(text)


def rebase_chain(request: Request) -> str:
    """The chain value under which a state of another machine goes on; nothing for one of this kind."""
    return check_hash(request.headers[REBASE_HEADER], REBASE_HEADER) if REBASE_HEADER in request.headers else ""


def unknown_form(expected: str) -> RefusedError:
    """The refusal of a body of another media type."""
    return RefusedError(
        _es("El tipo del cuerpo (Content-Type) no vale; se esperaba {expected}.").format(expected=expected),
        status=415,
        code="form",
    )


def damaged_body() -> RefusedError:
    """The refusal of a body that is not what its sender made; the client sends it again."""
    return RefusedError(
        _es("El cuerpo no llegó entero: no es el que anuncia su sha256."), mend=_es("Envíalo otra vez."), code="damaged"
    )


def sha256_of(content: bytes) -> str:
    """The sha256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/learner_thread.py
#
# The one thread in which models live, with a bounded queue before it.
# ----------------------------------------------------------------------------------------------------------------------

_JobResult = TypeVar("_JobResult")


class LearnerThread:
    """The one thread in which models live, with a bounded queue before it."""

    def __init__(self, size: int) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(size)
        self._thread = threading.Thread(target=self._work, name="sheily-learner", daemon=True)
        self._lock = threading.Lock()
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return self._jobs.qsize()

    def submit(self, work: Callable[[], _JobResult]) -> Future[_JobResult]:
        """Queue some work; raises :class:`RefusedError` (``busy``) when the queue is full."""
        result: Future[_JobResult] = Future()
        with self._lock:
            if self._closed:
                raise RefusedError(
                    _es("El trabajador se está parando."), mend=_es("Vuelve a arrancarlo."), status=503, code="restarted"
                )
            try:
                self._jobs.put_nowait(partial(_run_job, work, result))
            except queue.Full as error:
                raise RefusedError(
                    _es("La cola está llena: esperan {waiting} peticiones.").format(waiting=self.waiting),
                    mend=_es("Repite la petición dentro de {seconds} s.").format(seconds=1),
                    status=429,
                    code="busy",
                    retry_after=1,
                ) from error
            if self._thread.ident is None:
                self._thread.start()
        return result

    def close(self) -> None:
        """Finish what is queued, and end."""
        with self._lock:
            self._closed = True
        if self._thread.ident is not None and self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def _work(self) -> None:
        while job := self._jobs.get():
            job()
            del job  # else the last one's work and result stay in memory until the next one


def _run_job(work: Callable[[], _JobResult], result: Future[_JobResult]) -> None:
    if not result.set_running_or_notify_cancel():
        return
    try:
        value = work()
    except BaseException as error:
        result.set_exception(error)
        # The error knows this frame, and the result the error: what the work held (a whole learner, when a state does
        # not fit) would stay in memory until the next full collection of garbage.
        del work, result
    else:
        result.set_result(value)


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/responses.py
#
# What the worker answers: JSON, errors in their one form, and what there is to say of the network.
# ----------------------------------------------------------------------------------------------------------------------

MODEL_NAME = "CortezaCognitivaV4"
MODEL_VERSION = "4.0"


def json_answer(content: dict[str, Any]) -> Response:
    """A JSON answer; numpy arrays become lists."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON_FORM)


def error_answer(error: RefusedError) -> Response:
    """The one form of every error."""
    content = {"status": "error", "error": error.message, "help": error.mend, "code": error.code, **error.facts}
    headers = {"Retry-After": str(error.facts["retry_after"])} if "retry_after" in error.facts else None
    return Response(orjson.dumps(content), error.status, headers, JSON_FORM)


def http_error_answer(error: HTTPException, path: str) -> RefusedError:
    """What the framework refuses, in the worker's own form."""
    if error.status_code == 404:
        message, mend = _es("No existe {path}.").format(path=path[:80]), _es("Las direcciones que hay están en /docs.")
    elif error.status_code == 405:
        message, mend = _es("{path} no admite ese método.").format(path=path[:80]), _es("Los métodos están en /docs.")
    else:
        message, mend = _es("La petición no vale: {reason}.").format(reason=error.detail), ""
    return RefusedError(message, mend=mend, status=error.status_code, code="http")


def describe_network(total: int, trainable: int) -> dict[str, Any]:
    """The answer of ``/info``, for a network of so many parameters."""
    return {
        "nombre": MODEL_NAME,
        "version": MODEL_VERSION,
        "arquitectura": {
            "capas": {
                "capa1": _es("Entrada: {size} números, en el cliente").format(size=VECTOR),
                "capa2": _es("LSTM y Transformer sobre 25 subespacios de 64"),
                "capa3": _es("MLP residual, 512"),
                "capa4": _es("Autoatención, 512"),
                "capa5": _es("Tres cabezas: anomalía, dendritas y coherencia"),
            },
            "parametros_totales": total,
            "parametros_entrenables": trainable,
        },
        "flujo": {
            "entrada": f"[N, {VECTOR}]",
            "procesamiento": "capa2 → capa3 → capa4 → capa5",
            "salida": {
                "anomaly": _es("1 número, de 0 a 1"),
                "dendrites": _es("{size} números, de −1 a 1").format(size=DENDRITES),
                "coherence": _es("{size} números, de −1 a 1").format(size=COHERENCE),
            },
        },
        "protocol": PROTOCOL,
    }


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/durable.py
#
# Writes that survive a crash: temporary name, fsync, rename, fsync of the folder.
#
# After any of these functions has returned, the data are on the disk; if one raises or the process dies, the previous
# content is intact. An ``fsync`` that fails is never retried: the kernel may already have dropped the pages.
# ----------------------------------------------------------------------------------------------------------------------

def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Push a file's written content to the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Push a folder's entries (creations and renames) to the disk. Windows has no such call and needs none."""
    if os.name == "nt":  # pragma: no cover
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder, and those above it that are missing, so that what is synced in it can be found again.

    A file's own sync does not keep the entry of a new folder above it: a power cut would take all of it away.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, wholly or not at all."""
    make_folder(path.parent)
    with _replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path``; what was written there, and synced, takes its place when the context ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise as :class:`OSError`, with its number and ``path``, what the system says of a write there.

    What is raised for an open file lacks the name; what safetensors and tokenizers raise is no :class:`OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def move(source: Path, target: Path) -> None:
    """Let a synced file take another's place, wholly or not at all; on another file system its bytes are copied."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with _replacing(target) as temporary:
            shutil.copyfile(source, temporary)
            sync_file(temporary)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as readable JSON, wholly or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # of a file name that is not UTF-8; JSON's own escape


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors and push them to the disk. Raises :class:`OSError` when the disk is full."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with naming(path):
        save_file(contiguous, path, metadata=metadata)
    sync_file(path)


def is_full_disk(error: OSError) -> bool:
    """Whether a write failed for want of room: disk, quota or the process's file-size limit."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``; ``None`` when the file is absent or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/snapshots.py
#
# Snapshots of a run that are whole or absent, and the one file in which a run travels.
#
# A run's whole state is one safetensors file: the learner's tensors, and in the metadata, as JSON, what is known of the
# run (ledger, statistics, fingerprint). On the disk it lies in a folder ``snapshot-000000000042`` beside a
# ``manifest.json`` with its sha256. It is written under a temporary name, fsynced, the manifest last; then the folder is
# renamed and its parent fsynced. The newest one whose hash verifies is the one that is loaded; three are kept. Nothing is
# ever pickled.
# ----------------------------------------------------------------------------------------------------------------------

SNAPSHOTS_KEPT = 3
MAX_SNAPSHOT_HEADER = 8 * 1024 * 1024
MAX_SNAPSHOT_SEQ = 10**12 - 1
"""The last event whose number fits a folder's name; a snapshot of a later one would never be found again."""
UNFINISHED_SNAPSHOT = ".unfinished"

_SNAPSHOT_FILE, _SNAPSHOT_MANIFEST, _FACTS_KEY = "state.safetensors", "manifest.json", "run"


@dataclass(frozen=True)
class Snapshot:
    """A run's whole state after event ``seq``: JSON values, and the learner's tensors by name."""

    seq: int
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def pack_snapshot(snapshot: Snapshot) -> bytes:
    """The snapshot as one safetensors file; the same snapshot gives the same bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}
    return pack_torch_tensors(tensors, metadata=_snapshot_metadata(snapshot))


def unpack_snapshot(content: bytes) -> Snapshot:
    """The snapshot that :func:`pack_snapshot` packed; anything else raises :class:`RefusedError`."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(MAX_SNAPSHOT_HEADER, len(content) - 8):
        raise _no_snapshot()
    facts = _facts_in_header(content[8 : 8 + size])
    try:
        return Snapshot(facts["seq"], facts, load_torch_tensors(content))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _no_snapshot() from error


class Snapshots:
    """The snapshots of one run, in a folder of their own. One thread at a time may save or load."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot, and drop all but the newest three up to it.

        Later ones belong to a history that was left (they did not verify, or an older state was put in their place).
        Raises :class:`OSError` when it cannot be written; the earlier snapshots are then intact.
        """
        make_folder(self.folder)
        final, temporary = self.folder / f"snapshot-{snapshot.seq:012d}", self.folder / UNFINISHED_SNAPSHOT
        self.remove_leftovers()
        try:
            temporary.mkdir()
            save_tensors(temporary / _SNAPSHOT_FILE, snapshot.tensors, _snapshot_metadata(snapshot))
            write_json(temporary / _SNAPSHOT_MANIFEST, _manifest_of(temporary))
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except BaseException:
            self.remove_leftovers()
            raise
        sync_folder(self.folder)
        kept = [path for path in self.folders() if path <= final][-SNAPSHOTS_KEPT:]
        for other in set(self.folders()) - set(kept):
            shutil.rmtree(other, ignore_errors=True)

    def newest(self) -> tuple[Snapshot | None, list[Path]]:
        """The newest snapshot that verifies (or none), and the newer ones that did not and were passed over."""
        self.remove_leftovers()
        damaged: list[Path] = []
        for folder in reversed(self.folders()):
            if snapshot := _verified_snapshot(folder):
                return snapshot, damaged
            damaged.append(folder)
        return None, damaged

    def newest_facts(self, *, verified: bool = False) -> dict[str, Any] | None:
        """What the newest snapshot's header says of the run; unverified it may be shown, but not relied on."""
        for folder in reversed(self.folders()):
            try:
                if verified and read_json(folder / _SNAPSHOT_MANIFEST) != _manifest_of(folder):
                    continue
                with (folder / _SNAPSHOT_FILE).open("rb") as file:
                    size = int.from_bytes(file.read(8), "little")
                    return _facts_in_header(file.read(min(size, MAX_SNAPSHOT_HEADER)))
            except (OSError, RefusedError):
                continue
        return None

    def folders(self) -> list[Path]:
        """The finished snapshots, oldest first."""
        return sorted(self.folder.glob("snapshot-????????????"))

    def remove_leftovers(self) -> None:
        """Remove what a killed write left."""
        shutil.rmtree(self.folder / UNFINISHED_SNAPSHOT, ignore_errors=True)


def _manifest_of(folder: Path) -> dict[str, str]:
    return {_SNAPSHOT_FILE: sha256_file(folder / _SNAPSHOT_FILE)}


def _facts_in_header(header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_each_once)
        facts: dict[str, Any] = orjson.loads(entries["__metadata__"][_FACTS_KEY])
        if type(facts["seq"]) is int and 0 <= facts["seq"] <= MAX_SNAPSHOT_SEQ:
            return facts
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise _no_snapshot()


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that stands in it twice, two readers could take different ones."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _verified_snapshot(folder: Path) -> Snapshot | None:
    manifest = read_json(folder / _SNAPSHOT_MANIFEST)
    try:
        content = (folder / _SNAPSHOT_FILE).read_bytes()
        if manifest != {_SNAPSHOT_FILE: hashlib.sha256(content).hexdigest()}:
            return None
        return unpack_snapshot(content)
    except (OSError, RefusedError):
        return None


def _snapshot_metadata(snapshot: Snapshot) -> dict[str, str]:
    """One key only: safetensors does not keep the order of several."""
    return {_FACTS_KEY: orjson.dumps({**snapshot.facts, "seq": snapshot.seq}, option=orjson.OPT_SORT_KEYS).decode()}


def _no_snapshot() -> RefusedError:
    return RefusedError(
        _es("El archivo no es el estado entero de un entrenamiento."),
        mend=_es("Usa un archivo tal como lo dio GET /state."),
    )


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/core/omega/surprise.py
#
# How far a vector strays from what was seen before: sixteen statistics of each subspace, and what to expect of them.
#
# A vector of 1,600 numbers is read as 25 subspaces of 64. Each subspace is summed up by sixteen statistics (level, power,
# roughness, peaks, eight bands of its spectrum). Running moments tell what is usual, statistic by statistic, and what the
# other 24 subspaces of the same vector lead one to expect of each; the differences, pooled over the subspaces, are the
# vector's surprise. It needs no label, and says most of what an anomaly detector can know after a few dozen vectors; the
# network's anomaly head starts from it.
#
# Everything here is state without gradient; it changes only when vectors are read together with which are usual.
# Shapes: N vectors, V = 1600, S = 25 subspaces, W = 64 numbers in each, F = 16 statistics, P pooled numbers.
# ----------------------------------------------------------------------------------------------------------------------

SUBSPACES = 25
WIDTH = 64
STATISTICS = 16
POOLED = 23 * STATISTICS
MEMORY = 20_000.0
"""Vectors that the moments remember: the older ones fade from then on."""

_BANDS = (1, 2, 3, 4, 6, 9, 14, 21, 33)
_SHRINKAGE = 16.0
_LIMIT = 8.0


class Moments(nn.Module):
    """Running mean and variance of vectors [N, *shape], in float64 whatever comes in."""

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.zeros(shape, dtype=torch.float64))

    def update(self, values: Tensor) -> None:
        """Take N ≥ 1 more vectors in."""
        values = values.double()
        share = len(values) / (self.count + len(values))
        mean, variance = values.mean(0), values.var(0, unbiased=False)
        step = mean - self.mean
        self.variance += share * (variance - self.variance) + share * (1 - share) * step**2
        self.mean += share * step
        self.count.add_(len(values)).clamp_(max=MEMORY)

    def standardise(self, values: Tensor, floor: float = 1e-3, limit: float = _LIMIT) -> Tensor:
        """The values in standard deviations from the mean, float32, cut off at ``limit``.

        No deviation counts as smaller than ``floor`` times the usual one of all positions.
        """
        least = floor**2 * self.variance.mean() + 1e-30
        return ((values.double() - self.mean) / (self.variance + least).sqrt()).clamp(-limit, limit).float()


@dataclass(frozen=True)
class Reading:
    """What is read off N vectors, all of it in standard deviations.

    Attributes:
        x_NSW: the vectors.
        statistics_NSF: the sixteen statistics of each subspace.
        surprise_NP: the pooled surprise.
    """

    x_NSW: Tensor
    statistics_NSF: Tensor
    surprise_NP: Tensor


class Surprise(nn.Module):
    """The running moments of a stream of vectors, and each vector's distance from them."""

    weights: Tensor
    products: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inputs = Moments(SUBSPACES * WIDTH)
        self.statistics = Moments(SUBSPACES, STATISTICS)
        self.pooled = Moments(POOLED)
        self.register_buffer("weights", torch.zeros(()))
        self.register_buffer("products", torch.zeros(STATISTICS, SUBSPACES, SUBSPACES))

    def forward(self, input_NV: Tensor, usual_N: Tensor | None = None) -> Reading:
        """Read vectors; when ``usual_N`` (bool) is given, learn first what is usual from those that it marks.

        Vectors of which none is usual teach nothing, unless nothing at all is known yet.
        """
        if usual_N is None or not (usual_N.any() or self.inputs.count == 0):
            x_NSW = self.standardise(input_NV)
            z_NSF = self.statistics.standardise(summarise(x_NSW))
            return Reading(x_NSW, z_NSF, self._standardise_pooled(self._pool(z_NSF)))
        usual_N = usual_N if usual_N.any() else torch.ones_like(usual_N)
        self.inputs.update(input_NV[usual_N])
        x_NSW = self.standardise(input_NV)
        statistics_NSF = summarise(x_NSW)
        self.statistics.update(statistics_NSF[usual_N])
        z_NSF = self.statistics.standardise(statistics_NSF)
        self._add_products(z_NSF[usual_N])
        pooled_NP = self._pool(z_NSF)
        self.pooled.update(pooled_NP[usual_N])
        return Reading(x_NSW, z_NSF, self._standardise_pooled(pooled_NP))

    def standardise(self, input_NV: Tensor) -> Tensor:
        """The vectors in standard deviations of each of the 1,600 positions: [N, S, W]."""
        return self.inputs.standardise(input_NV, limit=2 * _LIMIT).view(-1, SUBSPACES, WIDTH)

    def _standardise_pooled(self, pooled_NP: Tensor) -> Tensor:
        return self.pooled.standardise(pooled_NP, floor=1e-2, limit=5.0)

    def _add_products(self, z_NSF: Tensor) -> None:
        self.products += torch.einsum("nsf,ntf->fst", z_NSF, z_NSF)
        self.weights += len(z_NSF)
        if self.weights > MEMORY:
            self.products *= MEMORY / self.weights
            self.weights.fill_(MEMORY)

    def _pool(self, z_NSF: Tensor) -> Tensor:
        against_others_NSF = self._against_others(z_NSF)
        error = (against_others_NSF**2).mean(1).add(1e-3).log()
        return torch.cat([_pool_subspaces(z_NSF), _pool_subspaces(against_others_NSF), error], 1)

    def _against_others(self, z_NSF: Tensor) -> Tensor:
        """Each statistic of each subspace less what the other 24 predict of it, in standard deviations.

        It is the conditional residual of a normal distribution: with A the inverse covariance, (A z)_s / √A_ss.
        """
        covariance_FSS = self.products / self.weights.clamp(min=1)
        ridge = 0.1 + _SHRINKAGE / self.weights.clamp(min=1)
        inverse_FSS = torch.linalg.inv(covariance_FSS + ridge * torch.eye(SUBSPACES, device=z_NSF.device))
        scale_SF = torch.diagonal(inverse_FSS, dim1=1, dim2=2).sqrt().T
        return (torch.einsum("fst,ntf->nsf", inverse_FSS, z_NSF) / scale_SF).clamp(-_LIMIT, _LIMIT)


def summarise(x_NSW: Tensor) -> Tensor:
    """The sixteen statistics of each subspace: [N, S, F], mostly logarithms of powers."""
    level = x_NSW.mean(-1)
    centred = x_NSW - level[..., None]
    variance = centred.square().mean(-1)
    first, second = x_NSW.diff(dim=-1), x_NSW.diff(n=2, dim=-1)
    peak = centred.abs().amax(-1) / (variance.sqrt() + 0.05)
    jump = torch.cat([level[:, 1:2] - level[:, :1], level.diff(dim=1)], 1)
    window = torch.hann_window(WIDTH, device=x_NSW.device)
    power = torch.fft.rfft(centred * window, dim=-1).abs().square() / WIDTH
    bands = [power[..., low:high].mean(-1) for low, high in itertools.pairwise(_BANDS)]
    powers = [x_NSW.square().mean(-1), variance, first.square().mean(-1), second.square().mean(-1), jump.square()]
    logarithms = torch.stack([*powers, *bands], -1).add(1e-3).log()
    return torch.cat([torch.stack([level, jump, peak.add(1e-3).log()], -1), logarithms], -1)


def _pool_subspaces(z_NSF: Tensor) -> Tensor:
    """Eleven numbers of each statistic over the subspaces: [N, 11·F]. Extremes, spread, steps, drift.

    Sorting and a triangular product stand for median and running sum, which CUDA does not repeat bit for bit.
    """
    middle = z_NSF.sort(1).values[:, SUBSPACES // 2, None]
    around = z_NSF - middle
    so_far = torch.ones(SUBSPACES, SUBSPACES, device=z_NSF.device).tril() / SUBSPACES**0.5
    drift = so_far @ (z_NSF - z_NSF.mean(1, keepdim=True))
    place = torch.linspace(-1, 1, SUBSPACES, device=z_NSF.device)[:, None]
    parts = [middle[:, 0], z_NSF.mean(1), around.amax(1), around.amin(1), z_NSF.amax(1), z_NSF.amin(1)]
    parts += [z_NSF.abs().mean(1), z_NSF.std(1), drift.abs().amax(1), (z_NSF * place).mean(1)]
    parts += [z_NSF.diff(dim=1).abs().amax(1)]
    return torch.cat(parts, 1)


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/core/omega/wide.py
#
# A linear layer whose products run in bfloat16 on processors that have it, with float32 weights and gradients.
#
# Autocast would convert weights and gradients anew at each use, which costs more than the products themselves at these
# sizes; here a bfloat16 copy of the weights is kept, and refreshed once after each optimizer step.
# ----------------------------------------------------------------------------------------------------------------------

class WideLinear(nn.Linear):
    """``nn.Linear``; after :meth:`use_bfloat16`, its three products (output, both gradients) are bfloat16 ones."""

    half_weight: Tensor | None = None

    def use_bfloat16(self) -> None:
        """Keep a bfloat16 copy of the weights from now on; call again whenever they have changed."""
        with torch.no_grad():
            if self.half_weight is None:
                self.half_weight = torch.empty_like(self.weight, dtype=torch.bfloat16)
            self.half_weight.copy_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        if self.half_weight is None:
            return super().forward(input)
        output: Tensor = _HalfProduct.apply(input, self.weight, self.half_weight) + self.bias  # type: ignore[no-untyped-call]
        return output


class _HalfProduct(torch.autograd.Function):
    """x Wᵀ with the bfloat16 copy; the gradient of the copy is handed to the float32 weights."""

    @staticmethod
    def forward(context: Any, x_NI: Tensor, _weight_OI: Tensor, half_OI: Tensor) -> Tensor:
        half_NI = x_NI.bfloat16()
        context.save_for_backward(half_NI, half_OI)
        return (half_NI @ half_OI.T).float()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        half_NI, half_OI = context.saved_tensors
        gradient_NO = gradients[0].bfloat16()
        return (gradient_NO @ half_OI).float(), (gradient_NO.T @ half_NI).float(), None


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/core/omega/model.py
#
# CortezaCognitivaV4: the network of OMEGA 21, from 1,600 numbers to an anomaly, 16 dendrites and 64 of coherence.
#
#     layer 1   the client: it reads or generates the vectors
#     layer 2   an LSTM and a Transformer over the 25 subspaces, fused by a gate; 1,600 out
#     layer 3   a residual MLP; 512 out
#     layer 4   self-attention over the 512, as 8 groups of 64, and a residual MLP; 512 out
#     layer 5   heads: anomaly (1), dendrites (16, −1..1), coherence (64, −1..1); and a decoder, used in training only
#
# What runs once a subspace (25 times a vector) is narrow; the parameters are in what runs once a vector.
# Shapes: N vectors, S = 25 subspaces, W = 64 numbers in each, V = S·W = 1600, H = 512.
# ----------------------------------------------------------------------------------------------------------------------

HIDDEN = 512
_WIDE = 2048
_NARROW = 1024
_READ = VECTOR + SUBSPACES * STATISTICS


@dataclass(frozen=True)
class Cortex:
    """What the network makes of N vectors.

    Attributes:
        anomaly_N: logits.
        dendrites_ND: 16 numbers in −1..1.
        coherence_NC: 64 numbers in −1..1.
        layer4_NH: what the heads read.
        rebuilt_NSW: the decoder's standardised vectors.
        activations: mean absolute activation of layers 2, 3 and 4.
    """

    anomaly_N: Tensor
    dendrites_ND: Tensor
    coherence_NC: Tensor
    layer4_NH: Tensor
    rebuilt_NSW: Tensor
    activations: Tensor


class CortezaCognitivaV4(nn.Module):
    """The five layers, 12 million parameters; ``surprise`` holds the running moments of what it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.surprise = Surprise()
        self.layer2 = Layer2()
        self.layer3 = Layer3()
        self.layer4 = Layer4()
        self.anomaly = AnomalyHead()
        self.dendrites = nn.Linear(HIDDEN, DENDRITES)
        self.coherence = nn.Linear(HIDDEN, COHERENCE)
        self.decoder = WideLinear(HIDDEN, VECTOR)
        for head, size in ((self.dendrites, 0.02), (self.coherence, 0.002), (self.decoder, 0.002)):
            nn.init.normal_(head.weight, std=size)
            nn.init.zeros_(head.bias)

    def forward(self, reading: Reading, visible_NS: Tensor | None = None) -> Cortex:
        """Judge what ``surprise`` read; layers 2 to 4 see only the subspaces marked in ``visible_NS`` (1 or 0).

        The anomaly head reads every subspace's statistics all the same.
        """
        x_NSW, z_NSF = reading.x_NSW, reading.statistics_NSF
        seen_NS1 = torch.ones_like(x_NSW[..., :1]) if visible_NS is None else visible_NS[..., None]
        layer2_NSW = self.layer2(x_NSW * seen_NS1)
        # A sum divided by the root of the count: noise keeps its size however many subspaces are seen.
        pooled_NW = (layer2_NSW * seen_NS1).sum(1) / seen_NS1.sum(1).sqrt()
        layer3_NH = self.layer3(layer2_NSW.flatten(1), (z_NSF * seen_NS1).flatten(1), pooled_NW)
        layer4_NH = self.layer4(layer3_NH)
        return Cortex(
            anomaly_N=self.anomaly(layer4_NH, reading.surprise_NP),
            dendrites_ND=torch.tanh(self.dendrites(layer4_NH)),
            coherence_NC=torch.tanh(self.coherence(layer4_NH)),
            layer4_NH=layer4_NH,
            rebuilt_NSW=self.decoder(layer4_NH).view_as(x_NSW),
            activations=torch.stack([part.detach().abs().mean() for part in (layer2_NSW, layer3_NH, layer4_NH)]),
        )


class Layer2(nn.Module):
    """LSTM and Transformer over the subspaces, side by side, fused by a gate: [N, S, W] to [N, S, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.place = nn.Parameter(0.02 * torch.randn(SUBSPACES, WIDTH))
        self.attention = Attention()
        self.mlp = Residual(WIDTH, 2 * WIDTH)
        self.gate = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x_NSW: Tensor) -> Tensor:
        """The subspaces, each having read the others."""
        recurrent_NSW, _ = self.lstm(x_NSW)
        attended_NSW = self.mlp(self.attention(x_NSW + self.place))
        gate_NSW = torch.sigmoid(self.gate(torch.cat([recurrent_NSW, attended_NSW], -1)))
        output: Tensor = x_NSW + gate_NSW * recurrent_NSW + (1 - gate_NSW) * (attended_NSW - x_NSW)
        return output


class Layer3(nn.Module):
    """A residual MLP over layer 2 and the statistics, beside a straight path for the subspaces' mean: [N, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.read = WideLinear(_READ, _WIDE)
        self.mlp = Residual(_WIDE, _NARROW)
        self.write = WideLinear(_WIDE, HIDDEN)
        self.mean = nn.Linear(WIDTH, HIDDEN)

    def forward(self, layer2_NV: Tensor, statistics_NX: Tensor, pooled_NW: Tensor) -> Tensor:
        """512 numbers a vector."""
        wide = self.mlp(self.read(torch.cat([layer2_NV, statistics_NX], 1)))
        output: Tensor = self.write(functional.gelu(wide)) + self.mean(pooled_NW)
        return output


class Layer4(nn.Module):
    """Self-attention over 8 groups of 64, then a residual MLP: [N, H] to [N, H], normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(HIDDEN // WIDTH, WIDTH))
        self.attention = Attention()
        self.mlp = Residual(HIDDEN, _WIDE)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, layer3_NH: Tensor) -> Tensor:
        """What the heads read."""
        groups_NGW = layer3_NH.view(len(layer3_NH), -1, WIDTH)
        output: Tensor = self.norm(self.mlp(self.attention(groups_NGW + self.place).flatten(1)))
        return output


class AnomalyHead(nn.Module):
    """A logit from the surprise and from layer 4. Before any label it already grows with the surprise."""

    def __init__(self) -> None:
        super().__init__()
        self.surprise = nn.Linear(2 * POOLED, 1)
        self.layer4 = nn.Linear(HIDDEN, 1, bias=False)
        with torch.no_grad():
            self.surprise.weight.zero_()[:, POOLED:] = 4 / POOLED
            self.surprise.bias.fill_(-2.0)
            self.layer4.weight.zero_()

    def forward(self, layer4_NH: Tensor, surprise_NP: Tensor) -> Tensor:
        """Logits [N]. A standard normal number is 0.8 from its mean on average."""
        both = torch.cat([surprise_NP, surprise_NP.abs() - 0.8], 1)
        output: Tensor = (self.surprise(both) + self.layer4(layer4_NH))[:, 0]
        return output


class Attention(nn.Module):
    """Four heads of self-attention over a few tokens of 64, normalised before, added after: [N, T, W].

    Written out: over 25 tokens the products themselves are faster than a fused kernel, and the same bits every time.
    """

    heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_NTW: Tensor) -> Tensor:
        """The tokens, each having attended to all."""
        count, tokens, _ = x_NTW.shape
        qkv = self.qkv(self.norm(x_NTW)).view(count, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()
        weights_NATT = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, -1)
        output: Tensor = x_NTW + self.out((weights_NATT @ value).transpose(1, 2).reshape(count, tokens, -1))
        return output


class Residual(nn.Module):
    """x + MLP(norm(x)), with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        linear = WideLinear if width >= HIDDEN else nn.Linear
        self.up = linear(width, hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        output: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return output


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/core/omega/objective.py
#
# What each head is asked to do, and why.
#
# Anomaly
#     Binary cross-entropy of the labelled vectors, both classes weighing the same however rare anomalies are. Vectors
#     without a label take no part in it.
# Reconstruction
#     Five of the 25 subspaces are hidden from layers 2 to 4; the decoder rebuilds all 25. It needs no label, so every
#     batch teaches the trunk.
# Coherence
#     64 numbers, self-supervised: the coherent average. Position by position, the standardised subspaces are averaged,
#     multiplied by √25 (so that noise has size 1 whatever the number of subspaces) and squashed by tanh(·/2). What the
#     subspaces share survives an average, what each has alone cancels: 0 means that the windows have nothing in common
#     there, ±1 that they agree. The network must say it of the whole vector while it sees four fifths of it; so the head
#     learns what is common, and cannot copy it.
# Dendrites
#     16 adjustments, learned from feedback on adjustments that were applied. The state a batch left in layer 4 is
#     remembered with what was applied then; validated adjustments pull the head towards them (squared distance), rejected
#     ones push it away while it is nearer than a margin. Without feedback this head does not move.
# ----------------------------------------------------------------------------------------------------------------------

HIDDEN_SUBSPACES = 5
MARGIN = 0.5


def anomaly_loss(logits_N: Tensor, labels_N: Tensor) -> Tensor:
    """Class-balanced cross-entropy; 0 when nothing is labelled. Labels: 1, 0, −1 for none."""
    known = labels_N != NO_LABEL
    if not known.any():
        return logits_N.sum() * 0
    target = (labels_N[known] == 1).float()
    losses = functional.binary_cross_entropy_with_logits(logits_N[known], target, reduction="none")
    classes = [losses[target == kind].mean() for kind in (0, 1) if (target == kind).any()]
    return torch.stack(classes).mean()


def coherence_target(x_NSW: Tensor) -> Tensor:
    """The coherent average of standardised vectors [N, S, W]: [N, W] in −1..1."""
    return torch.tanh(x_NSW.mean(1) * SUBSPACES**0.5 / 2)


def visible_subspaces(count: int, generator: torch.Generator) -> Tensor:
    """Which subspaces layers 2 to 4 may see: float [N, S], five zeros a row."""
    order_NS = torch.rand(count, SUBSPACES, generator=generator).argsort(1)
    return (order_NS >= HIDDEN_SUBSPACES).float()


def dendrite_loss(dendrites_KD: Tensor, adjustments_KD: Tensor, verdict_K: Tensor) -> Tensor:
    """Pull to what was validated (verdict 1), push from what was rejected (−1); 0 marks an empty place."""
    distance_K = (dendrites_KD - adjustments_KD).square().mean(1)
    push_K = (MARGIN - (distance_K + 1e-6).sqrt()).clamp(min=0).square()
    losses_K = torch.where(verdict_K > 0, distance_K, push_K) * verdict_K.abs()
    return losses_K.sum() / verdict_K.abs().sum().clamp(min=1)


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/core/processor.py
#
# What the processor can do that decides how numbers are computed.
# ----------------------------------------------------------------------------------------------------------------------

def cpu_has_fast_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware: AMX or AVX512-BF16, and oneDNN is allowed to."""
    import torch

    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not any(word in limit for word in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")):
        return False
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/core/omega/learner.py
#
# The learner: one batch in, one result out; state in and out.
#
# On one kind of machine (:attr:`Learner.fingerprint`), the same seed and the same sequence of batches and feedback give
# the same bits, whatever interruptions, saves and loads lie between: nothing here reads a clock or a global random state,
# and what is random in a step is decided by the seed and the step's number.
# ----------------------------------------------------------------------------------------------------------------------

TRUNK_RATE = 5e-4
RATES = {"anomaly.": 5e-3, "coherence.": 1e-3, "layer3.mean.": 1e-3}
"""Learning rates of the parts that learn faster than the trunk."""
DENDRITES_PART = "dendrites."
DENDRITE_RATE = 0.05
DENDRITE_STEPS = 8
GRADIENT_LIMIT = 1.0
FEEDBACK_KEPT = 32
THRESHOLD = 0.5

_BETAS = (0.9, 0.99)
_AT_ONCE = 512


@dataclass(frozen=True)
class Lesson:
    """What one batch gave.

    Attributes:
        loss: the sum of the objectives, in the last epoch.
        anomaly_prob: the batch's mean probability.
        anomalies: how many vectors are above the threshold.
        dendrites: float32 [16], the batch's mean.
        coherence: float32 [64], the batch's mean.
        objectives: each part of the loss, by name.
        activations: mean absolute activation of layers 2, 3 and 4.
    """

    loss: float
    anomaly_prob: float
    anomalies: int
    dendrites: NDArray[np.float32]
    coherence: NDArray[np.float32]
    objectives: dict[str, float]
    activations: tuple[float, float, float]


@dataclass(frozen=True)
class Prediction:
    """What the network says of N vectors: float32 [N], [N, 16], [N, 64], and the threshold of an anomaly."""

    anomaly_prob: NDArray[np.float32]
    dendrites: NDArray[np.float32]
    coherence: NDArray[np.float32]
    threshold: float


class FeedbackMemory(nn.Module):
    """The latest feedback, with what layer 4 held when the adjustments it speaks of were given."""

    latest: Tensor
    layer4: Tensor
    adjustments: Tensor
    verdict: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("latest", torch.zeros(HIDDEN))
        self.register_buffer("layer4", torch.zeros(FEEDBACK_KEPT, HIDDEN))
        self.register_buffer("adjustments", torch.zeros(FEEDBACK_KEPT, DENDRITES))
        self.register_buffer("verdict", torch.zeros(FEEDBACK_KEPT))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def remember(self, adjustments_D: Tensor, validated: bool) -> None:
        """Keep one more; the oldest gives way."""
        place = int(self.count) % FEEDBACK_KEPT
        self.layer4[place] = self.latest
        self.adjustments[place] = adjustments_D
        self.verdict[place] = 1.0 if validated else -1.0
        self.count += 1


class Learner:
    """CortezaCognitivaV4 with its optimizers and its memory; :meth:`train` and :meth:`feedback` alone change them.

    Args:
        seed: decides the first weights and everything random afterwards.
        device: ``auto`` (CUDA, else CPU), ``cpu`` or ``cuda``. Apple's MPS has no float64, which the moments need.
    """

    def __init__(self, seed: int, device: str = "auto") -> None:
        self.seed = seed
        self.device = _choose_device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = CortezaCognitivaV4().to(self.device)
        self.memory = FeedbackMemory().to(self.device)
        self._wide = [part for part in self.model.modules() if isinstance(part, WideLinear)]
        self._halves = self.device.type == "cpu" and cpu_has_fast_bf16()
        named = list(self.model.named_parameters())
        parts = {part: [weight for name, weight in named if name.startswith(part)] for part in RATES}
        others = (*RATES, DENDRITES_PART)
        parts["trunk"] = [weight for name, weight in named if not name.startswith(others)]
        self._optimizer = _adam(parts)
        # Plain descent follows layer 4 itself; Adam's even steps would carry over to vectors unlike it.
        self._dendrites = torch.optim.SGD(self.model.dendrites.parameters(), lr=DENDRITE_RATE)
        self._refresh()

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the bits depend on besides the seed and the data."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            "machine": platform.machine(),
            "instructions": "" if cuda else torch.backends.cpu.get_cpu_capability(),
            "precision": "bf16" if self._halves else "fp32",
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
        }

    @property
    def parameter_counts(self) -> tuple[int, int]:
        """All parameters, and those that are trained."""
        parameters = list(self.model.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)

    def train(self, batch: Batch, step: int) -> Lesson:
        """Learn from a batch.

        Args:
            batch: N vectors, some or all or none of them labelled.
            step: the event's number; with the seed it decides which subspaces are hidden.

        Raises:
            TrainingError: the loss is not a number. The state can no longer be trusted.
        """
        input_NV = torch.from_numpy(batch.input_data).to(self.device)
        labels_N = torch.from_numpy(batch.labels).to(self.device)
        reading = self.model.surprise(input_NV, labels_N != 1)
        target_NC = coherence_target(reading.x_NSW)
        for epoch in range(batch.epochs):
            visible_NS = visible_subspaces(len(batch), self._random(step, epoch)).to(self.device)
            cortex = self.model(reading, visible_NS)
            objectives = {
                "anomaly": anomaly_loss(cortex.anomaly_N, labels_N),
                "reconstruction": (cortex.rebuilt_NSW - reading.x_NSW).square().mean(),
                "coherence": (cortex.coherence_NC - target_NC).square().mean(),
            }
            loss = torch.stack(list(objectives.values())).sum()
            if not torch.isfinite(loss):
                raise TrainingError(_es("La pérdida no es un número."), mend=_es("Revisa los datos del lote."))
            self._descend(loss)
        return self._lesson(cortex, loss, objectives)

    def feedback(self, feedback: Feedback, step: int) -> None:  # noqa: ARG002 - nothing here is random
        """Learn from what came of the latest batch's adjustments: a few steps of the dendrite head alone."""
        self.memory.remember(torch.from_numpy(feedback.adjustments).to(self.device), feedback.validated)
        for _step in range(DENDRITE_STEPS):
            dendrites_KD = torch.tanh(self.model.dendrites(self.memory.layer4))
            loss = dendrite_loss(dendrites_KD, self.memory.adjustments, self.memory.verdict)
            self._dendrites.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._dendrites.step()

    @torch.no_grad()
    def predict(self, input_data: NDArray[np.float32]) -> Prediction:
        """Judge vectors [N, 1600] without learning."""
        parts = []
        for start in range(0, len(input_data), _AT_ONCE):
            input_NV = torch.from_numpy(input_data[start : start + _AT_ONCE]).to(self.device)
            cortex = self.model(self.model.surprise(input_NV))
            parts.append((torch.sigmoid(cortex.anomaly_N), cortex.dendrites_ND, cortex.coherence_NC))
        anomaly_N, dendrites_ND, coherence_NC = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        return Prediction(anomaly_N, dendrites_ND, coherence_NC, THRESHOLD)

    def state(self) -> dict[str, Tensor]:
        """Everything that decides what comes next, as copies on the CPU: weights, moments, optimizers, memory."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take a state that :meth:`state` gave.

        Raises:
            WorkerError: a tensor is missing, unknown or of another shape or type; nothing was changed.
        """
        tensors = self._tensors()
        wrong = sorted(
            name
            for name in tensors.keys() | state.keys()
            if name not in tensors
            or name not in state
            or (tensors[name].shape, tensors[name].dtype) != (state[name].shape, state[name].dtype)
        )
        if wrong:
            raise WorkerError(
                _es("El estado no es de esta red: «{name}» falta, sobra o tiene otra forma.").format(name=wrong[0])
            )
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
        self._refresh()

    def _descend(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        learned = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(learned, GRADIENT_LIMIT)
        self._optimizer.step()
        self._refresh()

    @torch.no_grad()
    def _lesson(self, cortex: Cortex, loss: Tensor, objectives: dict[str, Tensor]) -> Lesson:
        self.memory.latest.copy_(cortex.layer4_NH.mean(0))
        probability_N = torch.sigmoid(cortex.anomaly_N)
        layer2, layer3, layer4 = cortex.activations.tolist()
        return Lesson(
            loss=float(loss),
            anomaly_prob=float(probability_N.mean()),
            anomalies=int((probability_N > THRESHOLD).sum()),
            dendrites=cortex.dendrites_ND.mean(0).cpu().numpy(),
            coherence=cortex.coherence_NC.mean(0).cpu().numpy(),
            objectives={name: float(part) for name, part in objectives.items()},
            activations=(layer2, layer3, layer4),
        )

    def _tensors(self) -> dict[str, Tensor]:
        """The state's own tensors, by name; writing into them changes the learner."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"memory.{name}": tensor for name, tensor in self.memory.state_dict().items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, moments in self._optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in moments.items()}
        return tensors

    def _refresh(self) -> None:
        if self._halves:
            for layer in self._wide:
                layer.use_bfloat16()

    def _random(self, step: int, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 128 + epoch) % 2**63)


def _adam(parts: dict[str, list[nn.Parameter]]) -> torch.optim.AdamW:
    """AdamW without decay whose moments exist from the start, so that a state always has the same tensors."""
    groups = [{"params": weights, "lr": RATES.get(part, TRUNK_RATE)} for part, weights in parts.items()]
    optimizer = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise RequestError(
            _es("El dispositivo «{device}» no está disponible.").format(device=device), mend=_es("Usa --device cpu.")
        )
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(device)


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/runs.py
#
# The runs of a worker: each a ledger, a learner and statistics that change together, event by event.
#
# A run is a deterministic machine: the same events give the same bits and the same answers, here or on another machine of
# the same fingerprint. It may be thrown away at any moment: its newest snapshot and the client's journal bring it back.
#
# Nothing here knows of HTTP, sockets or threads of its own; the clock is passed in. Every method is called from one
# thread, except :meth:`Runs.save`, which may be called from another.
# ----------------------------------------------------------------------------------------------------------------------

LOSSES_KEPT = 100
LOSSES_SHOWN = 20
STEADY_SHARE = 0.01
RUN_FACTS_FILE = "run.json"
MAX_COUNT = 10**15
"""No count of a run's state comes near it; sums of two such are still numbers that JSON can carry."""
ASIDE_SUFFIX = ".aside"
"""Ends the folder of a state that was set aside; no run's name has a dot."""

_runs_log = logging.getLogger("sheily_train.colab.runs")


@dataclass
class Statistics:
    """What a run's events add up to; a part of its state.

    Attributes:
        losses: the latest ones, oldest first.
        anomaly_sum: the sum of the anomaly probabilities of all vectors.
        anomalies: how many vectors were above the threshold.
    """

    samples: int = 0
    batches: int = 0
    loss_sum: float = 0.0
    losses: list[float] = field(default_factory=list)
    anomaly_sum: float = 0.0
    anomalies: int = 0
    feedback: int = 0
    feedback_validated: int = 0

    def add_lesson(self, lesson: Lesson, samples: int) -> None:
        """Count a batch."""
        self.samples += samples
        self.batches += 1
        self.loss_sum += lesson.loss
        self.losses = [*self.losses, lesson.loss][-LOSSES_KEPT:]
        self.anomaly_sum += lesson.anomaly_prob * samples
        self.anomalies += lesson.anomalies

    def add_feedback(self, feedback: Feedback) -> None:
        """Count feedback."""
        self.feedback += 1
        self.feedback_validated += feedback.validated

    def summary(self) -> dict[str, Any]:
        """The ``estadisticas`` of an answer, without what clock and machine say."""
        return {
            "total_muestras": self.samples,
            "total_batches": self.batches,
            "loss_promedio_global": _share(self.loss_sum, self.batches),
            "loss_promedio_ultimos_100": _share(sum(self.losses), len(self.losses)),
            "anomalia_media": _share(self.anomaly_sum, self.samples),
            "feedback": {
                "recibido": self.feedback,
                "exitoso": self.feedback_validated,
                "tasa_exito": _share(self.feedback_validated, self.feedback),
            },
        }

    def trend(self) -> dict[str, Any]:
        """The answer of ``/metricas``."""
        return {
            "ultimos_20_losses": self.losses[-LOSSES_SHOWN:],
            "tendencia": _tendency(self.losses[-LOSSES_SHOWN:]),
            "anomalias_detectadas": self.anomalies,
            "feedback_tasa_exito": _share(self.feedback_validated, self.feedback),
        }


@dataclass(frozen=True)
class Card:
    """What may be said of a run at once, without its model: a copy made after each event."""

    run: str
    last_seq: int
    opened: float
    summary: dict[str, Any]
    trend: dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """Where a run stands, and the fingerprint of its state, when it has one."""

    seed: int
    owner: int
    last_seq: int
    chain: str
    fingerprint: dict[str, str] | None


class Run:
    """One run in memory.

    Args:
        opened: the clock when it came into memory.
    """

    def __init__(self, ledger: Ledger, learner: Learner, statistics: Statistics, opened: float) -> None:
        self.ledger = ledger
        self.learner = learner
        self.statistics = statistics
        self.opened = opened
        self.captured = opened
        self.captured_seq = ledger.last_seq

    def snapshot(self) -> Snapshot:
        """The whole state right now, as copies."""
        facts = {
            "ledger": self.ledger.to_json(),
            "statistics": asdict(self.statistics),
            "fingerprint": self.learner.fingerprint,
        }
        return Snapshot(self.ledger.last_seq, facts, self.learner.state())

    def apply(self, claim: Claim, content: Batch | Feedback) -> bytes:
        """Apply the next event, which was judged and checked before; returns its answer.

        An exception leaves the run in a state that nobody knows: it must be thrown away.
        """
        if isinstance(content, Batch):
            lesson = self.learner.train(content, claim.seq)
            if not math.isfinite(lesson.loss):
                raise TrainingError(_es("la pérdida no es un número finito"))
            self.statistics.add_lesson(lesson, len(content))
            answer = _lesson_answer(lesson, len(content), claim.time)
        else:
            self.learner.feedback(content, claim.seq)
            self.statistics.add_feedback(content)
            answer = _feedback_answer(content, self.statistics, claim.time)
        self.ledger.record(claim, answer)
        return answer

    def card(self) -> Card:
        """What may be said of it without its model."""
        return _card_of(self.ledger, self.statistics, self.opened)


@dataclass(frozen=True)
class Capture:
    """A snapshot on its way to the disk; of two of one run, the one with the higher number counts."""

    run: str
    number: int
    snapshot: Snapshot


class Runs:
    """The runs of one worker: those in memory, and those whose snapshots lie in ``folder``, one folder each.

    Args:
        make_learner: a fresh learner for a seed.
        seed: that of the run of clients that name none.
        in_memory: how many runs may be in memory; beyond it, the one used longest ago is saved and dropped.
        snapshot_seconds: how old a run's newest snapshot may become while it trains.
    """

    def __init__(
        self,
        folder: Path,
        make_learner: Callable[[int], Learner],
        *,
        seed: int = 0,
        in_memory: int = 4,
        snapshot_seconds: float = 45.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self._make_learner = make_learner
        self._in_memory = in_memory
        self._snapshot_seconds = snapshot_seconds
        self._clock = clock
        self._open: OrderedDict[str, Run] = OrderedDict()
        self._attached: dict[str, tuple[int, int]] = {ANONYMOUS_RUN: (seed, 0)}
        self._captures = 0
        self._written: dict[str, int] = {}
        self._unwritten: dict[str, int] = {}
        self._disk = threading.Lock()

    def look(self, name: str) -> Standing | None:
        """Where a run stands, from memory or its newest snapshot; ``None`` when it is not known. Nothing changes."""
        known = self._written_facts(name)
        if run := self._open.get(name):
            ledger, fingerprint = run.ledger, run.learner.fingerprint
            return Standing(ledger.seed, ledger.owner, ledger.last_seq, ledger.chain, fingerprint)
        with self._disk:
            facts = Snapshots(self.folder / name).newest_facts(verified=True)
        owner = max((known or {}).get("owner", 0), self._attached.get(name, (0, 0))[1])
        if facts is not None:
            ledger, _statistics, fingerprint = _read_run_facts(Snapshot(facts["seq"], facts, {}))
            return Standing(ledger.seed, max(owner, ledger.owner), ledger.last_seq, ledger.chain, fingerprint)
        if known is None:
            return None
        return Standing(known["seed"], owner, 0, known.get("chain") or first_chain(name, known["seed"]), None)

    def attach(self, name: str, seed: int, owner: int, *, chain: str = "", aside: str = "") -> Run:
        """Give a run to a client, as its new owner; the run is created when it is new.

        Args:
            name: the run.
            seed: of the network of a new run; that of one that is there must be the same.
            owner: the highest owner's number that the client knows.
            chain: the chain value before the first event of a new run; the protocol's own unless given.
            aside: the chain value of a state that is to be set aside, so that the run begins anew.

        Raises :class:`RefusedError` (``conflict`` for another seed, ``fingerprint``), and :class:`OSError` when the new
        owner cannot be written down: it must outlive this process, or two clients could hold one run.
        """
        if check_run_id(name) == ANONYMOUS_RUN:
            raise RefusedError(
                _es("«{run}» es el entrenamiento de los clientes que no dan nombre.").format(run=name),
                mend=_es("Usa otro nombre."),
                status=422,
            )
        if aside:
            self._set_aside(name, seed, aside)
        run = self._open.get(name) or self._load(name, seed, chain)
        if run.ledger.seed != seed:
            raise another_seed(name, run.ledger.seed, seed)
        before, file = run.ledger.owner, self.folder / name / RUN_FACTS_FILE
        begin = (self._written_facts(name) or {}).get("chain") or chain or first_chain(name, seed)
        try:
            facts = {"seed": seed, "owner": run.ledger.attach(owner), "chain": begin}
            write_json(file, {**facts, "sha256": _digest_of_facts(facts)})
        except OSError:
            run.ledger.owner = before
            raise
        self._attached[name] = seed, run.ledger.owner
        return run

    def get(self, name: str) -> Run:
        """A run that a client attached to in this process, from memory or its newest snapshot.

        Raises :class:`RefusedError` (``detached``) for any other.
        """
        if name not in self._attached:
            raise detached_run(name)
        run = self._open.get(name) or self._load(name, self._attached[name][0])
        self._open.move_to_end(name)
        return run

    def saved(self, name: str) -> Run:
        """A run to be asked and not changed: before a client is back, as its newest snapshot has it.

        Raises :class:`RefusedError` (``detached``) for one that is not known.
        """
        if name in self._attached:
            return self.get(name)
        if (standing := self.look(name)) is None:
            raise detached_run(name)
        return self._open.get(name) or self._load(name, standing.seed)

    def apply(self, claim: Claim, content: Batch | Feedback) -> tuple[bytes, bool]:
        """The answer of an event, and whether it is the stored one of an event applied before."""
        run = self.get(claim.run)
        stored = run.ledger.judge(claim)
        return (self._apply(run, claim, content), False) if stored is None else (stored, True)

    def apply_plain(self, time: str, digest: str, content: Batch | Feedback) -> bytes:
        """Apply what a client without a run sent, as the next event of :data:`ANONYMOUS_RUN`."""
        run = self.get(ANONYMOUS_RUN)
        ledger = run.ledger
        chain = next_chain(ledger.chain, digest)
        return self._apply(run, Claim(ledger.run, ledger.last_seq + 1, ledger.owner, time, digest, chain), content)

    def replace(self, name: str, owner: int, snapshot: Snapshot, chain: str = "") -> Run:
        """Put a state in the place of the run's, whose owner asks for it. The caller saves it.

        With ``chain`` the state may be of another kind of machine, and goes on here under that chain value.

        Raises :class:`RefusedError` (``fenced``, ``conflict``, ``fingerprint``, ``invalid``) with the run unchanged.
        """
        present = self.get(name).ledger
        present.check_owner(owner)
        run = self._restore(name, present.seed, snapshot, chain)
        run.ledger.owner = present.owner
        self._open[name] = run
        return run

    def saved_cards(self) -> list[Card]:
        """What the snapshots on the disk say of their runs, the one that was saved last at the end."""
        folders = [path for path in self.folder.glob("*") if path.is_dir() and path.suffix != ASIDE_SUFFIX]
        found = [(path.stat().st_mtime, Snapshots(path)) for path in folders]
        cards = []
        for _saved, snapshots in sorted(found, key=lambda pair: pair[0]):
            if (facts := snapshots.newest_facts()) is None:
                continue
            with suppress(RefusedError):
                ledger, statistics, _fingerprint = _read_run_facts(Snapshot(facts["seq"], facts, {}))
                cards.append(_card_of(ledger, statistics, self._clock()))
        return cards

    def due(self) -> list[Capture]:
        """Copies of the runs whose newest snapshot is too old; :meth:`save` writes them."""
        now = self._clock()
        return [
            self.capture(run)
            for run in self._open.values()
            if run.ledger.last_seq != run.captured_seq and now - run.captured >= self._snapshot_seconds
        ]

    def capture(self, run: Run) -> Capture:
        """A copy of a run, to be saved."""
        snapshot = run.snapshot()
        run.captured, run.captured_seq = self._clock(), run.ledger.last_seq
        self._captures += 1
        self._unwritten[run.ledger.run] = self._captures
        return Capture(run.ledger.run, self._captures, snapshot)

    def save(self, capture: Capture) -> None:
        """Write a copy to the disk, unless a later one has been written."""
        with self._disk:
            if capture.number > self._written.get(capture.run, 0):
                Snapshots(self.folder / capture.run).save(capture.snapshot)
                self._written[capture.run] = capture.number
                if self._unwritten.get(capture.run) == capture.number:
                    del self._unwritten[capture.run]

    def close(self) -> None:
        """Save and drop every run. Raises the first :class:`OSError`, after all were tried."""
        failures: list[OSError] = []
        while self._open:
            _name, run = self._open.popitem()
            try:
                self._save_changes(run)
            except OSError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _apply(self, run: Run, claim: Claim, content: Batch | Feedback) -> bytes:
        try:
            return run.apply(claim, content)
        except Exception as error:
            del self._open[claim.run]  # loaded again from its snapshot when it is next asked for
            _runs_log.exception("event %d of run %s failed; the run is loaded again", claim.seq, claim.run)
            raise RefusedError(
                _es("El evento {seq} falló a medias ({reason}); el trabajador vuelve a su última copia.").format(
                    seq=claim.seq, reason=" ".join(str(error).split())[:300] or type(error).__name__
                ),
                mend=_es("El cliente reenvía lo que falte; si se repite, mira el registro del trabajador."),
                status=503,
                code="restarted",
            ) from error

    def _set_aside(self, name: str, seed: int, chain: str) -> None:
        """Save a run and move its folder out of the way; of what was set aside the latest is kept."""
        standing = self.look(name)
        if standing is None:
            return
        if standing.seed != seed:
            raise another_seed(name, standing.seed, seed)
        if standing.chain != chain:
            raise RefusedError(
                _es("«{run}» ya no está donde estaba el estado que se quería apartar.").format(run=name),
                mend=_es("Repite la orden."),
                status=422,
                code="conflict",
            )
        if run := self._open.get(name):
            if run.ledger.last_seq:
                self.save(self.capture(run))  # the latest copy may not have reached the disk yet
            del self._open[name]
        self._attached[name] = seed, standing.owner
        folder, aside = self.folder / name, self.folder / f"{name}{ASIDE_SUFFIX}"
        with self._disk:
            self._written[name] = self._captures  # a copy of it that still waits for the writer is not written any more
            self._unwritten.pop(name, None)
            if not Snapshots(folder).folders():  # nothing was learned: what was set aside before is worth more
                shutil.rmtree(folder)
            else:
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            sync_folder(self.folder)

    def _written_facts(self, name: str) -> dict[str, Any] | None:
        """What ``run.json`` says of a run. One that is not as it was written is told, and counts as absent.

        What it says comes with the client, too; the state has its own sha256.
        """
        file = self.folder / name / RUN_FACTS_FILE
        facts = read_json(file) or {}
        if facts.pop("sha256", None) == _digest_of_facts(facts):
            return facts
        if file.exists():
            _runs_log.warning("%s is not as it was written and was passed over", file)
        return None

    def _load(self, name: str, seed: int, chain: str = "") -> Run:
        """Bring a run into memory: from its newest good snapshot, or new."""
        known = self._written_facts(name) or {}
        if known.get("seed", seed) != seed:
            raise another_seed(name, known["seed"], seed)
        with self._disk:
            snapshot, damaged = Snapshots(self.folder / name).newest()
        for folder in damaged:
            _runs_log.warning("snapshot %s does not verify and was passed over", folder)
        while len(self._open) >= self._in_memory:
            self._drop_oldest()
        if snapshot is None:
            ledger = Ledger(name, seed, chain=known.get("chain") or chain)
            run = Run(ledger, self._make_learner(seed), Statistics(), self._clock())
        else:
            run = self._restore(name, seed, snapshot)
        run.ledger.owner = max(run.ledger.owner, known.get("owner", 0), self._attached.get(name, (0, 0))[1])
        self._open[name] = run
        return run

    def _restore(self, name: str, seed: int, snapshot: Snapshot, chain: str = "") -> Run:
        """The run in a snapshot, when it is that run, of that seed, of a machine of this kind or under a new chain."""
        ledger, statistics, fingerprint = _read_run_facts(snapshot)
        if name == ANONYMOUS_RUN:
            seed = ledger.seed  # it makes no promise: whatever it was, it goes on, here too
        if (ledger.run, ledger.seed) != (name, seed):
            raise RefusedError(
                _es("El estado es de «{found}», semilla {seed}; se esperaba «{run}», semilla {expected}.").format(
                    found=ledger.run, seed=ledger.seed, run=name, expected=seed
                ),
                mend=_es("Usa el estado de ese entrenamiento."),
                status=422,
                code="conflict",
            )
        learner = self._make_learner(seed)
        if chain:
            ledger.chain = chain
        elif name != ANONYMOUS_RUN:
            _check_fingerprint(fingerprint, learner.fingerprint)
        try:
            learner.load(snapshot.tensors)
        except (WorkerError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise _unfit_state() from error
        return Run(ledger, learner, statistics, self._clock())

    def _drop_oldest(self) -> None:
        name, run = self._open.popitem(last=False)
        try:
            self._save_changes(run)
        except OSError:
            _runs_log.exception("run %s could not be saved; its client replays from the last snapshot", name)

    def _save_changes(self, run: Run) -> None:
        """Save a run whose latest state is not on the disk: it changed since its copy was made, or that failed."""
        if run.ledger.last_seq != run.captured_seq or run.ledger.run in self._unwritten:
            self.save(self.capture(run))


def _digest_of_facts(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _card_of(ledger: Ledger, statistics: Statistics, opened: float) -> Card:
    return Card(ledger.run, ledger.last_seq, opened, statistics.summary(), statistics.trend())


def _read_run_facts(snapshot: Snapshot) -> tuple[Ledger, Statistics, dict[str, str]]:
    """Ledger, statistics and fingerprint of a snapshot; :class:`RefusedError` when they are not of their types."""
    try:
        ledger = Ledger.from_json(snapshot.facts["ledger"])
        statistics = Statistics(**snapshot.facts["statistics"])
        fingerprint = snapshot.facts["fingerprint"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unfit_state() from error
    alike = [(ledger, Ledger("x", 0, chain="x")), (statistics, Statistics())]
    fits = all(type(value) is type(vars(model)[name]) for found, model in alike for name, value in vars(found).items())
    if not (fits and isinstance(fingerprint, dict) and all(isinstance(loss, float) for loss in statistics.losses)):
        raise _unfit_state()
    counts = [ledger.owner, *(count for count in vars(statistics).values() if isinstance(count, int))]
    if ledger.last_seq != snapshot.seq or not all(0 <= count <= MAX_COUNT for count in counts):
        raise _unfit_state()
    return ledger, statistics, fingerprint


def _lesson_answer(lesson: Lesson, size: int, time: str) -> bytes:
    content = {
        "status": "trained",
        "loss": lesson.loss,
        "anomaly_prob": lesson.anomaly_prob,
        "dendrites": lesson.dendrites,
        "coherence": lesson.coherence,
        "batch_size": size,
        "outputs": {
            "anomaly_prob": lesson.anomaly_prob,
            "dendrite_adjustments": lesson.dendrites,
            "coherence_state": lesson.coherence,
        },
        "capa_info": {
            f"capa{layer}_activations": value for layer, value in zip((2, 3, 4), lesson.activations, strict=True)
        },
        "timestamp": time,
        "anomalias": lesson.anomalies,
        "objetivos": lesson.objectives,
    }
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def _feedback_answer(feedback: Feedback, statistics: Statistics, time: str) -> bytes:
    content = {
        "status": "feedback_recibido",
        "validacion": feedback.validated,
        "timestamp": time,
        "estadisticas": statistics.summary(),
    }
    return orjson.dumps(content)


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 0.0


def _tendency(losses: list[float]) -> str:
    """Whether the later half of the losses lies below the earlier one, above it, or within one part in a hundred."""
    half = len(losses) // 2
    if not half:
        return "estable"
    earlier, later = sum(losses[:half]) / half, sum(losses[-half:]) / half
    if abs(later - earlier) <= STEADY_SHARE * abs(earlier):
        return "estable"
    return "mejorando" if later < earlier else "empeorando"


def _check_fingerprint(found: dict[str, str], expected: dict[str, str]) -> None:
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise RefusedError(
            _es("El estado es de otra clase de máquina: {differences}.").format(
                differences=", ".join(f"{name} {found.get(name)} → {expected.get(name)}" for name in differing)
            ),
            mend=_es(
                "Sigue en una máquina como la anterior, empieza otro entrenamiento, o da --rebase: aparta ese estado y "
                "sigue desde la última copia del PC con los números de esta máquina."
            ),
            status=409,
            code="fingerprint",
        )


def detached_run(name: str) -> RefusedError:
    """The refusal of a run that nobody attached to in this process."""
    return RefusedError(
        _es("Este trabajador acaba de arrancar y aún no tiene «{run}».").format(run=name[:80]),
        mend=_es("El cliente se presenta otra vez con POST /run y reenvía lo que falte."),
        status=409,
        code="detached",
    )


def _unfit_state() -> RefusedError:
    return RefusedError(
        _es("El estado no es de la red de este trabajador."),
        mend=_es("Usa la misma versión en los dos lados."),
        status=422,
        code="conflict",
    )


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/openapi.py
#
# What OpenAPI says of the worker: every request, every answer, with an example of each.
# ----------------------------------------------------------------------------------------------------------------------

RUN_SCHEMA = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"}
SHA256_SCHEMA = {"type": "string", "pattern": "^[0-9a-f]{64}$"}

_SOME = frozenset({409, 422, 503})
"""Statuses that only some endpoints have."""
_OPEN = frozenset({"fingerprint", "state_fingerprint", "objetivos"})
"""Objects whose keys differ from machine to machine, or that may be empty."""

_JsonSchema = dict[str, Any]


def describe_api(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI document."""
    content = get_openapi(title=api.title, version=api.version, routes=api.routes, description=_api_description())
    error = {"status": "error", "error": "…", "help": "…", "code": "invalid"}
    content["components"] = {
        "schemas": {"Error": _schema_like(error)},
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    }
    content["security"] = [{"token": []}]
    return content


def _api_description() -> str:
    return _es(
        "OMEGA 21 aprende de lotes de vectores de 1600 números. Los clientes que quieren que cada lote se aplique una "
        "sola vez abren un entrenamiento con POST /run y numeran sus peticiones con las cabeceras Sheily-Run, "
        "Sheily-Seq, Sheily-Owner, Sheily-Time, Sheily-Digest y Sheily-Chain, todas o ninguna. "
        "Quien no las envía es atendido sin esa promesa."
    )


def describe_operations() -> dict[str, dict[str, Any]]:
    """What OpenAPI says of each endpoint, by the name of its function."""
    batch = _two_forms(_batch_schema(), {"samples": [{"input_data": [0.0] * VECTOR, "anomaly_label": 0}], "epochs": 1})
    feedback = _two_forms(_feedback_schema(), {"ajustes_aplicados": [0.0] * DENDRITES, "validacion": True})
    attachment = _one_form(JSON_FORM, _attachment_schema(), {"run": "principal", "seed": 0, "owner": 0})
    state = {"type": "string", "format": "binary"}
    named, of_run = (
        [_header_parameter(RUN_HEADER, RUN_SCHEMA, required=False)],
        _header_parameter(RUN_HEADER, RUN_SCHEMA),
    )
    by_owner = [
        of_run,
        _header_parameter(OWNER_HEADER, {"type": "integer", "minimum": 0, "maximum": MAX_OWNER}),
        _header_parameter(DIGEST_HEADER, SHA256_SCHEMA),
        _header_parameter(REBASE_HEADER, SHA256_SCHEMA, required=False),
    ]
    answers = {
        name: _one_form(JSON_FORM, _schema_like(example), example) for name, example in _sample_answers().items()
    }
    state_file = _one_form(BINARY_FORM, state)
    by_name, by_model, by_history = (409,), (409, 503), (409, 422, 503)
    return {
        "train": _operation(_es("Aprende de un lote"), answers["train"], body=batch, refusals=by_history),
        "feedback": _operation(
            _es("Aprende de lo que dieron los ajustes dendríticos de un lote"),
            answers["feedback"],
            body=feedback,
            refusals=by_history,
        ),
        "predict": _operation(
            _es("Juzga vectores sin aprender de ellos"), answers["predict"], body=batch, headers=named, refusals=by_model
        ),
        "status": _operation(_es("Lo aprendido hasta ahora"), answers["status"], headers=named, refusals=by_name),
        "health": {**_operation(_es("Si el trabajador vive"), answers["health"]), "security": []},
        "info": _operation(_es("Cómo es la red"), answers["info"], headers=named, refusals=by_model),
        "diagnose": _operation(
            _es("Pasa un vector de prueba por la red"), answers["diagnose"], headers=named, refusals=by_model
        ),
        "metricas": _operation(
            _es("Las últimas pérdidas y hacia dónde van"), answers["metricas"], headers=named, refusals=by_name
        ),
        "look": _operation(
            _es("Dónde está un entrenamiento; ni lo toma ni cambia nada"),
            answers["look"],
            headers=[of_run],
            refusals=(422, 503),
        ),
        "attach": _operation(
            _es("Toma o empieza un entrenamiento"), answers["attach"], body=attachment, refusals=by_history
        ),
        "download": _operation(
            _es("El estado entero de un entrenamiento"), state_file, headers=[of_run], refusals=by_model
        ),
        "upload": _operation(
            _es("Pone un estado descargado en el lugar del propio"),
            answers["upload"],
            body=state_file,
            headers=by_owner,
            refusals=by_history,
        ),
        "prometheus": _operation(_es("Los contadores, para Prometheus"), _one_form("text/plain", {"type": "string"})),
    }


def _batch_schema() -> _JsonSchema:
    value = {"type": "number", "minimum": -MAX_MAGNITUDE, "maximum": MAX_MAGNITUDE}
    sample = {
        "type": "object",
        "properties": {
            "input_data": _list_schema(value, VECTOR, VECTOR),
            "anomaly_label": {"enum": [0, 1, NO_LABEL, None]},
        },
        "required": ["input_data"],
    }
    epochs = {"type": "integer", "minimum": 1, "maximum": MAX_EPOCHS}
    properties = {"samples": _list_schema(sample, 1, MAX_SAMPLES), "epochs": epochs}
    return {"type": "object", "properties": properties, "required": ["samples"]}


def _feedback_schema() -> _JsonSchema:
    adjustment = {"type": "number", "minimum": -1, "maximum": 1}
    properties = {
        "ajustes_aplicados": _list_schema(adjustment, DENDRITES, DENDRITES),
        "validacion": {"type": "boolean"},
        "timestamp": {},
    }
    return {"type": "object", "properties": properties, "required": ["ajustes_aplicados", "validacion"]}


def _attachment_schema() -> _JsonSchema:
    properties = {
        "run": {**RUN_SCHEMA, "not": {"const": ANONYMOUS_RUN}},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED, "default": 0},
        "owner": {"type": "integer", "minimum": 0, "maximum": MAX_OWNER, "default": 0},
        "chain": {**SHA256_SCHEMA, "description": _es("La cadena antes del primer evento, si es nuevo.")},
        "rebase": {**SHA256_SCHEMA, "description": _es("La cadena del estado del trabajador que se aparta.")},
    }
    return {"type": "object", "properties": properties, "required": ["run"]}


def _list_schema(items: _JsonSchema, least: int, most: int) -> _JsonSchema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _sample_answers() -> dict[str, Any]:
    """An answer of each endpoint, by the name of its function; the schemas follow from them."""
    moment, chain = "2026-01-31T12:00:00+00:00", "0" * 64
    dendrites, coherence = [0.1] * DENDRITES, [0.1] * COHERENCE
    machine = {"tiempo_transcurrido_seg": 12.5, "dispositivo": "cuda", "gpu_memoria_mb": 420.5}
    shapes = {"anomaly": [1], "dendrites": [1, DENDRITES], "coherence": [1, COHERENCE]}
    place = {
        "status": "ok",
        "run": "principal",
        "seed": 0,
        "owner": 1,
        "last_seq": 0,
        "chain": chain,
        "fingerprint": {"device": "cuda"},
        "boot": "0" * 16,
        "protocol": PROTOCOL,
        "max_samples": MAX_SAMPLES,
        "queue": 8,
    }
    return {
        "train": {
            "status": "trained",
            "loss": 0.23,
            "anomaly_prob": 0.45,
            "dendrites": dendrites,
            "coherence": coherence,
            "batch_size": 64,
            "outputs": {"anomaly_prob": 0.45, "dendrite_adjustments": dendrites, "coherence_state": coherence},
            "capa_info": {"capa2_activations": 0.5, "capa3_activations": 0.5, "capa4_activations": 0.5},
            "timestamp": moment,
            "anomalias": 6,
            "objetivos": {},
        },
        "feedback": {
            "status": "feedback_recibido",
            "validacion": True,
            "timestamp": moment,
            "estadisticas": Statistics().summary(),
        },
        "predict": {"status": "ok", "anomaly_prob": [0.02], "threshold": 0.5},
        "status": {
            "status": "online",
            "modelo": MODEL_NAME,
            "estadisticas": {**Statistics().summary(), **machine},
            "torch_version": "2.10.0",
            "cuda_available": True,
        },
        "health": {"alive": True, "timestamp": moment, "uptime_seconds": 12.5},
        "info": describe_network(12_000_000, 12_000_000),
        "diagnose": {
            "status": "diagnostico_ok",
            "test_input_shape": [1, VECTOR],
            "outputs_shapes": shapes,
            "gpu_info": {"cuda": True, "device": "cuda"},
        },
        "metricas": {**Statistics().trend(), "ultimos_20_losses": [0.23]},
        "look": {**place, "known": True, "state_fingerprint": {"device": "cuda"}},
        "attach": place,
        "upload": {"status": "ok", "last_seq": 7, "chain": chain},
    }


def _schema_like(example: Any) -> _JsonSchema:
    """The schema of values like this one; objects may hold more."""
    if isinstance(example, dict):
        properties = {
            name: {"type": "object"} if name in _OPEN else _schema_like(value) for name, value in example.items()
        }
        return {"type": "object", "properties": properties, "required": list(properties)}
    if isinstance(example, list):
        return {"type": "array", "items": _schema_like(example[0])}
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return {"type": kinds[type(example)]}


def _one_form(form: str, schema: _JsonSchema, example: Any = None) -> dict[str, Any]:
    """A body, or an answer, of one media type."""
    return {form: {"schema": schema} if example is None else {"schema": schema, "example": example}}


def _two_forms(schema: _JsonSchema, example: dict[str, Any]) -> dict[str, Any]:
    """A body that may come as JSON or as safetensors."""
    binary = {"type": "string", "format": "binary", "description": _es("Los mismos datos como archivo safetensors.")}
    return {**_one_form(JSON_FORM, schema, example), **_one_form(BINARY_FORM, binary)}


def _header_parameter(name: str, schema: _JsonSchema, *, required: bool = True) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": required, "schema": schema}


def _operation(
    summary: str,
    answer: dict[str, Any],
    *,
    body: dict[str, Any] | None = None,
    headers: list[dict[str, Any]] | None = None,
    refusals: tuple[int, ...] = (),
) -> dict[str, Any]:
    """What OpenAPI says of one endpoint; ``refusals`` are those that not every endpoint has."""
    error = _one_form(JSON_FORM, {"$ref": "#/components/schemas/Error"})
    refused = {
        status: {"description": meaning, "content": error}
        for status, meaning in _refusals().items()
        if status in refusals or status not in _SOME
    }
    content: dict[str, Any] = {
        "summary": summary,
        "responses": {200: {"description": _es("Hecho."), "content": answer}, **refused},
    }
    if body:
        content["requestBody"] = {"content": body, "required": True}
    if headers:
        content["parameters"] = headers
    return content


def _refusals() -> dict[int, str]:
    """Every status of an error, and what it means; after a 4xx nothing has changed."""
    return {
        400: _es("La petición no vale."),
        401: _es("Falta el token, o es otro."),
        403: _es("Una página de otro sitio, a un trabajador sin token."),
        408: _es("El cuerpo no llegó a tiempo."),
        409: _es("El trabajador no está donde el cliente cree: «code» dice por qué."),
        413: _es("El cuerpo, o el lote, es demasiado grande."),
        415: _es("El cuerpo viene comprimido, o es de otro tipo."),
        422: _es("No es la historia, la semilla o la red de este entrenamiento."),
        429: _es("Esperan demasiadas peticiones, o llegaron demasiados tokens equivocados."),
        500: _es("El trabajador falló; su registro dice por qué."),
        503: _es("El trabajador se para, vuelve a su última copia o no puede escribir: repite la petición."),
    }


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/turns.py
#
# The order in which a run's events are applied, though their requests come over several connections.
# ----------------------------------------------------------------------------------------------------------------------

REORDER_WINDOW = 16


class RunTurns:
    """The order in which one run's events reach the learner thread: one that came early waits for those before it."""

    def __init__(self, last: int, owner: int) -> None:
        self._moved = asyncio.Event()
        self.restart(last, owner)

    def restart(self, last: int, owner: int) -> None:
        """A client attached, or the state was replaced: ``last`` is the last event applied."""
        self._last, self._owner = last, owner
        self._wake()

    async def wait(self, claim: Claim, seconds: float) -> None:
        """Return when it is the event's turn, or waiting is no use: the ledger then says why it is refused."""
        if claim.seq > self._last + REORDER_WINDOW:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while claim.owner == self._owner and claim.seq > self._last + 1:
                    await self._moved.wait()

    def passed(self, claim: Claim) -> None:
        """The event is queued, or applied: the next one may follow."""
        if claim.owner == self._owner and claim.seq > self._last:
            self._last = claim.seq
            self._wake()

    def fall_back(self, claim: Claim, last: int) -> None:
        """The event was refused; ``last`` is the last one applied by then. Those queued since move on by themselves."""
        if claim.owner == self._owner:
            self._last = last

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/worker.py
#
# The worker: OMEGA 21's learner behind HTTP.
#
#     event loop       reads requests, checks them, puts a run's events in order, answers from cards
#     learner thread   one; owns every run; a bounded queue stands before it, and 429 is the answer when that is full
#     writer thread    one; writes snapshots from copies
#
# Requests that a model must answer go through the queue; ``/health``, ``/status`` and ``/metricas`` never do. Every error
# is a JSON object with ``status``, ``error``, ``help`` and ``code``.
# ----------------------------------------------------------------------------------------------------------------------

REPLAYED_HEADER = "Sheily-Replayed"
STATE_PIECE = 1024 * 1024

_worker_log = logging.getLogger("sheily_train.colab.worker")
_Asked = TypeVar("_Asked")


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker is set up."""

    state_dir: Path
    """Where its runs' snapshots lie; nothing is written elsewhere."""
    token: str | None = None
    """What clients must show; ``None`` asks for nothing and is for loopback only."""
    seed: int = 0
    """The seed of the run of clients that name none."""
    device: str = "auto"
    """Where the network computes: auto, cpu or cuda."""
    queue: int = 8
    """How many requests may wait for the learner."""
    runs_in_memory: int = 4
    """How many runs may be in memory at once."""
    snapshot_seconds: float = 45.0
    """How old a run's newest snapshot may become while it trains."""
    reorder_seconds: float = 10.0
    """How long an event that came early waits for the one before it."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(
                _es("La semilla es {found}; se esperaba de 0 a {limit}.").format(found=self.seed, limit=MAX_SEED)
            )
        if min(self.queue, self.runs_in_memory) < 1:
            raise RequestError(_es("La cola y los entrenamientos en memoria son al menos 1."))


class WorkerApp:
    """The ASGI app of a worker. A server closes it by ASGI's lifespan; who calls it otherwise calls :meth:`close`."""

    def __init__(self, settings: WorkerSettings, learner_factory: Callable[[int, str], Learner]) -> None:
        self._worker = OmegaWorker(settings, learner_factory)
        self._app = Guard(_build_api(self._worker), settings.token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        await self._app(scope, receive, send)

    def warm_up(self) -> None:
        """Do once what is slow the first time: libraries, kernels, CUDA's context. Raises what a learner raises."""
        self._worker.warm_up()

    def close(self) -> None:
        """Finish what is queued, save every run and stop. Again: nothing.

        Raises :class:`OSError` when a run could not be saved.
        """
        self._worker.close()


def create_app(settings: WorkerSettings, learner_factory: Callable[[int, str], Learner] = Learner) -> WorkerApp:
    """A worker's ASGI app; it loads no model before the first request that needs one.

    Args:
        settings: how it is set up.
        learner_factory: a fresh learner for a seed and a device.
    """
    return WorkerApp(settings, learner_factory)


class WorkerMeters:
    """What ``GET /metrics`` tells Prometheus."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.events = Counter("sheily_events", "Events applied", ["kind"], registry=self.registry)
        self.vectors = Counter("sheily_vectors", "Vectors learned from", registry=self.registry)
        self.replayed = Counter("sheily_replayed", "Stored answers given again", registry=self.registry)
        self.refused = Counter("sheily_refused", "Requests refused", ["code"], registry=self.registry)
        self.seconds = Histogram("sheily_event_seconds", "Seconds to apply an event", registry=self.registry)
        self.snapshots = Counter("sheily_snapshots", "Snapshots", ["outcome"], registry=self.registry)
        depth = Gauge("sheily_queue", "Requests that wait for the learner", registry=self.registry)
        depth.set_function(waiting)


class OmegaWorker:
    """What the endpoints share: the runs and their thread, and the cards that answer without them."""

    def __init__(self, settings: WorkerSettings, learner_factory: Callable[[int, str], Learner]) -> None:
        self._settings = settings
        self._factory = learner_factory
        self._boot = secrets.token_hex(8)
        self._started = time.monotonic()
        self._thread = LearnerThread(settings.queue)
        self._writer = ThreadPoolExecutor(1, "sheily-writer")
        self._writing: Future[None] | None = None
        self._runs = Runs(
            settings.state_dir / "runs",
            self._make_learner,
            seed=settings.seed,
            in_memory=settings.runs_in_memory,
            snapshot_seconds=settings.snapshot_seconds,
        )
        self._turns: dict[str, RunTurns] = {}
        self._cards = {card.run: card for card in self._runs.saved_cards()}
        self._latest = next(reversed(self._cards), ANONYMOUS_RUN)
        self._device = _expected_device(settings.device)
        self._parameters: tuple[int, int] | None = None
        self._fingerprint: dict[str, str] | None = None
        self._meters = WorkerMeters(lambda: self._thread.waiting)
        self._closed = False

    def warm_up(self) -> None:
        """Teach a learner that is thrown away one vector, on the learner thread.

        A second thread that computes would have a pool of OpenMP threads of its own; two pools on few cores go to sleep
        between any two steps, which costs a third of the speed.
        """
        batch = make_batch(np.zeros((1, VECTOR), np.float32))
        self._thread.submit(lambda: self._make_learner(0).train(batch, 0)).result()

    def close(self) -> None:
        """Finish what is queued, save every run and stop."""
        if self._closed:
            return
        self._closed = True
        self._thread.close()
        self._writer.shutdown()
        self._runs.close()

    # The endpoints

    async def train(self, request: Request) -> Response:
        """Learn from a batch."""
        return await self._event(request, Kind.TRAIN)

    async def feedback(self, request: Request) -> Response:
        """Learn what came of a batch's dendrite adjustments."""
        return await self._event(request, Kind.FEEDBACK)

    async def predict(self, request: Request) -> Response:
        """Judge vectors without learning; labels are not needed."""
        form, run = body_form(request), self._asked_run(request)
        content = await asyncio.to_thread(read_content, Kind.TRAIN, form, await whole_body(request))
        assert isinstance(content, Batch)  # noqa: S101
        prediction = await self._ask(lambda: run().learner.predict(content.input_data))
        return json_answer({"status": "ok", "anomaly_prob": prediction.anomaly_prob, "threshold": prediction.threshold})

    async def status(self, request: Request) -> Response:
        """What has been learned so far."""
        card = self._card(self._named_run(request))
        machine = {
            "tiempo_transcurrido_seg": time.monotonic() - card.opened,
            "dispositivo": self._device,
            "gpu_memoria_mb": _gpu_megabytes(),
        }
        return json_answer(
            {
                "status": "online",
                "modelo": MODEL_NAME,
                "estadisticas": {**card.summary, **machine},
                "torch_version": str(torch.__version__),
                "cuda_available": torch.cuda.is_available(),
            }
        )

    async def metricas(self, request: Request) -> Response:
        """The latest losses and where they go."""
        return json_answer(self._card(self._named_run(request)).trend)

    async def health(self, _request: Request) -> Response:
        """Whether the worker lives."""
        return json_answer(
            {"alive": True, "timestamp": _now_text(), "uptime_seconds": time.monotonic() - self._started}
        )

    async def info(self, request: Request) -> Response:
        """The network's build."""
        run = self._asked_run(request)
        if self._parameters is None:
            await self._ask(run)
        return json_answer(describe_network(*(self._parameters or (0, 0))))

    async def diagnose(self, request: Request) -> Response:
        """Pass a test vector through the network."""
        run, test_NV = self._asked_run(request), np.zeros((1, VECTOR), np.float32)
        prediction: Prediction = await self._ask(lambda: run().learner.predict(test_NV))
        return json_answer(
            {
                "status": "diagnostico_ok",
                "test_input_shape": list(test_NV.shape),
                "outputs_shapes": {
                    "anomaly": list(prediction.anomaly_prob.shape),
                    "dendrites": list(prediction.dendrites.shape),
                    "coherence": list(prediction.coherence.shape),
                },
                "gpu_info": {"cuda": torch.cuda.is_available(), "device": self._device},
            }
        )

    async def look(self, request: Request) -> Response:
        """Where a run stands; nothing is taken or changed."""
        return json_answer(await self._ask(partial(self._look_now, required_run(request))))

    async def attach(self, request: Request) -> Response:
        """Take a run over, as its new owner; a name that is new begins a run."""
        body, digest = await whole_body(request), request.headers.get(DIGEST_HEADER)
        if digest is not None and sha256_of(body) != digest:
            raise damaged_body()
        asked = read_run_request(body_form(request), body)
        content = await self._ask(partial(self._attach_now, asked))
        turns = self._turns.setdefault(asked.run, RunTurns(0, 0))
        turns.restart(content["last_seq"], content["owner"])
        return json_answer(content)

    async def download(self, request: Request) -> Response:
        """The whole state of a run, as it is right now."""
        name = required_run(request)
        snapshot = await self._ask(lambda: self._runs.get(name).snapshot())
        content, digest = await asyncio.to_thread(_pack_with_digest, snapshot)
        headers = {SEQ_HEADER: str(snapshot.seq), DIGEST_HEADER: digest, "Content-Length": str(len(content))}
        return StreamingResponse(_in_pieces(content), headers=headers, media_type=BINARY_FORM)

    async def upload(self, request: Request) -> Response:
        """Put a state that was downloaded in the place of a run's own."""
        name, owner, digest = required_run(request), required_owner(request), request.headers.get(DIGEST_HEADER)
        chain = rebase_chain(request)
        if body_form(request) != BINARY_FORM:
            raise unknown_form(BINARY_FORM)
        body = await whole_body(request)
        if await asyncio.to_thread(sha256_of, body) != digest:
            raise damaged_body()
        snapshot = await asyncio.to_thread(unpack_snapshot, body)
        ledger, capture = await self._ask(partial(self._replace_now, name, owner, snapshot, chain))
        await asyncio.wrap_future(self._writer.submit(self._write, capture, True))
        self._turns.setdefault(name, RunTurns(0, 0)).restart(snapshot.seq, owner)
        return json_answer({"status": "ok", "last_seq": ledger.last_seq, "chain": ledger.chain})

    async def prometheus(self, _request: Request) -> Response:
        """The worker's meters."""
        return Response(generate_latest(self._meters.registry), media_type=CONTENT_TYPE_LATEST)

    def refuse(self, error: RefusedError) -> Response:
        """The answer that an error becomes."""
        self._meters.refused.labels(error.code).inc()
        return error_answer(error)

    # Events

    async def _event(self, request: Request, kind: Kind) -> Response:
        claim = Claim.from_headers(request.headers)
        form = body_form(request)
        body = await whole_body(request)
        event = Event(claim.seq if claim else 0, kind, claim.time if claim else _now_text(), form, body)
        digest, content = await asyncio.to_thread(read_event, event, claim.digest if claim else None)
        if claim is None:
            answer = await self._ask(partial(self._apply_plain_now, event.time, digest, content))
            return Response(answer, media_type=JSON_FORM)
        if turns := self._turns.get(claim.run):
            await turns.wait(claim, self._settings.reorder_seconds)
        future = self._thread.submit(partial(self._apply_now, claim, content))
        if turns:
            turns.passed(claim)
        try:
            answer, replayed = await asyncio.wrap_future(future)
        except RefusedError:
            if turns:
                turns.fall_back(claim, self._cards[claim.run].last_seq)
            raise
        if turns:
            turns.passed(claim)
        return Response(answer, media_type=JSON_FORM, headers={REPLAYED_HEADER: "1"} if replayed else None)

    async def _ask(self, work: Callable[[], _Asked]) -> _Asked:
        """The result of some work on the learner thread."""
        return await asyncio.wrap_future(self._thread.submit(work))

    def _named_run(self, request: Request) -> str:
        """The run that a request names, or the one that trained last."""
        name = request.headers.get(RUN_HEADER)
        return self._latest if name is None else check_run_id(name)

    def _asked_run(self, request: Request) -> Callable[[], Run]:
        """What gives, on the learner thread, the run that a request is about; one that it names must be attached."""
        return partial(self._runs.get if RUN_HEADER in request.headers else self._runs.saved, self._named_run(request))

    def _card(self, name: str) -> Card:
        if name in self._cards:
            return self._cards[name]
        if name == ANONYMOUS_RUN:
            return Card(name, 0, self._started, Statistics().summary(), Statistics().trend())
        raise detached_run(name)

    # On the learner thread

    def _make_learner(self, seed: int) -> Learner:
        learner = self._factory(seed, self._settings.device)
        self._device = learner.fingerprint.get("device", self._device)
        self._parameters = learner.parameter_counts
        self._fingerprint = learner.fingerprint
        return learner

    def _apply_now(self, claim: Claim, content: Batch | Feedback) -> tuple[bytes, bool]:
        with self._meters.seconds.time():
            answer, replayed = self._runs.apply(claim, content)
        if replayed:
            self._meters.replayed.inc()
        else:
            self._note_event(claim.run, content)
        return answer, replayed

    def _apply_plain_now(self, time_text: str, digest: str, content: Batch | Feedback) -> bytes:
        with self._meters.seconds.time():
            answer = self._runs.apply_plain(time_text, digest, content)
        self._note_event(ANONYMOUS_RUN, content)
        return answer

    def _note_event(self, name: str, content: Batch | Feedback) -> None:
        """What follows an event: its run's card, the meters, a snapshot when one is due."""
        self._publish(self._runs.get(name))
        self._latest = name
        self._meters.events.labels("train" if isinstance(content, Batch) else "feedback").inc()
        self._meters.vectors.inc(len(content) if isinstance(content, Batch) else 0)
        self._save_due()

    def _save_due(self) -> None:
        """Hand the snapshots that are due to the writer; the event that led here stays good if that fails."""
        try:
            if self._writing is None or self._writing.done():
                for capture in self._runs.due():
                    self._writing = self._writer.submit(self._write, capture)
        except Exception:
            self._meters.snapshots.labels("failed").inc()
            _worker_log.exception("a snapshot could not be taken")

    def _look_now(self, name: str) -> dict[str, Any]:
        standing = self._runs.look(name)
        fingerprint = self._fingerprint or self._make_learner(0).fingerprint
        known = standing or Standing(0, 0, 0, "", None)
        return {
            **self._place(name, known, fingerprint),
            "known": standing is not None,
            "state_fingerprint": known.fingerprint or {},
        }

    def _attach_now(self, asked: RunRequest) -> dict[str, Any]:
        try:
            run = self._runs.attach(asked.run, asked.seed, asked.owner, chain=asked.chain, aside=asked.rebase)
        except OSError as error:
            raise _no_storage(error) from error
        self._publish(run)
        return self._place(asked.run, run.ledger, run.learner.fingerprint)

    def _place(self, name: str, run: Standing | Ledger, fingerprint: dict[str, str]) -> dict[str, Any]:
        """What a client is told of a run and of this worker."""
        return {
            "status": "ok",
            "run": name,
            "seed": run.seed,
            "owner": run.owner,
            "last_seq": run.last_seq,
            "chain": run.chain,
            "fingerprint": fingerprint,
            "boot": self._boot,
            "protocol": PROTOCOL,
            "max_samples": MAX_SAMPLES,
            "queue": self._settings.queue,
        }

    def _replace_now(self, name: str, owner: int, snapshot: Snapshot, chain: str) -> tuple[Ledger, Capture]:
        run = self._runs.replace(name, owner, snapshot, chain)
        self._publish(run)
        return run.ledger, self._runs.capture(run)

    def _publish(self, run: Run) -> None:
        self._cards[run.ledger.run] = run.card()

    # On the writer thread

    def _write(self, capture: Capture, must: bool = False) -> None:
        """Write a snapshot; one that cannot be written is noted, unless somebody waits for it."""
        try:
            self._runs.save(capture)
            self._meters.snapshots.labels("saved").inc()
        except OSError as error:
            self._meters.snapshots.labels("failed").inc()
            _worker_log.exception("snapshot of run %s could not be written", capture.run)
            if must:
                raise _no_storage(error) from error


def _no_storage(error: OSError) -> RefusedError:
    return RefusedError(
        _es("El trabajador no pudo escribir en su disco: {reason}.").format(reason=error.strerror or error),
        mend=_es("Libera espacio en su carpeta de estado."),
        status=503,
        code="storage",
        retry_after=5,
    )


def _pack_with_digest(snapshot: Snapshot) -> tuple[bytes, str]:
    content = pack_snapshot(snapshot)
    return content, sha256_of(content)


async def _in_pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), STATE_PIECE):
        yield content[start : start + STATE_PIECE]


def _now_text() -> str:
    return datetime.now(UTC).isoformat()


def _expected_device(device: str) -> str:
    """The device's name before the first learner tells it."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _gpu_megabytes() -> float:
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


# The API


def _build_api(worker: OmegaWorker) -> FastAPI:
    """The endpoints, without the guard before them."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    async def refused(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)  # noqa: S101
        return worker.refuse(error)

    async def by_framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101
        path = request.scope["path"]
        answer = worker.refuse(http_error_answer(error, path))
        methods = [method for method, known, _endpoint in _routes_of(worker) if known == path]
        answer.headers.update({"Allow": ", ".join(methods)} if methods else error.headers or {})
        return answer

    async def explained(_request: Request, error: Exception) -> Response:
        assert isinstance(error, SheilyError)  # noqa: S101
        return worker.refuse(RefusedError(error.message, mend=error.mend, status=500, code="worker"))

    async def unexpected(_request: Request, _error: Exception) -> Response:
        message, mend = _es("Fallo inesperado del trabajador."), _es("La causa está en su registro.")
        return worker.refuse(RefusedError(message, mend=mend, status=500, code="internal"))

    api = FastAPI(
        title="OMEGA 21",
        version=MODEL_VERSION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers={
            RefusedError: refused,
            SheilyError: explained,
            HTTPException: by_framework,
            Exception: unexpected,
        },
    )
    operations = describe_operations()
    for method, path, endpoint in _routes_of(worker):
        description = operations[endpoint.__name__]
        api.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_class=Response,
            operation_id=endpoint.__name__,
            summary=description.pop("summary"),
            responses=description.pop("responses"),
            openapi_extra=description,
        )
    api.add_api_route("/docs", _docs_page, methods=["GET", "HEAD"], include_in_schema=False)
    api.openapi = cache(partial(describe_api, api))  # type: ignore[method-assign]  # nobody may ask for it
    return api


def _routes_of(worker: OmegaWorker) -> list[tuple[str, str, Callable[[Request], Any]]]:
    """Every endpoint: method, path and function."""
    return [
        ("POST", "/train_layer2", worker.train),
        ("POST", "/feedback_dendritas", worker.feedback),
        ("POST", "/predict", worker.predict),
        ("GET", "/status", worker.status),
        ("GET", "/health", worker.health),
        ("GET", "/info", worker.info),
        ("POST", "/diagnostico", worker.diagnose),
        ("GET", "/metricas", worker.metricas),
        ("GET", "/run", worker.look),
        ("POST", "/run", worker.attach),
        ("GET", "/state", worker.download),
        ("PUT", "/state", worker.upload),
        ("GET", "/metrics", worker.prometheus),
    ]


async def _docs_page() -> Response:
    return HTMLResponse(DOCS_PAGE)


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/colab/serve.py
#
# A worker put on the net: its folder locked, its token made, its port open, its address shown, its end in good order.
#
# The server always runs in a thread of its own with a loop of its own, so that it starts as well beside a running loop
# (a Colab cell); in a terminal the main thread only waits for a signal.
# ----------------------------------------------------------------------------------------------------------------------

DEFAULT_PORT = 8000
TOKEN_VARIABLE = "SHEILY_WORKER_TOKEN"  # noqa: S105
TOKEN_FILE = "token"  # noqa: S105
LOCK_FILE = ".lock"

_HEAD_SECONDS = 10.0
_HEAD_BYTES = 32 * 1024
_IDLE_SECONDS = 75
_LAST_ANSWERS_SECONDS = 30
_REOPEN_SECONDS = 5.0

Notify = Callable[[str], None]


class BackgroundWorker:
    """A worker that answers in a thread of its own.

    Attributes:
        address: what a client needs: the URL, with the token in its fragment.
    """

    def __init__(self, address: str, server: _ServerThread, resources: ExitStack) -> None:
        self.address = address
        self._server = server
        self._resources = resources
        atexit.register(self.stop)

    @property
    def running(self) -> bool:
        """Whether it still answers."""
        return self._server.is_alive()

    def stop(self) -> None:
        """Finish the answers in hand, save the state and free port, tunnel and folder. Again: nothing.

        Raises :class:`SheilyError` when the state could not be saved.
        """
        atexit.unregister(self.stop)
        self._resources.close()


def serve(
    settings: WorkerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    tunnel: TunnelKind = "none",
    no_auth: bool = False,
    notify: Notify = print,
) -> None:
    """Run a worker until Ctrl-C, SIGTERM or the terminal's end, then save its state. For the main thread.

    Takes and raises what :func:`start_in_background` does, and :class:`Interrupted` when stopped before it answered.
    """
    farewell = _es("Ctrl-C guarda y sale.")
    with _StopSignals() as signals:

        def announce(text: str) -> None:
            signals.worker_answers = True  # from its first words on, a signal finds a worker to stop
            notify(text)

        worker = start_in_background(
            settings, host=host, port=port, tunnel=tunnel, no_auth=no_auth, notify=announce, farewell=farewell
        )
        try:
            while worker.running and not signals.stop_asked:
                time.sleep(0.2)
        finally:
            worker.stop()
    notify(_es("Guardado en {folder}. La misma orden sigue donde quedó.").format(folder=settings.state_dir))


def start_in_background(
    settings: WorkerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    tunnel: TunnelKind = "none",
    no_auth: bool = False,
    notify: Notify = print,
    farewell: str | None = None,
) -> BackgroundWorker:
    """Start a worker, show its address and return while it answers in its own thread.

    Args:
        settings: its ``token`` is the one to use; ``None`` takes that of ``SHEILY_WORKER_TOKEN``, else the one this
            state folder had before, else a new one.
        port: 0 takes a free one.
        no_auth: ask for no token; on loopback without a tunnel only.
        notify: receives each text for the person who starts the worker.
        farewell: the line that says how to stop it.

    Raises:
        RequestError: host, token, folder or tunnel cannot be used.
        BusyError: the folder belongs to a worker that runs, or the port is taken.
        SheilyError: the tunnel or the worker did not start.
    """
    _check_exposure(host, tunnel, no_auth, settings.token)
    with ExitStack() as resources:
        resources.enter_context(_locked_folder(settings.state_dir))
        token = None if no_auth else worker_token(settings.state_dir, settings.token)
        listener = resources.enter_context(_listening_socket(host, port))
        port = listener.getsockname()[1]
        stop_or = farewell or _es("Para guardar y parar, llama a su método stop().")
        screen = _Screen(notify, token, settings, stop_or)
        way_in = _WayIn(tunnel, host, port, screen)
        resources.callback(way_in.close)
        app = create_app(replace(settings, token=token))
        server = _ServerThread(app, listener)
        resources.callback(server.stop)
        app.warm_up()
        server.start_answering()
        address = screen.show_address(way_in.url)
        if not is_loopback(host):
            notify(_es("Aviso: sin túnel ni ssh -L, lo que se envía a {host} viaja sin cifrar.").format(host=host))
        return BackgroundWorker(address, server, resources.pop_all())


def worker_token(state_dir: Path, given: str | None = None) -> str:
    """The token of a worker: the one given, else that of the environment, else the folder's own, else a new one.

    It is kept in the folder, readable by its owner only, so that an address stays good when the worker starts again.

    Raises :class:`RequestError` when it cannot be used, or not be written.
    """
    try:
        return _kept_token(state_dir, given or os.environ.get(TOKEN_VARIABLE, "").strip())
    except OSError as error:
        raise _no_folder(state_dir, error) from error


def _kept_token(state_dir: Path, given: str) -> str:
    path = state_dir / TOKEN_FILE
    kept = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    delete = "" if given else _es("Borra {file}, y el trabajador hará otro.").format(file=path)
    token = check_token(given or kept or new_token(), delete)
    if token != kept:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(state_dir)
    path.chmod(0o600)
    return token


class _ServerThread(threading.Thread):
    """uvicorn in a thread of its own, where it leaves signals alone; closes the app it serves."""

    def __init__(self, app: WorkerApp, listener: socket.socket) -> None:
        super().__init__(name="sheily-worker", daemon=True)
        self._app = app
        self._listener = listener
        self._failure: BaseException | None = None
        self._server = uvicorn.Server(
            uvicorn.Config(
                _LastWord(app),
                http=_PromptProtocol,
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
                h11_max_incomplete_event_size=_HEAD_BYTES,
            )
        )

    def run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except BaseException as error:
            self._failure = error

    def start_answering(self) -> None:
        """Start, and return once requests are answered."""
        self.start()
        while not self._server.started:
            self.join(0.02)
            if not self.is_alive():
                raise SheilyError(_es("El trabajador no arrancó: {reason}.").format(reason=self._failure))

    def stop(self) -> None:
        """Finish the answers in hand, then let the app save its state. Again: nothing."""
        self._server.should_exit = True
        if self.ident is not None:
            self.join()
        try:
            self._app.close()
        except OSError as error:
            raise SheilyError(
                _es("El trabajador no pudo guardar su estado: {reason}.").format(reason=error.strerror or error),
                mend=_es("Haz sitio en el disco; lo que falte lo repone el cliente desde su diario."),
            ) from error
        if self._failure is not None:
            raise SheilyError(_es("El trabajador dejó de atender: {reason}.").format(reason=self._failure))


class _LastWord:
    """Answers 503 to what uvicorn cancels because it outlasts the end: clients try that again, not so a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def note(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._app(scope, receive, note)
        except asyncio.CancelledError:
            if not began:
                for message in refusal_messages(_stopping_refusal()):
                    await send(message)


def _stopping_refusal() -> RefusedError:
    return RefusedError(
        _es("El trabajador se para antes de poder responder."),
        mend=_es("Repite la petición cuando vuelva."),
        status=503,
        code="restarted",
    )


class _PromptProtocol(H11Protocol):
    """HTTP whose connections end when they should: uvicorn alone would wait for ever for the rest of a request's head.

    And when a body stops being HTTP, the app that was reading it is told that its client has left. It would go on, and
    leave a traceback in the log: anybody could fill it.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        with suppress(h11.LocalProtocolError):  # an answer that has begun cannot become another one
            super().send_400_response(msg)
        self.transport.close()

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Screen:
    """What the person who starts a worker reads."""

    def __init__(self, notify: Notify, token: str | None, settings: WorkerSettings, farewell: str) -> None:
        self.notify = notify
        self._fragment = f"#token={token}" if token else ""
        self._settings = settings
        self._farewell = farewell

    def show_address(self, url: str) -> str:
        """Show the address to copy and what to do with it; returns it."""
        address = url + self._fragment
        lines = [
            _es("OMEGA 21 está en marcha. Copia esta dirección entera; quien la tiene puede usar el trabajador:"),
            "",
            address,
            "",
            _es("En tu máquina:"),
            f"  sheily connect '{address}'",
            f"  ./conectar_colab.sh '{address}'",
            "",
            _es("Estado: {folder}").format(folder=self._settings.state_dir),
            _es("Dispositivo: {device}").format(device=_device_in_words(self._settings.device)),
            self._farewell,
        ]
        self.notify("\n".join(lines))
        return address


class _WayIn:
    """How the worker is reached: its own port, or a tunnel that is opened again when it dies."""

    def __init__(self, kind: TunnelKind, host: str, port: int, screen: _Screen) -> None:
        self._kind = kind
        self._port = port
        self._screen = screen
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._tunnel = self._open() if kind != "none" else Tunnel(f"http://{_name_for_others(host)}:{port}")

    @property
    def url(self) -> str:
        """The address without the token."""
        return self._tunnel.url

    def close(self) -> None:
        """End the tunnel, if there is one."""
        self._closing.set()
        with self._lock:
            self._tunnel.close()

    def _open(self) -> Tunnel:
        return open_tunnel(self._kind, self._port, on_death=self._reopen)

    def _reopen(self) -> None:
        self._screen.notify(_es("El túnel se cerró; se abre otro."))
        while not self._closing.wait(_REOPEN_SECONDS):
            with self._lock:
                if self._closing.is_set():
                    return
                try:
                    self._tunnel = self._open()
                except SheilyError as error:
                    self._screen.notify(_es("Sigue sin túnel: {error}").format(error=error))
                    continue
            self._screen.show_address(self.url)
            return


class _StopSignals:
    """Turns the first Ctrl-C, SIGTERM or hang-up into a request to stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.stop_asked = False  # no Event: set by a handler in the midst of the main thread's wait, it would lock up
        self.worker_answers = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_error: object) -> None:
        self._restore()

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._restore()
        if not self.worker_answers:
            raise Interrupted(_es("El trabajador se paró antes de atender."))
        self.stop_asked = True

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _check_exposure(host: str, tunnel: TunnelKind, no_auth: bool, token: str | None) -> None:
    """Refuse a worker without a token where others can reach it."""
    if no_auth and (tunnel != "none" or not is_loopback(host)):
        raise RequestError(
            _es("--no-auth solo vale en la propia máquina: sin túnel y con --host 127.0.0.1."),
            mend=_es("Quita --no-auth: el token va en la dirección y no hay que escribirlo."),
        )
    if tunnel != "none" and host not in ("127.0.0.1", "localhost", "0.0.0.0"):  # noqa: S104
        raise RequestError(
            _es("Un túnel lleva a 127.0.0.1, y --host es {host}.").format(host=host), mend=_es("Quita --host o --tunnel.")
        )
    if no_auth and token:
        raise RequestError(_es("--no-auth y --token se contradicen."), mend=_es("Quita uno de los dos."))


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Hold the state folder for this worker."""
    lock = FileLock(folder / LOCK_FILE, thread_local=False)
    try:
        make_folder(folder)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BusyError(
            _es("Otro trabajador usa {folder}.").format(folder=folder),
            mend=_es("Páralo, o elige otra carpeta con --state-dir."),
        ) from error
    except OSError as error:
        raise _no_folder(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def _no_folder(folder: Path, error: OSError) -> RequestError:
    return RequestError(
        _es("No se puede escribir en {folder}: {reason}.").format(folder=folder, reason=error.strerror),
        mend=_es("Elige otra carpeta con --state-dir."),
    )


@contextmanager
def _listening_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens; whether the port is free is known before anything slow begins."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listener = socket.create_server((host, port), family=family)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else an answer waits 40 ms for its last part
    except OSError as error:
        family_of_error = BusyError if error.errno == errno.EADDRINUSE else RequestError
        raise family_of_error(
            _es("No se puede escuchar en {host}:{port}: {reason}.").format(host=host, port=port, reason=error.strerror),
            mend=_es("Elige otro puerto con --port (0 toma uno libre) u otra dirección con --host."),
        ) from error
    with listener:
        yield listener


def _name_for_others(host: str) -> str:
    """What to write in an address for a host that listens: a wildcard becomes this machine's own number."""
    if host in ("0.0.0.0", "::", ""):  # noqa: S104
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing: only asks which of its numbers would be used
                host = str(probe.getsockname()[0])
            except OSError:
                host = socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _device_in_words(device: str) -> str:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"{device} ({torch.cuda.get_device_name()})" if device.startswith("cuda") else device


# ----------------------------------------------------------------------------------------------------------------------
# sheily_train/scripts/deployment/cell_start.py
#
# What the Colab cell does last: it finds or fetches a tunnel, starts the worker and shows its address.
# ----------------------------------------------------------------------------------------------------------------------

CLOUDFLARED_URL = "https://github.com/cloudflare/cloudflared/releases/latest/download/cloudflared-linux-{machine}"
DOWNLOAD_SECONDS = 60

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def start_in_cell(tunnel: str, port: int, folder: str, ngrok_package: str) -> BackgroundWorker:
    """Start a worker beside the cell's running event loop.

    Args:
        tunnel: auto, cloudflared, ngrok or none.
        port: 0 takes a free one.
        folder: where its state lies; the same folder goes on with the same state and token.
        ngrok_package: what to install for ngrok, as ``pyngrok>=7.3``.

    Raises:
        SystemExit: it did not start; the text says why, in the words of the cell. A notebook shows no trace for it.
    """
    state_dir = Path(folder).expanduser().resolve()
    try:
        return start_in_background(
            WorkerSettings(state_dir),
            port=port,
            tunnel=_choose_tunnel(tunnel, state_dir / "bin", ngrok_package),
            farewell=_es("Para guardar y parar: trabajador.stop(). Si ejecutas otra vez la celda, sigue donde estaba."),
        )
    except SheilyError as error:
        flags = _es("En esta celda, --tunnel es TUNEL, --port es PUERTO y --state-dir es CARPETA.")
        raise SystemExit(f"{error}\n{flags}" if "--" in str(error) else str(error)) from None


def _choose_tunnel(wanted: str, programs: Path, ngrok_package: str) -> TunnelKind:
    """The tunnel to open, with its program in place; for ``auto`` the first of cloudflared and ngrok that works."""
    if wanted == "none":
        return "none"
    if wanted not in ("auto", "cloudflared", "ngrok"):
        raise RequestError(
            _es("TUNEL es «{found}»; se esperaba auto, cloudflared, ngrok o none.").format(found=wanted),
            mend=_es("Corrígelo al principio de la celda."),
        )
    if wanted in ("auto", "cloudflared") and (_have_cloudflared(programs) or wanted == "cloudflared"):
        return "cloudflared"
    if wanted in ("auto", "ngrok") and (_have_ngrok_token() or wanted == "ngrok"):
        install_missing([ngrok_package])
        return "ngrok"
    raise RequestError(
        _es("No hay túnel: cloudflared no está ni se pudo descargar, y falta NGROK_AUTHTOKEN."),
        mend=_es(
            "Copia tu authtoken de dashboard.ngrok.com, guárdalo como NGROK_AUTHTOKEN en los secretos de Colab "
            "(la llave de la izquierda) y ejecuta otra vez la celda. Si llegas al puerto por ssh -L, pon none en TUNEL."
        ),
    )


def _have_cloudflared(programs: Path) -> bool:
    """Whether cloudflared is on the path; if not, it is fetched from its makers, for Linux."""
    machine = _MACHINES.get(platform.machine())
    if shutil.which("cloudflared"):
        return True
    if platform.system() != "Linux" or machine is None:
        return False
    program = programs / "cloudflared"
    if not program.is_file():
        url = CLOUDFLARED_URL.format(machine=machine)
        print(_es("Descargando cloudflared de {url}").format(url=url))
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as answer:  # noqa: S310 - a constant
                write_bytes(program, answer.read())
        except (OSError, BrokenDownload) as error:
            print(_es("No se pudo descargar: {reason}").format(reason=error))
            return False
    program.chmod(0o755)
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    return True


def _have_ngrok_token() -> bool:
    """Whether ``NGROK_AUTHTOKEN`` is set; Colab's secrets are asked too."""
    if not os.environ.get("NGROK_AUTHTOKEN", "").strip():
        with suppress(Exception):  # elsewhere than in Colab, or not among the secrets
            os.environ["NGROK_AUTHTOKEN"] = importlib.import_module("google.colab.userdata").get("NGROK_AUTHTOKEN")
    return bool(os.environ.get("NGROK_AUTHTOKEN", "").strip())


# ----------------------------------------------------------------------------------------------------------------------
# Arranque
# ----------------------------------------------------------------------------------------------------------------------

trabajador = start_in_cell(TUNEL, PUERTO, CARPETA, ngrok_package="pyngrok>=7.3")
