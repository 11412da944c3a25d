"""``sheily worker``: OMEGA 21 on this machine, for clients anywhere."""

from __future__ import annotations

from pathlib import Path

import click

from sheily_train import paths
from sheily_train.cli.options import debug_option
from sheily_train.i18n import _


@click.command(help=_("Atiende entrenamientos de OMEGA 21 en esta máquina. Muestra la dirección que copiar."))
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar=_("NOMBRE"), help=_("Dirección en la que escucha.")
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    metavar=_("ENTERO"),
    help=_("Puerto; 0 toma uno libre."),
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=lambda: paths.omega_dir() / "worker",
    metavar=_("CARPETA"),
    help=_("Carpeta del estado; sin ella, var/omega/worker."),
)
@click.option(
    "--tunnel",
    type=click.Choice(["cloudflared", "ngrok", "none"]),
    default="none",
    show_default=True,
    help=_("Túnel que da una dirección pública."),
)
@click.option(
    "--token",
    metavar=_("TEXTO"),
    help=_("Token que pedir; mejor en SHEILY_WORKER_TOKEN, que nadie más ve. Sin él se hace uno y se guarda."),
)
@click.option("--no-auth", is_flag=True, help=_("No pide token; solo en la propia máquina."))
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help=_("Dispositivo.")
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    metavar=_("ENTERO"),
    help=_("Semilla de los clientes que no dan la suya."),
)
@debug_option
def worker(
    host: str, port: int, state_dir: Path, tunnel: str, token: str | None, no_auth: bool, device: str, seed: int
) -> None:
    """Serve until Ctrl-C or SIGTERM, then save."""
    from sheily_train.colab.serve import serve
    from sheily_train.colab.worker import WorkerSettings

    settings = WorkerSettings(state_dir=state_dir.resolve(), token=token, device=device, seed=seed)
    serve(settings, host=host, port=port, tunnel=tunnel, no_auth=no_auth, notify=click.echo)  # type: ignore[arg-type]
