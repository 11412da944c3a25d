"""Is everything in place to train on a borrowed GPU: this machine, the project's files, the worker; if not, what to do.

Nothing here changes anything: of a worker only what can be read is read. Packages are imported where they are used, so
that the doctor can still speak when some are missing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from sheily_train.colab import local_checks, worker_checks
from sheily_train.colab.findings import Check, Checks, State, hidden
from sheily_train.errors import SheilyError
from sheily_train.i18n import _


def examine(
    argument: str | None = None,
    token: str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    with_torch: bool = False,
) -> Checks:
    """Look at everything, in order; each check comes as soon as it is known, and none of them shows the token.

    Args:
        argument: the worker's address; else the environment's or that of the ``.env`` of ``folder``, if any.
        token: its token, when the address does not carry it.
        environment: the process's own unless given.
        folder: the current folder unless given.
        with_torch: load torch, which takes seconds, and ask it for its devices.
    """
    environment = os.environ if environment is None else environment
    secrets = _tokens_in(argument, *environment.values()) | {token or ""}
    checks: list[tuple[str, Callable[[], Checks]]] = [
        (_("Python"), local_checks.python),
        (_("Paquetes"), local_checks.packages),
        (_("Archivos"), local_checks.files),
        (_("Permisos"), local_checks.permissions),
        (_("Disco"), local_checks.disk),
        (_("Memoria"), local_checks.memory),
        (_("GPU"), local_checks.gpu),
        *([(_("PyTorch"), local_checks.torch)] if with_torch else []),
        (_("Escritura"), local_checks.writable),
        (_("Diarios"), local_checks.journals),
        (_("Trabajador"), partial(worker_checks.worker, argument, token, environment, folder or Path.cwd())),
    ]
    for name, check in checks:
        yield from hidden(_guarded(name, check), secrets)


def _guarded(name: str, check: Callable[[], Checks]) -> Checks:
    """The check's findings; one that cannot be made is a finding itself, and the rest goes on."""
    try:
        yield from check()
    except SheilyError as error:
        yield Check(name, State.BAD, error.message, error.mend or _("Corrígelo y repite."))
    except ModuleNotFoundError as error:
        yield Check(
            name, State.BAD, _("Falta el paquete «{package}».").format(package=error.name), local_checks.install_line()
        )
    except Exception as error:  # a doctor that falls ill is of no use
        kind, text = type(error).__name__, " ".join(str(error).split())
        found = _("No se pudo comprobar: {kind}: {text}").format(kind=kind, text=text)
        yield Check(name, State.BAD, found, _("Lo demás se ha comprobado; si se repite, avisa con esta línea."))


def _tokens_in(*texts: str | None) -> set[str]:
    """The tokens in addresses, as they are written and as they are meant."""
    written = [found for text in texts if text for found in re.findall(r"token=([^&\s\"']+)", text)]
    return {*written, *map(unquote, written)}
