"""What the Colab cell does first: it installs the packages that are missing, before anything imports them."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib import metadata

from sheily_train.i18n import _


def install_missing(requirements: list[str]) -> None:
    """Install what is absent or too old; without anything to install, nothing is started.

    pip is given all of them even if one is missing, so that it keeps them compatible; it leaves the others as they are.

    Args:
        requirements: in the form ``fastapi>=0.128``.

    Raises:
        SystemExit: pip failed, or a package that this process already uses was replaced.
    """
    missing = [requirement for requirement in requirements if _is_missing(requirement)]
    if not missing:
        return
    print(_("Instalando: {packages}").format(packages=", ".join(missing)))
    in_use = [module for module in map(_module_of, missing) if module in sys.modules]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(
            _("pip no pudo instalar {packages}:\n{words}").format(
                packages=", ".join(missing), words=done.stdout.strip()[-2000:]
            )
        )
    importlib.invalidate_caches()
    if in_use:
        raise SystemExit(
            _(
                "Se actualizaron paquetes que ya estaban en uso: {packages}. Reinicia la sesión (en Colab: "
                "Entorno de ejecución → Reiniciar sesión) y ejecuta otra vez la celda."
            ).format(packages=", ".join(in_use))
        )


def _is_missing(requirement: str) -> bool:
    name, _sign, least = requirement.partition(">=")
    try:
        return _version_numbers(metadata.version(name)) < _version_numbers(least)
    except metadata.PackageNotFoundError:
        return True


def _module_of(requirement: str) -> str:
    return requirement.partition(">=")[0].replace("-", "_")


def _version_numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
