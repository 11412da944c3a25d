"""The client of an OMEGA 21 worker, in two forms:

    async with ClienteColabAsincrono(url) as cliente:          with ClienteColabEntrenamiento(url) as cliente:
        await cliente.conectar()                                   cliente.conectar()
        await cliente.entrenar_multiples_lotes(muestras)           cliente.entrenar_multiples_lotes(muestras)
        cliente.mostrar_resumen()                                  cliente.mostrar_resumen()

The blocking one runs the other on an event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import httpx2
from numpy.typing import NDArray

from sheily_train.colab.async_client import DEFAULT_RUN, ClienteColabAsincrono
from sheily_train.colab.journal import Journal
from sheily_train.colab.samples import Samples
from sheily_train.colab.wire import ClientSettings, Record
from sheily_train.errors import RequestError
from sheily_train.i18n import _

__all__ = ["ClientSettings", "ClienteColabAsincrono", "ClienteColabEntrenamiento"]

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


class ClienteColabEntrenamiento:
    """:class:`ClienteColabAsincrono` for code without asyncio, with the same arguments and methods.

    Its event loop runs in a thread of its own until :meth:`desconectar`; a process that ends without it ends all the
    same, and loses nothing.
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
        self._client = ClienteColabAsincrono(
            url, token, transport, run=run, seed=seed, folder=folder, record=record, settings=settings
        )
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(_turn_until_ended(started)), daemon=True)
        self._thread.start()
        self._loop, self._ended = started.result()

    def conectar(self, *, rebase: bool = False) -> dict[str, Any]:
        """See :meth:`ClienteColabAsincrono.conectar`; so for each method below."""
        return self._wait(self._client.conectar, rebase=rebase)

    def entrenar_lote(self, muestras: Samples, epocas: int = 1) -> dict[str, Any]:
        """Train one batch of at most 4,096 vectors; returns the worker's answer."""
        return self._wait(self._client.entrenar_lote, muestras, epocas)

    def entrenar_multiples_lotes(
        self, muestras: Samples, tamano_lote: int = 64, epocas: int = 1
    ) -> list[dict[str, Any]]:
        """Train vectors in batches of ``tamano_lote``; returns the answers, in order."""
        return self._wait(self._client.entrenar_multiples_lotes, muestras, tamano_lote, epocas)

    def enviar_feedback(self, ajustes: Sequence[float] | NDArray[Any], validacion: bool) -> dict[str, Any]:
        """Say what came of applying 16 dendrite adjustments (−1..1); returns the worker's answer."""
        return self._wait(self._client.enviar_feedback, ajustes, validacion)

    def predecir(self, muestras: Samples) -> dict[str, Any]:
        """The anomaly probability of each vector, without training."""
        return self._wait(self._client.predecir, muestras)

    def obtener_estado(self) -> dict[str, Any]:
        """What has been learned so far: the worker's ``/status``."""
        return self._wait(self._client.obtener_estado)

    def obtener_info(self) -> dict[str, Any]:
        """The network's build: ``/info``."""
        return self._wait(self._client.obtener_info)

    def obtener_metricas(self) -> dict[str, Any]:
        """The latest losses and where they go: ``/metricas``."""
        return self._wait(self._client.obtener_metricas)

    def diagnostico(self) -> dict[str, Any]:
        """Let the worker pass a test vector through the network: ``/diagnostico``."""
        return self._wait(self._client.diagnostico)

    def descargar_estado(self) -> Path:
        """Fetch the run's whole state now, verified and durable; returns the file."""
        return self._wait(self._client.descargar_estado)

    def descartar_pendientes(self) -> int:
        """Remove from the journal what waits there and the worker has not applied; returns how many events."""
        return self._wait(self._client.descartar_pendientes)

    @property
    def journal(self) -> Journal:
        """The run's journal; see :attr:`ClienteColabAsincrono.journal`."""
        return self._client.journal

    @property
    def plain(self) -> bool:
        """Whether the worker is a plain v4.0."""
        return self._client.plain

    def obtener_historial(self) -> list[dict[str, Any]]:
        """Every answer of the run, oldest first, each with its ``seq`` and ``kind`` (train, feedback)."""
        return self._client.obtener_historial()

    def mostrar_resumen(self) -> str:
        """Print, and return, what this client's batches came to."""
        return self._client.mostrar_resumen()

    def desconectar(self) -> None:
        """Close connections, journal and event loop. Again: nothing."""
        if not self._thread.is_alive():
            return
        try:
            self._wait(self._client.desconectar)
        finally:
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.desconectar()

    def _wait(
        self,
        method: Callable[_Arguments, Coroutine[Any, Any, _Result]],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result:
        """The method's result; what interrupts the waiting (Ctrl-C) stops the method too."""
        if not self._thread.is_alive():
            raise RequestError(_("El cliente está desconectado."), mend=_("Crea otro."))
        running = asyncio.run_coroutine_threadsafe(method(*args, **kwargs), self._loop)
        try:
            return running.result()
        except BaseException:
            running.cancel()
            raise


async def _turn_until_ended(started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    """Keep the event loop turning until the event that it hands over is set."""
    ended = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), ended))
    await ended.wait()
