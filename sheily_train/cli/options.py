"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sheily_train import paths
from sheily_train.i18n import _

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _path_option(name: str, default: Callable[[], Path], help_text: str) -> Decorator:
    return click.option(name, type=click.Path(path_type=Path), default=default, metavar=_("CARPETA"), help=help_text)


branches_dir_option = _path_option("--branches-dir", paths.branches_dir, _("Carpeta de las ramas."))
models_dir_option = _path_option("--models-dir", paths.models_dir, _("Carpeta con un modelo por rama."))
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help=_("Dispositivo.")
)
json_option = click.option("--json", "as_json", is_flag=True, help=_("Da el resultado como JSON."))
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, help=_("Muestra la traza completa de los errores.")
)
