"""The worker's states that the client fetched: what a brand-new worker is given, so that not all must be replayed.

A state is one safetensors file that only workers read. Here it lies as ``<event>-<sha256>.safetensors``: written under
a temporary name, checked against the sha256 that the worker said and against the journal's chain, fsynced, renamed, the
folder fsynced. Two are kept, and the journal's bodies from the older one on.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from sheily_train import durable
from sheily_train.colab.journal import Journal
from sheily_train.colab.protocol import DIGEST_HEADER, RUN_HEADER, SEQ_HEADER, STATE_LIMIT
from sheily_train.colab.threads import in_thread
from sheily_train.colab.verdicts import Hiccup
from sheily_train.colab.wire import PIECE, ClientSettings, Record, Wire
from sheily_train.errors import ResourceError, SheilyError, WorkerError
from sheily_train.i18n import _

STATES_FOLDER = "snapshots"

_NAME = re.compile(r"(\d{12})-([0-9a-f]{64})\.safetensors")
_PART = ".part"
_HEADER_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True)
class PulledState:
    """A run's state after event ``seq``."""

    seq: int
    sha256: str
    path: Path

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.path.stat().st_size

    async def pieces(self) -> AsyncIterator[bytes]:
        """Its content."""
        with self.path.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, PIECE):
                yield piece

    def is_whole(self) -> bool:
        """Whether the file is what it was."""
        return durable.sha256_file(self.path) == self.sha256

    def chain(self, run: str) -> str | None:
        """The chain value that its own header names; ``None`` when it is no state of that run after its event."""
        try:
            with self.path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(min(size, _HEADER_LIMIT))
            ledger = orjson.loads(orjson.loads(header)["__metadata__"]["run"])["ledger"]
            return str(ledger["chain"]) if (ledger["run"], ledger["last_seq"]) == (run, self.seq) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


class PulledStates:
    """The states of one run, in the folder ``snapshots`` beside its journal.

    Args:
        settings: say after how many events one is fetched, and how many bytes of bodies are kept all the same.
        record: is told of each one, and of each that could not be fetched.
    """

    def __init__(self, wire: Wire, journal: Journal, settings: ClientSettings, record: Record) -> None:
        self._wire, self._journal, self._settings, self._record = wire, journal, settings, record
        self._folder = journal.folder / STATES_FOLDER
        self._due = max([0, *(state.seq for state in self.all() if self._is_ours(state))]) + settings.pull_after
        self._task: asyncio.Task[None] | None = None
        self._one_at_a_time = asyncio.Lock()

    def all(self) -> list[PulledState]:
        """The files that are there, oldest first; not checked."""
        names = [(path, _NAME.fullmatch(path.name)) for path in sorted(self._folder.glob("*.safetensors"))]
        return [PulledState(int(found[1]), found[2], path) for path, found in names if found]

    def newest(self, last: int) -> PulledState | None:
        """The newest whole one of this history, of an event up to ``last``."""
        known = (state for state in reversed(self.all()) if state.seq <= last and self._is_ours(state))
        return next((state for state in known if state.is_whole()), None)

    def go_back(self, seq: int) -> None:
        """The run goes back to ``seq``: states are fetched from there on."""
        self._due = seq + self._settings.pull_after

    def _is_ours(self, state: PulledState) -> bool:
        """Whether a state belongs to the journal's history; one from just before a break does."""
        return state.seq <= self._journal.last_seq and state.chain(self._journal.run) in self._journal.chains(state.seq)

    def pull_when_due(self, seq: int) -> None:
        """Fetch a state, beside the training, when enough events have passed."""
        if seq >= self._due and (self._task is None or self._task.done()):
            self._due = seq + self._settings.pull_after
            self._task = asyncio.create_task(self._pull_quietly())

    async def finish(self, *, cancel: bool = False) -> None:
        """Wait for the state that is being fetched beside the training, or give it up."""
        if self._task is not None:
            if cancel:
                self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def pull(self) -> PulledState:
        """Fetch the run's state as it is now, check it, keep it, and drop the bodies that no kept state needs."""
        begun = time.monotonic()
        async with self._one_at_a_time:
            part = self._folder / _PART
            try:
                durable.make_folder(self._folder)
                seq, sha256 = await self._wire.retried(lambda: self._fetch(part))
                kept = await in_thread(self._keep, PulledState(seq, sha256, part))
                size = kept.size
            except OSError as error:
                raise ResourceError(
                    _("El estado no se puede guardar en {folder}: {reason}.").format(
                        folder=self._folder, reason=error.strerror or error
                    ),
                    mend=_("Comprueba el sitio libre y los permisos; el entrenamiento sigue sin él."),
                ) from error
            finally:
                with contextlib.suppress(OSError):  # it was told
                    part.unlink(missing_ok=True)
        seconds = round(time.monotonic() - begun, 3)
        self._record("snapshot", seq=kept.seq, bytes=size, seconds=seconds)
        return kept

    async def _pull_quietly(self) -> None:
        """A state that cannot be fetched now is fetched later: the journal has all that it would replace."""
        try:
            await self.pull()
        except SheilyError as error:
            self._record("snapshot_failed", reason=" ".join(str(error).split()))

    async def _fetch(self, part: Path) -> tuple[int, str]:
        headers, sha256 = await self._wire.download("/state", part, {RUN_HEADER: self._journal.run}, STATE_LIMIT)
        if sha256 != headers.get(DIGEST_HEADER):
            raise Hiccup("damaged", _("El estado llegó dañado: su sha256 no es el anunciado."))
        return int(headers.get(SEQ_HEADER, "0")), sha256

    def _keep(self, state: PulledState) -> PulledState:
        """Make a state of this journal's history durable, and drop the states and bodies that nothing needs."""
        chain = state.chain(self._journal.run)
        if chain is None:
            raise WorkerError(
                _("El estado que dio el trabajador no es el del entrenamiento «{run}».").format(run=self._journal.run),
                mend=_("Usa la misma versión de sheily-train en los dos lados."),
            )
        if state.seq > self._journal.last_seq or chain != self._journal.chain(state.seq):
            raise another_history(state.seq)
        durable.sync_file(state.path)
        final = self._folder / f"{state.seq:012d}-{state.sha256}.safetensors"
        state.path.replace(final)
        durable.sync_folder(self._folder)
        fetched = PulledState(state.seq, state.sha256, final)
        self._drop_but(fetched)
        if len(states := self.all()) > 1 and self._journal.body_bytes(0, state.seq) > self._settings.keep_bytes:
            self._journal.prune(min(states[0].seq, self._journal.answered_seq))
        return fetched

    def _drop_but(self, fetched: PulledState) -> None:
        """Keep the two newest whole states of this history, and the one just fetched: a worker that came back with an
        old folder gives one that is older than both."""
        others = [other for other in self.all() if other.path != fetched.path]
        of_others = [other for other in others if other.seq != fetched.seq]  # of one event there may be several
        good = [other for other in of_others if self._is_ours(other) and other.is_whole()]
        kept = sorted([*good, fetched], key=lambda state: state.seq)[-2:]
        for other in others:
            if other not in kept:
                other.path.unlink(missing_ok=True)


def another_history(seq: int) -> WorkerError:
    """The error of a worker whose events, answers or state are not the journal's."""
    return WorkerError(
        _("El trabajador y el diario cuentan historias distintas: difieren en el evento {seq} o antes.").format(
            seq=seq
        ),
        mend=_("Nada se ha cambiado. Usa el trabajador de este entrenamiento, o empieza otro con --run."),
    )
