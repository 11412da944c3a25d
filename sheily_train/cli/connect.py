"""``sheily connect``, which is also ``./conectar_colab.sh``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sheily_train.cli.options import debug_option, json_option
from sheily_train.i18n import _

if TYPE_CHECKING:
    from sheily_train.colab.connect import Outcome

_TYPES = ("simple", "temporal", "neuronal")
_PRESETS = ("prueba_rapida", "entrenamiento_estandar", "deteccion_anomalias", "entrenamiento_pesado")
_INTEGER, _FILE = _("ENTERO"), _("ARCHIVO")


@click.command(
    help=_("Entrena OMEGA 21 en un trabajador, o sigue donde se cortó. Los vectores los hace, o los lee de un archivo.")
)
@click.argument("url", required=False, metavar=_("[URL]"))
@click.option(
    "--muestras", type=int, metavar=_INTEGER, help=_("Vectores que se envían. [por defecto: 500, o el archivo entero]")
)
@click.option("--lote", type=int, metavar=_INTEGER, help=_("Vectores por lote. [por defecto: 64]"))
@click.option("--tipo", type=click.Choice(_TYPES), help=_("Clase de vectores que se hacen. [por defecto: simple]"))
@click.option("--anomalias", type=float, metavar=_("PCT"), help=_("Anomalías, en tanto por ciento. [por defecto: 10]"))
@click.option("--semilla", type=int, metavar=_INTEGER, help=_("Decide los vectores y su orden. [por defecto: 42]"))
@click.option("--epocas", type=int, metavar=_INTEGER, help=_("Pasadas por cada lote. [por defecto: 1]"))
@click.option("--preset", type=click.Choice(_PRESETS), help=_("Ajustes con nombre; lo que se dé aparte manda."))
@click.option(
    "--datos",
    type=click.Path(path_type=Path),
    metavar=_FILE,
    help=_("Lee los vectores de un archivo (.npy, .npz, .csv, .parquet)."),
)
@click.option("--paso", type=int, metavar=_INTEGER, help=_("Valores entre ventanas, si el archivo es una serie."))
@click.option("--etiquetas", metavar=_("NOMBRE"), help=_("Columna del archivo con las etiquetas 0 y 1."))
@click.option("--diagnostico/--no-diagnostico", default=None, help=_("El trabajador se prueba antes de empezar."))
@click.option("--metricas/--no-metricas", default=None, help=_("Pide las métricas del trabajador al terminar."))
@click.option("--feedback/--no-feedback", default=None, help=_("Di tras cada lote si la pérdida bajó."))
@click.option(
    "--reporte",
    type=click.Path(path_type=Path),
    metavar=_FILE,
    help=_("Escribe el informe en HTML, JSON y Markdown."),
)
@click.option("--cada", metavar=_("TIEMPO"), help=_("Repite cada 1h, 30m, 45s… hasta Ctrl-C."))
@click.option("--continuar", is_flag=True, help=_("Sigue con la última sesión, con los ajustes que tenía."))
@click.option(
    "--rebase",
    is_flag=True,
    help=_("En otra clase de máquina, vuelve a la última copia común y sigue con los números de esta."),
)
@click.option(
    "--descartar",
    is_flag=True,
    help=_("Quita del diario lo que espera sin aplicar, di cuánto era y termina, sin entrenar."),
)
@click.option("--run", "run", default="principal", show_default=True, metavar=_("NOMBRE"), help=_("Entrenamiento."))
@click.option(
    "--token", metavar="TOKEN", help=_("Token del trabajador, si la dirección no lo lleva; mejor en SHEILY_TOKEN.")
)
@click.option("--quiet", is_flag=True, help=_("Muestra solo los errores."))
@json_option
@debug_option
def connect(
    url: str | None,
    preset: str | None,
    reporte: Path | None,
    cada: str | None,
    continuar: bool,
    rebase: bool,
    descartar: bool,
    run: str,
    token: str | None,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train at a worker."""
    from sheily_train.colab import presets
    from sheily_train.colab.address import find_address
    from sheily_train.colab.connect import Order, discard, seconds_of
    from sheily_train.colab.connect import connect as start
    from sheily_train.tools.monitoring.omega_view import omega_view

    given = {name: value for name, value in settings.items() if value is not None}
    order = Order(
        address=find_address(url, token),
        settings=presets.resolve(preset, given),
        given=settings if preset else given,
        run=run,
        resume=continuar,
        rebase=rebase,
        report=reporte,
        every=seconds_of(cada) if cada else None,
    )
    for warning in order.address.warnings:
        click.echo(_("Aviso: {text}").format(text=warning), err=True)
    with omega_view(sys.stdout, quiet=quiet or as_json) as view:
        if descartar:
            count = discard(order, listeners=(view,))
            if as_json:
                click.echo(json.dumps({"run": run, "discarded": count}, ensure_ascii=False))
            return

        def ended(outcome: Outcome) -> None:
            if as_json:
                click.echo(json.dumps(_as_json(outcome), ensure_ascii=False))
            for line in _files(outcome):
                view({"event": "note", "text": line})

        start(order, listeners=(view,), ended=ended)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {**outcome.numbers, "log": str(outcome.log), "report": [str(file) for file in outcome.report]}


def _files(outcome: Outcome) -> list[str]:
    lines = [_("   Registro: {file}").format(file=outcome.log)]
    if outcome.report:
        lines.append(_("   Informe: {files}").format(files=", ".join(str(file) for file in outcome.report)))
    return lines
