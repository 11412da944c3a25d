"""How a batch is applied exactly once: what client and worker say to each other about a run, and who may say it.

A run is a sequence of events numbered 1, 2, 3, … Each event (a batch, or feedback) has a digest of its kind, time and
exact bytes, and a chain value that joins it to all before it:

    chain(0) = sha256(run id, seed)        chain(n) = sha256(chain(n−1), digest(n))

Two ends that agree on chain(n) agree on every byte of the first n events, so they hold the same state. Where a run goes
on with another machine's numbers, that is mixed into its chain too (:func:`rebase_digest`). The client keeps every
event in its journal; the worker keeps a :class:`Ledger`: the last number, its chain, and the latest answers.

    seq == last + 1, chain fits      apply it, store the answer
    seq == last + 1, chain does not  conflict 422: the two ends have different histories
    seq <= last, same digest         the stored answer again, nothing is applied
    seq <= last, another digest      conflict 422
    seq > last + 1                   gap 409, with the number expected
    an owner older than the latest   fenced 409: another client took the run over

This module reads no clock, no socket and no disk.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from sheily_train.errors import RefusedError
from sheily_train.i18n import _

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
            _("«{name}» es «{found}»; se esperaban 64 cifras hexadecimales.").format(name=name, found=found)
        )
    return value


def check_run_id(run: str) -> str:
    """The id itself, when it can name a folder anywhere; else :class:`RefusedError`."""
    if not _RUN_ID.fullmatch(run):
        raise RefusedError(
            _("«{run}» no vale como nombre de entrenamiento.").format(run=run[:80]),
            mend=_("Usa de 1 a 64 letras sin acento, cifras, guiones y guiones bajos."),
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
                _("Otro cliente se hizo cargo de «{run}».").format(run=self.run),
                mend=_("Sigue desde un solo sitio; para tomarlo aquí, repite la orden con --continuar."),
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
                _("Llegó el evento {found} y toca el {expected}.").format(found=claim.seq, expected=self.last_seq + 1),
                mend=_("El cliente reenvía los que faltan desde su diario."),
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
                _("El evento {seq} ya se aplicó y su respuesta ya no se guarda.").format(seq=claim.seq),
                mend=_("El diario de este cliente es más antiguo que el trabajador: empieza otro entrenamiento."),
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
            _("El evento {seq} no es el que este trabajador aplicó o espera: las dos historias difieren.").format(
                seq=seq
            ),
            mend=_("Empieza otro entrenamiento, o usa el diario de este."),
            status=422,
            code="conflict",
        )


def another_seed(run: str, found: int, asked: int) -> RefusedError:
    """The refusal of a run that began with another seed."""
    return RefusedError(
        _("«{run}» se empezó con la semilla {found}, no con {asked}.").format(run=run, found=found, asked=asked),
        mend=_("Usa esa semilla, u otro nombre de entrenamiento."),
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
        raise RefusedError(_("La cabecera {name} falta o no vale: «{found}».").format(name=name, found=value[:80]))
    return value


def _number(headers: Mapping[str, str], name: str) -> int:
    value = headers.get(name, "")
    if not re.fullmatch(r"[1-9]\d{0,14}", value):
        raise RefusedError(_("La cabecera {name} falta o no vale: «{found}».").format(name=name, found=value[:80]))
    return int(value)
