"""A way in from outside to a port of this machine: cloudflared or ngrok, started, watched and closed.

Both give an address of their own choosing, which changes at every start, and end where a company's server decides; the
worker's token holds there as anywhere. ``ssh -L`` needs none of this.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

from sheily_train.errors import MissingExtraError, RequestError, SheilyError
from sheily_train.i18n import _

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
            _("No se encontró el programa cloudflared."),
            mend=_(
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
            _("{program} no se pudo arrancar: {reason}.").format(program=program, reason=error.strerror),
            mend=_("Instálalo de nuevo, o usa --tunnel ngrok."),
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
            _("cloudflared no dio ninguna dirección. Lo último que dijo: {words}").format(
                words=" / ".join(last_words) or _("nada")
            ),
            mend=_("Prueba otra vez, o usa --tunnel ngrok."),
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
        raise MissingExtraError("pyngrok", "ngrok", _("el túnel de ngrok")) from error
    token = os.environ.get("NGROK_AUTHTOKEN", "").strip()
    if not token:
        raise RequestError(
            _("ngrok pide una cuenta: falta la variable NGROK_AUTHTOKEN."),
            mend=_("Copia tu authtoken de dashboard.ngrok.com y ponlo en NGROK_AUTHTOKEN, o usa --tunnel cloudflared."),
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
            _("ngrok no abrió el túnel: {reason}").format(reason=" ".join(str(error).replace(token, "…").split())),
            mend=_("Comprueba NGROK_AUTHTOKEN y la red, o usa --tunnel cloudflared."),
        ) from None
    return Tunnel(url or "", process, on_death)


def _end_program(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
