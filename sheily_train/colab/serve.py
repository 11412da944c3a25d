"""A worker put on the net: its folder locked, its token made, its port open, its address shown, its end in good order.

The server always runs in a thread of its own with a loop of its own, so that it starts as well beside a running loop
(a Colab cell); in a terminal the main thread only waits for a signal.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Self

import h11
import torch
import uvicorn
from filelock import FileLock, Timeout
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sheily_train.colab.loopback import is_loopback
from sheily_train.colab.security import check_token, new_token, refusal_messages
from sheily_train.colab.tunnels import Tunnel, TunnelKind, open_tunnel
from sheily_train.colab.worker import WorkerApp, WorkerSettings, create_app
from sheily_train.durable import make_folder, sync_folder
from sheily_train.errors import BusyError, Interrupted, RefusedError, RequestError, SheilyError
from sheily_train.i18n import _

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
    farewell = _("Ctrl-C guarda y sale.")
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
    notify(_("Guardado en {folder}. La misma orden sigue donde quedó.").format(folder=settings.state_dir))


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
        stop_or = farewell or _("Para guardar y parar, llama a su método stop().")
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
            notify(_("Aviso: sin túnel ni ssh -L, lo que se envía a {host} viaja sin cifrar.").format(host=host))
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
    delete = "" if given else _("Borra {file}, y el trabajador hará otro.").format(file=path)
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
                raise SheilyError(_("El trabajador no arrancó: {reason}.").format(reason=self._failure))

    def stop(self) -> None:
        """Finish the answers in hand, then let the app save its state. Again: nothing."""
        self._server.should_exit = True
        if self.ident is not None:
            self.join()
        try:
            self._app.close()
        except OSError as error:
            raise SheilyError(
                _("El trabajador no pudo guardar su estado: {reason}.").format(reason=error.strerror or error),
                mend=_("Haz sitio en el disco; lo que falte lo repone el cliente desde su diario."),
            ) from error
        if self._failure is not None:
            raise SheilyError(_("El trabajador dejó de atender: {reason}.").format(reason=self._failure))


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
        _("El trabajador se para antes de poder responder."),
        mend=_("Repite la petición cuando vuelva."),
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
            _("OMEGA 21 está en marcha. Copia esta dirección entera; quien la tiene puede usar el trabajador:"),
            "",
            address,
            "",
            _("En tu máquina:"),
            f"  sheily connect '{address}'",
            f"  ./conectar_colab.sh '{address}'",
            "",
            _("Estado: {folder}").format(folder=self._settings.state_dir),
            _("Dispositivo: {device}").format(device=_device_in_words(self._settings.device)),
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
        self._screen.notify(_("El túnel se cerró; se abre otro."))
        while not self._closing.wait(_REOPEN_SECONDS):
            with self._lock:
                if self._closing.is_set():
                    return
                try:
                    self._tunnel = self._open()
                except SheilyError as error:
                    self._screen.notify(_("Sigue sin túnel: {error}").format(error=error))
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
            raise Interrupted(_("El trabajador se paró antes de atender."))
        self.stop_asked = True

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _check_exposure(host: str, tunnel: TunnelKind, no_auth: bool, token: str | None) -> None:
    """Refuse a worker without a token where others can reach it."""
    if no_auth and (tunnel != "none" or not is_loopback(host)):
        raise RequestError(
            _("--no-auth solo vale en la propia máquina: sin túnel y con --host 127.0.0.1."),
            mend=_("Quita --no-auth: el token va en la dirección y no hay que escribirlo."),
        )
    if tunnel != "none" and host not in ("127.0.0.1", "localhost", "0.0.0.0"):  # noqa: S104
        raise RequestError(
            _("Un túnel lleva a 127.0.0.1, y --host es {host}.").format(host=host), mend=_("Quita --host o --tunnel.")
        )
    if no_auth and token:
        raise RequestError(_("--no-auth y --token se contradicen."), mend=_("Quita uno de los dos."))


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Hold the state folder for this worker."""
    lock = FileLock(folder / LOCK_FILE, thread_local=False)
    try:
        make_folder(folder)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BusyError(
            _("Otro trabajador usa {folder}.").format(folder=folder),
            mend=_("Páralo, o elige otra carpeta con --state-dir."),
        ) from error
    except OSError as error:
        raise _no_folder(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def _no_folder(folder: Path, error: OSError) -> RequestError:
    return RequestError(
        _("No se puede escribir en {folder}: {reason}.").format(folder=folder, reason=error.strerror),
        mend=_("Elige otra carpeta con --state-dir."),
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
            _("No se puede escuchar en {host}:{port}: {reason}.").format(host=host, port=port, reason=error.strerror),
            mend=_("Elige otro puerto con --port (0 toma uno libre) u otra dirección con --host."),
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
