"""What ``sheily connect`` does: connect, make or read vectors, train the worker with them, sum up.

Each call adds a *session* of batches to a *run*. The session's plan, all that decides its batches, is noted in the
run's journal before the first one is sent. So the same command after a kill, or ``--continuar``, goes on with the batch
that is next; another plan, or the same one once its session has ended, is a new session with fresh vectors.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson

from sheily_train import durable, paths, runlog
from sheily_train.colab.address import Address
from sheily_train.colab.answers import event_record, number_in
from sheily_train.colab.async_client import DEFAULT_RUN, ClienteColabAsincrono
from sheily_train.colab.batches import BINARY_FORM, VECTOR, Batch, batch_from_binary, batch_from_json
from sheily_train.colab.presets import Settings
from sheily_train.colab.protocol import ANONYMOUS_RUN, Kind, check_run_id
from sheily_train.colab.report import report_files, write_report
from sheily_train.colab.samples import Shuffled
from sheily_train.colab.tally import Tally
from sheily_train.colab.threads import in_thread
from sheily_train.colab.wire import ClientSettings
from sheily_train.core.omega.generator import GeneradorDatosEntrenamiento
from sheily_train.errors import Interrupted, RefusedError, RequestError, ResourceError, UnreachableError
from sheily_train.i18n import _, ngettext
from sheily_train.runlog import Listener, Record, RunLog

_WORKERS_OWN_NAMES = {"worker", ANONYMOUS_RUN}  # the one is its usual folder
_INTERVAL = re.compile(r"(?:(\d{1,4})h)?(?:(\d{1,5})m(?:in)?)?(?:(\d{1,7})s)?")

_VECTORS_AT_ONCE = 16384  # 105 MB, many round trips' worth of training

Session = dict[str, Any]
Vectors = Batch | Shuffled
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Order:
    """What one call asks for. Raises :class:`RequestError` for a value that cannot be used.

    Attributes:
        given: names of the settings that the person gave; going on with a session, they must not differ.
        resume: go on with the run's last session, with the settings it has.
        rebase: at another kind of machine, go back to what both can have, and on with its numbers.
        report: where the report goes, if one is wanted.
        every: seconds from the start of a session to that of the next; ``None`` for a single session.
        client: how the client behaves on the wire.
    """

    address: Address
    settings: Settings
    given: Collection[str] = ()
    run: str = DEFAULT_RUN
    resume: bool = False
    rebase: bool = False
    report: Path | None = None
    every: float | None = None
    client: ClientSettings = ClientSettings()

    def __post_init__(self) -> None:
        try:
            check_run_id(self.run)
        except RefusedError as error:
            raise RequestError(f"--run: {error.message}", mend=error.mend) from None
        if self.run.lower() in _WORKERS_OWN_NAMES:
            raise RequestError(
                _("--run «{run}» es un nombre que usa el trabajador.").format(run=self.run), mend=_("Usa otro.")
            )
        if self.settings.datos is not None and not self.settings.datos.exists():
            raise RequestError(
                _("No existe {file}.").format(file=self.settings.datos), mend=_("Da con --datos un archivo que exista.")
            )
        if self.report is not None:
            report_files(self.report)

    @property
    def log(self) -> Path:
        """The run's log."""
        return paths.logs_dir() / f"omega_{self.run}.jsonl"


@dataclass(frozen=True)
class Outcome:
    """A session that came to its end: its numbers as in its ``done`` record, the run's log, the report's files."""

    numbers: dict[str, Any]
    log: Path
    report: tuple[Path, ...] = ()


def connect(
    order: Order, *, listeners: tuple[Listener, ...] = (), ended: Callable[[Outcome], None] | None = None
) -> Outcome:
    """Do what was ordered: one session, or one after the other until Ctrl-C.

    Args:
        listeners: called with every record of the run log, and with notes that are only for the screen.
        ended: called with each session's outcome.

    Returns:
        The last session's outcome.

    Raises:
        SheilyError: see :mod:`sheily_train.errors`; :class:`Interrupted` after Ctrl-C or SIGTERM. Whatever was
            journalled is kept, and the next call goes on with it.
    """
    return asyncio.run(_until_stopped(_repeat(order, listeners, ended or (lambda _outcome: None)), order))


def discard(order: Order, *, listeners: tuple[Listener, ...] = ()) -> int:
    """Remove from the run's journal what waits there and the worker has not applied; returns how many events.

    A session that was cut off at them goes on with the batch after them. Raises as :func:`connect`.
    """
    return asyncio.run(_until_stopped(_discard(order, listeners), order))


def seconds_of(text: str) -> float:
    """``1h``, ``30m``, ``45s``, ``1h30m`` as seconds; :class:`RequestError` for anything else."""
    found = _INTERVAL.fullmatch(text.strip().lower())
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise RequestError(_("--cada vale «{text}»; se esperaba algo como 1h, 30m o 45s.").format(text=text))
    return float(total)


async def _until_stopped(work: Coroutine[Any, Any, _Result], order: Order) -> _Result:
    """The work's result; Ctrl-C and SIGTERM let it close what is open, a second one does not wait."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    received: list[int] = []

    def stop(number: int) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        task.cancel()

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows; not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        raise _interrupted(order, received[0] if received else signal.SIGINT) from None


def _interrupted(order: Order, number: int) -> Interrupted:
    run = "" if order.run == DEFAULT_RUN else f" --run {order.run}"
    error = Interrupted(
        _("Interrumpido; lo enviado está en el diario y nada se pierde."),
        mend=_("Para seguir, repite la misma orden, o da la misma dirección con: --continuar{run}").format(run=run),
    )
    error.exit_code = 128 + number
    return error


async def _repeat(order: Order, listeners: tuple[Listener, ...], ended: Callable[[Outcome], None]) -> Outcome:
    every = order.every
    if every is None:
        outcome, _settings = await _run_session(order, listeners)
        ended(outcome)
        return outcome
    while True:
        started = time.monotonic()
        try:
            outcome, settings = await _run_session(order, listeners)
        except UnreachableError as error:
            _tell(listeners, str(error))
        else:
            ended(outcome)
            order = replace(order, settings=settings, resume=False, rebase=False)
        pause = max(0.0, started + every - time.monotonic())
        _tell(listeners, _("Próxima sesión dentro de {time}; Ctrl-C termina.").format(time=_duration(pause)))
        await asyncio.sleep(pause)


def _tell(listeners: tuple[Listener, ...], text: str) -> None:
    """A note for the screen; the log of the run has no part in it."""
    for listener in listeners:
        listener({"event": "note", "text": text})


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"


async def _run_session(order: Order, listeners: tuple[Listener, ...]) -> tuple[Outcome, Settings]:
    """One session from its connection to its report, and the settings it had."""
    started = time.monotonic()
    desk = _Desk(order, listeners)
    try:
        await desk.connect()
        session, batch = await desk.open_session()
        await desk.train(session, batch)
        metrics = await desk.read_metrics()
        seconds = round(time.monotonic() - started, 3)
        numbers = desk.close_session(session, seconds)
    finally:
        await desk.close()
    if metrics is not None:
        numbers["metrics"] = metrics
    return Outcome(numbers, order.log, _write_report(order)), desk.settings


async def _discard(order: Order, listeners: tuple[Listener, ...]) -> int:
    desk = _Desk(order, listeners)
    try:
        return await desk.discard()
    finally:
        await desk.close()


def _write_report(order: Order) -> tuple[Path, ...]:
    if order.report is None:
        return ()
    return tuple(write_report(order.log, order.report))


class _Desk:
    """The client's side of one session: client, journal, log, and the count of what was reached."""

    def __init__(self, order: Order, listeners: tuple[Listener, ...]) -> None:
        self._order = order
        self._listeners: tuple[Listener, ...] = (lambda record: self.tally.add(record), *listeners)
        self._log: RunLog | None = None
        self._vectors_before = 0
        self.tally = Tally()
        self.settings = order.settings
        self._client = ClienteColabAsincrono(
            order.address.url,
            order.address.token,
            run=order.run,
            seed=order.settings.semilla,
            record=self._record,
            settings=order.client,
        )
        self._journal = self._client.journal

    def _record(self, event: str, **fields: Any) -> None:
        """Write into the run's log; the first record opens it, when the run is surely ours."""
        try:
            if self._log is None:
                self._log = RunLog(self._order.log, keep=runlog.whole_lines(self._order.log), listeners=self._listeners)
            self._log.write(event, **fields)
        except BrokenPipeError:  # a listener's
            raise
        except OSError as error:
            raise ResourceError(
                _("El registro {file} no se puede escribir: {reason}.").format(
                    file=self._order.log, reason=error.strerror or error
                ),
                mend=_("Comprueba el sitio libre y los permisos, y repite la orden: sigue donde estaba."),
            ) from error

    async def close(self) -> None:
        """Close the connection, the journal and the log."""
        try:
            await self._client.desconectar()
        finally:
            if self._log is not None:
                with contextlib.suppress(OSError):  # of a line that a full disk did not take: that was told
                    self._log.close()

    async def connect(self) -> None:
        """Attach to the run at the worker; let the worker test itself when that was asked."""
        self._catch_up()
        answer = await self._client.conectar(rebase=self._order.rebase)
        known = (answer["estadisticas"] if self._client.plain else answer["fingerprint"]) or {}
        device = known.get("dispositivo") or known.get("device") or "?"
        self._record("worker", run=self._order.run, url=self._order.address.url, device=device)
        if self.settings.diagnostico:
            self._record("diagnosis", **await self._client.diagnostico())

    def _catch_up(self) -> None:
        """Tell the log of the answers that a kill left in the journal only."""
        told, breaks = 0, list(self._journal.breaks.made)
        for record in _events(self._order.log):
            if record["event"] == "rebase":
                told, breaks = min(told, record["seq"]), breaks[1:]
            else:
                told = max(told, record["seq"])
        for made in breaks:
            told = min(told, made.seq)
            self._record("rebase", seq=made.seq, **{"from": made.left, "to": made.taken})
        for seq, kind, answer in self._journal.answers(after=told):
            name, fields = event_record(seq, kind, orjson.loads(answer))
            self._record(name, **fields)

    async def discard(self) -> int:
        """Remove what waits in the journal, and let the session it belongs to go on with the batch after it."""
        session = next(reversed(self._journal.sessions), None)
        batch = 0
        if session:
            self.settings = Settings.from_plan(session["plan"])
            batch = self._events_left(session)[0]
        count = await self._client.descartar_pendientes()
        if session and count and not session["done"]:
            self._journal.sessions = [*self._journal.sessions[:-1], session | {"part": self._part_from(batch)}]
        told = _("Eventos quitados del diario de «{run}»: {count}")
        self._record("note", text=told.format(run=self._order.run, count=count))
        return count

    async def open_session(self) -> tuple[Session, Vectors]:
        """The session to go on with, or a new one, noted in the journal; and all its vectors."""
        sessions: list[Session] = self._journal.sessions
        last = sessions[-1] if sessions else None
        if self._order.resume:
            self.settings = self._settings_of(last)
        plan = self._plan()
        if last and self._order.resume and last["plan"] != plan:
            raise RequestError(
                _("{file} ha cambiado desde que empezó la sesión.").format(file=self.settings.datos),
                mend=_("Devuelve el archivo a como estaba, o quita --continuar para empezar otra."),
            )
        unfinished = last is not None and last["plan"] == plan and not last["done"]
        resumed = (self._order.resume or unfinished) and not self._client.plain
        batch = await asyncio.to_thread(load_data, self.settings, len(sessions) + (not resumed))
        if last and resumed:
            session = await in_thread(self._without_others, last, batch)
        else:
            session = self._new_session(len(sessions) + 1, plan, batch)
            if last and not last["done"]:
                self._record("note", text=_left_behind(last))
            self._journal.sessions = [*sessions, session]
        self._tell_session(session, batch, resumed=resumed)
        return session, batch

    def _plan(self) -> dict[str, Any]:
        """All that decides the session's events, a file's content with it."""
        file = self.settings.datos
        return self.settings.plan() | ({} if file is None else {"sha256": _sha256(file)})

    def _settings_of(self, last: Session | None) -> Settings:
        """The last session's settings; what the person named must not differ from them."""
        if last is None or self._client.plain:
            raise RequestError(
                _("«{run}» no tiene ninguna sesión que continuar.").format(run=self._order.run),
                mend=_("Quita --continuar para empezar la primera."),
            )
        asked, settings = self._order.settings.plan(), Settings.from_plan(last["plan"])
        for name in self._order.given:
            if name in asked and asked[name] != last["plan"].get(name):
                raise RequestError(
                    _("--continuar sigue con los ajustes de la sesión, y --{name} no es el suyo.").format(name=name),
                    mend=_("Quita --{name}, o quita --continuar para empezar otra.").format(name=name),
                )
        return replace(settings, diagnostico=self.settings.diagnostico, metricas=self.settings.metricas)

    def _new_session(self, number: int, plan: dict[str, Any], batch: Vectors) -> Session:
        return {
            "number": number,
            "plan": plan,
            "first_seq": self._journal.last_seq + 1,
            "batches": -(-len(batch) // self.settings.lote),
            "first_is_judged": bool(self._latest_answers()),
            "done": False,
        }

    def _without_others(self, session: Session, batch: Vectors) -> Session:
        """The session, when another program has used the run since it was cut off: it goes on after that one's events.

        They would be taken for the session's own, and as many of its batches would be skipped.
        """
        part, kinds = self._planned(session)
        last = self._journal.last_seq
        written = last - part["first_seq"] + 1
        counts = range(min(written, len(kinds)), 0, -1)
        own = next((count for count in counts if self._is_own(part, kinds[:count], batch)), 0)
        if own == written:
            return session
        done = part["batch"] + kinds[:own].count(Kind.TRAIN)
        self._record("note", text=_others_sent(self._order.run, written - own, session["number"]))
        others = [*session.get("others", []), [part["first_seq"] + own, last]]
        session = session | {"others": others, "part": self._part_from(done)}
        self._journal.sessions = [*self._journal.sessions[:-1], session]
        return session

    def _is_own(self, part: Session, kinds: list[Kind], batch: Vectors) -> bool:
        """Whether the last of a part's events is what the session sends there; if its body was dropped, it is."""
        seq = part["first_seq"] + len(kinds) - 1
        if seq <= self._journal.pruned_seq:
            return True
        event = self._journal.entry(seq).event
        if event.kind is not kinds[-1]:
            return False
        if event.kind is Kind.FEEDBACK:
            return self._is_own(part, kinds[:-1], batch)
        sent = batch_from_binary(event.body) if event.form == BINARY_FORM else batch_from_json(event.body)
        number = part["batch"] + kinds.count(Kind.TRAIN) - 1
        planned = batch[number * self.settings.lote : (number + 1) * self.settings.lote]
        same = np.array_equal(sent.input_data, planned.input_data) and np.array_equal(sent.labels, planned.labels)
        return same and sent.epochs == self.settings.epocas

    def _tell_session(self, session: Session, batch: Vectors, *, resumed: bool) -> None:
        self.tally = Tally(retries=self.tally.retries)
        if resumed:
            others = session.get("others", [])
            for record in _events(self._order.log):
                seq = record["seq"]
                own = seq >= session["first_seq"] and not any(first <= seq <= last for first, last in others)
                if record["event"] == "rebase" or own:
                    self.tally.add(record)
        self._vectors_before = self.tally.vectors
        self._record(
            "session",
            run=self._order.run,
            session=session["number"],
            batches=session["batches"],
            done=self._events_left(session)[0],
            samples=len(batch),
            lote=self.settings.lote,
            epochs=self.settings.epocas,
            source=self.settings.datos.name if self.settings.datos else self.settings.tipo,
            resumed=resumed,
        )

    def _events_left(self, session: Session) -> tuple[int, list[Kind]]:
        """How many batches of the session are in the journal or were discarded, and the events that are to come."""
        part, kinds = self._planned(session)
        written = self._journal.last_seq - part["first_seq"] + 1
        return part["batch"] + kinds[:written].count(Kind.TRAIN), kinds[written:]

    def _planned(self, session: Session) -> tuple[Session, list[Kind]]:
        """The part of the session that nothing has cut off yet, and the kinds of its events."""
        part = session.get("part", {**session, "batch": 0})
        count = session["batches"] - part["batch"]
        kinds = [Kind.TRAIN, Kind.FEEDBACK] * count if self.settings.feedback else [Kind.TRAIN] * count
        if self.settings.feedback and not part["first_is_judged"]:
            del kinds[1:2]  # the run's first batch has no loss to be compared with
        return part, kinds

    def _part_from(self, batch: int) -> Session:
        """The rest of a session, from that batch of it and the run's next event on."""
        judged = bool(self._latest_answers())
        return {"first_seq": self._journal.last_seq + 1, "batch": batch, "first_is_judged": judged}

    async def train(self, session: Session, batch: Vectors) -> None:
        """Send what the session still lacks."""
        done, left = self._events_left(session)
        settings = self.settings
        if not settings.feedback:
            step = settings.lote * max(1, _VECTORS_AT_ONCE // settings.lote)
            for start in range(done * settings.lote, len(batch), step):
                await self._client.entrenar_multiples_lotes(
                    batch[start : start + step], tamano_lote=settings.lote, epocas=settings.epocas
                )
            return
        answers = self._latest_answers()
        for kind in left:
            if kind is Kind.TRAIN:
                part = batch[done * settings.lote : (done + 1) * settings.lote]
                answers = [*answers[-1:], await self._client.entrenar_lote(part, epocas=settings.epocas)]
                done += 1
            else:
                before, now = (number_in(answer, "loss") for answer in answers)
                if before is None or now is None:  # a plain v4.0 worker does not always say: then nothing is known
                    continue
                await self._client.enviar_feedback(answers[-1]["dendrites"], validacion=now < before)

    def _latest_answers(self) -> list[dict[str, Any]]:
        """The answers to the run's latest batches, at most two of them, the latest last."""
        return [orjson.loads(answer) for answer in self._journal.latest_answers(Kind.TRAIN, 2)]

    async def read_metrics(self) -> dict[str, Any] | None:
        """The worker's metrics, when they were asked for."""
        if not self.settings.metricas:
            return None
        metrics = await self._client.obtener_metricas()
        self._record("metrics", **metrics)
        return metrics

    def close_session(self, session: Session, seconds: float) -> dict[str, Any]:
        """Note that the session has ended; its numbers."""
        self._journal.sessions = [*self._journal.sessions[:-1], session | {"done": True}]
        numbers = {"run": self._order.run, "session": session["number"], **self.tally.numbers(), "seconds": seconds}
        trained = self.tally.vectors - self._vectors_before
        numbers["vectors_per_second"] = round(trained / seconds, 1) if seconds else None
        self._record("done", **numbers)
        return numbers


def load_data(settings: Settings, session: int) -> Vectors:
    """The vectors of a run's session: the same settings and number give the same bytes, another number others.

    A file's rows come in an order that the seed and the session decide; those of a ``.npy`` stay on the disk until
    their batch is made. Raises :class:`ResourceError` when they do not fit in memory.
    """
    try:
        return _load_data(settings, (settings.semilla, session))
    except MemoryError as error:
        raise ResourceError(
            _("Los vectores de la sesión no caben en la memoria."),
            mend=_("Da menos con --muestras, en varias sesiones."),
        ) from error


def _load_data(settings: Settings, seed: tuple[int, int]) -> Vectors:
    if settings.datos is None:
        generator = GeneradorDatosEntrenamiento(seed)
        return generator.generar(settings.tipo, settings.count or 0, settings.anomalias / 100)
    from sheily_train.core.omega.vectors import read_vectors

    batch = read_vectors(settings.datos, stride=settings.paso or VECTOR, label_column=settings.etiquetas)
    return Shuffled(batch, np.random.default_rng(seed).permutation(len(batch))[: settings.count])


def _sha256(file: Path) -> str:
    try:
        return durable.sha256_file(file)
    except OSError as error:
        raise RequestError(
            _("No se puede leer {file}: {reason}.").format(file=file, reason=error.strerror),
            mend=_("Da con --datos un archivo .npy, .npz, .csv o .parquet."),
        ) from error


def _left_behind(session: Session) -> str:
    return _("La sesión {number} quedó a medias y tenía otros ajustes; empieza otra.").format(number=session["number"])


def _others_sent(run: str, count: int, session: int) -> str:
    return ngettext(
        "Otro programa envió {count} evento a «{run}» desde el corte; la sesión {session} sigue tras él.",
        "Otro programa envió {count} eventos a «{run}» desde el corte; la sesión {session} sigue tras ellos.",
        count,
    ).format(count=count, run=run, session=session)


def _events(log: Path) -> Iterator[Record]:
    """The records of a log that tell of an event, or of a return to one."""
    if log.is_file():
        yield from (record for record in runlog.read(log) if record["event"] in {"step", "feedback", "rebase"})
