"""The client of an OMEGA 21 worker, for asyncio: sends batches and feedback, and keeps the journal of what it sent.

Every event belongs to a *run*, which outlives clients, workers and this process: :mod:`sheily_train.colab.delivery`
says how. ``conectar`` brings journal and worker together; what an earlier process left waiting is delivered by it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx2
import orjson
from numpy.typing import NDArray

from sheily_train import paths
from sheily_train.colab.address import parse_address
from sheily_train.colab.answers import PATHS, event_record
from sheily_train.colab.batches import JSON_FORM, Batch, Feedback, make_feedback
from sheily_train.colab.delivery import Delivery, Draft, Supply
from sheily_train.colab.journal import Journal
from sheily_train.colab.protocol import RUN_HEADER, Kind, check_run_id
from sheily_train.colab.pulled import PulledState, PulledStates
from sheily_train.colab.samples import Samples, batches_of, encode, one_batch
from sheily_train.colab.tally import Tally
from sheily_train.colab.threads import in_thread
from sheily_train.colab.verdicts import Hiccup
from sheily_train.colab.wire import FORMS, ClientSettings, Record, Wire
from sheily_train.errors import NoRuns, OutOfStep, RequestError, UnreachableError, WorkerError
from sheily_train.i18n import _, ngettext

DEFAULT_RUN = "principal"

_Result = TypeVar("_Result")


class ClienteColabAsincrono:
    """A client for asyncio. Its calls may overlap: those that train wait for each other.

    Args:
        url: the worker's address; ``#token=…`` at its end is the token.
        token: comes before the address's own.
        transport: in place of the network, as ``httpx2.ASGITransport(app)``.
        run: the name of the run: of its journal here, and of its state at the worker.
        seed: of the network of a new run; a run that has a journal keeps its own.
        folder: where journal and fetched states lie; ``var/omega/<run>`` unless given.
        record: is told, as ``record(event, **fields)``, of every step, feedback, wire, retry, resync, rebase and
            snapshot.

    Raises:
        RequestError: the address, the run's name or a setting cannot be used.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        *,
        run: str = DEFAULT_RUN,
        seed: int = 0,
        folder: Path | None = None,
        record: Record | None = None,
        settings: ClientSettings | None = None,
    ) -> None:
        address = parse_address(url, token or "")
        self.url = address.url
        self.run = check_run_id(run)
        self.settings = settings or ClientSettings()
        self.totals = Tally()
        self.plain = False
        """Whether the worker is a plain v4.0: it is sent JSON, and nothing is promised."""
        self._seed = seed
        self._folder = folder or paths.omega_dir() / run
        self._listener = record
        self._wire = Wire(address.url, address.token, transport, self.settings, self._record, self._how_to_go_on)
        self._turn = asyncio.Lock()
        self._opened: tuple[Journal, PulledStates, Delivery] | None = None
        self._closed = False
        self._plain_history: list[dict[str, Any]] = []

    @property
    def journal(self) -> Journal:
        """The run's journal; opened, and held, from the first use on. Raises :class:`BusyError`."""
        return self._parts()[0]

    async def conectar(self, *, rebase: bool = False) -> dict[str, Any]:
        """Attach to the run at the worker and deliver what waits in the journal; returns the worker's answer.

        A worker of another kind of machine is refused. With ``rebase`` the run goes back to the newest state that was
        fetched, or to its beginning, and what follows is trained anew with that machine's numbers; the worker sets a
        state of its own aside.
        """
        async with self._turn:
            try:
                self._parts()[2].detach()
                await self._deliver(rebase=rebase)
            except NoRuns as plain:
                return await self._connect_plain(plain)
            return dict(self._parts()[2].worker or {})

    async def entrenar_lote(self, muestras: Samples, epocas: int = 1) -> dict[str, Any]:
        """Train one batch of at most 4,096 vectors; returns the worker's answer."""
        [answer] = await self._apply([(Kind.TRAIN, one_batch(muestras, epocas))])
        return answer

    async def entrenar_multiples_lotes(
        self, muestras: Samples, tamano_lote: int = 64, epocas: int = 1
    ) -> list[dict[str, Any]]:
        """Train vectors in batches of ``tamano_lote``, several on their way at once; returns the answers, in order.

        All vectors are checked before the first one is sent (:class:`RefusedError` names the bad one).
        """
        batches = await asyncio.to_thread(batches_of, muestras, tamano_lote, epocas)
        return await self._apply([(Kind.TRAIN, batch) for batch in batches])

    async def enviar_feedback(self, ajustes: Sequence[float] | NDArray[Any], validacion: bool) -> dict[str, Any]:
        """Say what came of applying 16 dendrite adjustments (−1..1); returns the worker's answer."""
        [answer] = await self._apply([(Kind.FEEDBACK, make_feedback(ajustes, validacion))])
        return answer

    async def predecir(self, muestras: Samples) -> dict[str, Any]:
        """The anomaly probability of each vector, without training."""
        batch = one_batch(muestras)
        form = JSON_FORM if self.plain else FORMS[self.settings.form]
        return await self._read("POST", "/predict", await asyncio.to_thread(encode, batch, form), form)

    async def obtener_estado(self) -> dict[str, Any]:
        """What has been learned so far: the worker's ``/status``."""
        return await self._read("GET", "/status")

    async def obtener_info(self) -> dict[str, Any]:
        """The network's build: ``/info``."""
        return await self._read("GET", "/info")

    async def obtener_metricas(self) -> dict[str, Any]:
        """The latest losses and where they go: ``/metricas``."""
        return await self._read("GET", "/metricas")

    async def diagnostico(self) -> dict[str, Any]:
        """Let the worker pass a test vector through the network: ``/diagnostico``."""
        return await self._read("POST", "/diagnostico")

    async def descargar_estado(self) -> Path:
        """Fetch the run's whole state now, verified and durable; returns the file."""
        async with self._turn:
            await self._deliver()
        return (await self._in_step(self._whole_state)).path

    async def _whole_state(self) -> PulledState:
        """The state after all that is answered; a worker that came back with an older one is not in step."""
        answered = self.journal.answered_seq
        state = await self._parts()[1].pull()
        if state.seq < answered:
            raise OutOfStep(
                "behind",
                _("El trabajador volvió con un estado anterior, el del evento {seq} de {answered}.").format(
                    seq=state.seq, answered=answered
                ),
            )
        return state

    async def descartar_pendientes(self) -> int:
        """Remove from the journal what waits there and the worker has not applied; returns how many events.

        For a batch at which a worker fails each time. Nothing else ever skips an event.
        """
        async with self._turn:
            return await self._parts()[2].discard()

    def obtener_historial(self) -> list[dict[str, Any]]:
        """Every answer of the run, oldest first, each with its ``seq`` and ``kind`` (train, feedback)."""
        if self.plain:
            return list(self._plain_history)
        return [{"seq": seq, "kind": str(kind), **orjson.loads(body)} for seq, kind, body in self.journal.answers()]

    def mostrar_resumen(self) -> str:
        """Print, and return, what this client's batches came to."""
        text = self.totals.text()
        print(text)
        return text

    async def desconectar(self) -> None:
        """Close connections and journal. What waits in the journal goes on with the next client."""
        async with self._turn:
            self._closed = True
            if self._opened is not None:
                journal, states, _delivery = self._opened
                await states.finish(cancel=True)
                await in_thread(journal.close)
            await self._wire.close_connections()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.desconectar()

    # Inside

    def _parts(self) -> tuple[Journal, PulledStates, Delivery]:
        if self._closed:
            raise RequestError(_("El cliente está desconectado."), mend=_("Crea otro."))
        if self._opened is None:
            journal = Journal(self._folder, self.run, self._seed)
            states = PulledStates(self._wire, journal, self.settings, self._record)
            self._opened = journal, states, Delivery(self._wire, journal, states, self.settings, self._record)
        return self._opened

    async def _deliver(self, supply: Supply | None = None, *, rebase: bool = False) -> list[dict[str, Any]]:
        if self._opened is None:
            await in_thread(self._parts)
        return await self._parts()[2].run(supply, rebase=rebase)

    async def _apply(self, contents: list[tuple[Kind, Batch | Feedback]]) -> list[dict[str, Any]]:
        """Apply events, and return their answers."""
        form = FORMS[self.settings.form]
        drafts = ((kind, form, encode(content, form)) for kind, content in contents)
        taken: list[int] = []

        def supply(count: int) -> list[Draft]:
            given = list(islice(drafts, count))
            taken.append(len(given))
            return given

        async with self._turn:
            if not self.plain:
                try:
                    return await self._deliver(supply)
                except NoRuns as plain:
                    await self._connect_plain(plain)
                except UnreachableError as error:
                    if len(contents) > 1:
                        error.mend += _(" Anotados {taken} de {count} lotes de esta llamada.").format(
                            taken=sum(taken), count=len(contents)
                        )
                    raise
            return [await self._apply_plain(kind, content) for kind, content in contents]

    async def _read(self, method: str, path: str, content: bytes = b"", form: str = JSON_FORM) -> dict[str, Any]:
        """The answer to a request that changes nothing."""
        return await self._in_step(lambda: self._read_once(method, path, content, form))

    async def _in_step(self, ask: Callable[[], Awaitable[_Result]]) -> _Result:
        """What ``ask`` returns; when the worker was started anew meanwhile, it is brought back first."""
        try:
            return await ask()
        except OutOfStep:
            async with self._turn:
                self._parts()[2].detach()
                await self._deliver()
        return await ask()

    async def _read_once(self, method: str, path: str, content: bytes, form: str) -> dict[str, Any]:
        attached = self._opened is not None and self._opened[2].worker is not None
        headers = {RUN_HEADER: self.run} if attached else {}
        answer = await self._wire.retried(
            lambda: self._wire.ask(method, path, content=content, form=form, headers=headers)
        )
        return answer.content

    # A worker that knows no runs

    async def _connect_plain(self, plain: NoRuns) -> dict[str, Any]:
        """Go on without the promise, where nothing has been promised yet."""
        if self.journal.last_seq:
            raise plain
        status = await self._read_once("GET", "/status", b"", JSON_FORM)
        self.plain = True
        self._record("plain", reason="no POST /run")
        return status

    async def _apply_plain(self, kind: Kind, content: Batch | Feedback) -> dict[str, Any]:
        path, body = PATHS[kind], await asyncio.to_thread(encode, content, JSON_FORM)

        async def ask() -> dict[str, Any]:
            try:
                return (await self._wire.ask("POST", path, content=body)).content
            except Hiccup as hiccup:
                if hiccup.reason != "foreign":
                    raise
                raise WorkerError(hiccup.text, mend=self._how_to_go_on()) from hiccup  # again would be twice

        answer = await self._wire.retried(ask)
        seq = len(self._plain_history) + 1
        self._plain_history.append({"seq": seq, "kind": str(kind), **answer})
        name, fields = event_record(seq, kind, answer)
        self._record(name, **fields)
        return answer

    # What is told

    def _record(self, event: str, **fields: Any) -> None:
        self.totals.add({"event": event, **fields})
        if self._listener is not None:
            self._listener(event, **fields)

    def _how_to_go_on(self) -> str:
        if self._opened is None or self.plain:
            return _("Comprueba la dirección y que el trabajador siga en marcha.")
        journal = self._opened[0]
        count = journal.last_seq - journal.answered_seq
        waiting = ngettext("{count} evento espera", "{count} eventos esperan", count).format(count=count)
        return _(
            "Nada se ha perdido: {waiting} en el diario. Con el trabajador en marcha, repite la misma orden (o llama a "
            "conectar()), con la dirección nueva si ha cambiado."
        ).format(waiting=waiting)
