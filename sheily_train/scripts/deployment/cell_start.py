"""What the Colab cell does last: it finds or fetches a tunnel, starts the worker and shows its address."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import urllib.request
from contextlib import suppress
from http.client import HTTPException as BrokenDownload
from pathlib import Path

from sheily_train.colab.serve import BackgroundWorker, start_in_background
from sheily_train.colab.tunnels import TunnelKind
from sheily_train.colab.worker import WorkerSettings
from sheily_train.durable import write_bytes
from sheily_train.errors import RequestError, SheilyError
from sheily_train.i18n import _
from sheily_train.scripts.deployment.cell_packages import install_missing

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
            farewell=_("Para guardar y parar: trabajador.stop(). Si ejecutas otra vez la celda, sigue donde estaba."),
        )
    except SheilyError as error:
        flags = _("En esta celda, --tunnel es TUNEL, --port es PUERTO y --state-dir es CARPETA.")
        raise SystemExit(f"{error}\n{flags}" if "--" in str(error) else str(error)) from None


def _choose_tunnel(wanted: str, programs: Path, ngrok_package: str) -> TunnelKind:
    """The tunnel to open, with its program in place; for ``auto`` the first of cloudflared and ngrok that works."""
    if wanted == "none":
        return "none"
    if wanted not in ("auto", "cloudflared", "ngrok"):
        raise RequestError(
            _("TUNEL es «{found}»; se esperaba auto, cloudflared, ngrok o none.").format(found=wanted),
            mend=_("Corrígelo al principio de la celda."),
        )
    if wanted in ("auto", "cloudflared") and (_have_cloudflared(programs) or wanted == "cloudflared"):
        return "cloudflared"
    if wanted in ("auto", "ngrok") and (_have_ngrok_token() or wanted == "ngrok"):
        install_missing([ngrok_package])
        return "ngrok"
    raise RequestError(
        _("No hay túnel: cloudflared no está ni se pudo descargar, y falta NGROK_AUTHTOKEN."),
        mend=_(
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
        print(_("Descargando cloudflared de {url}").format(url=url))
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as answer:  # noqa: S310 - a constant
                write_bytes(program, answer.read())
        except (OSError, BrokenDownload) as error:
            print(_("No se pudo descargar: {reason}").format(reason=error))
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
