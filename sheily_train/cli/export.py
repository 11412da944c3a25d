"""``sheily export``: a specialist as a plain model folder."""

from __future__ import annotations

from pathlib import Path

import click

from sheily_train.cli.options import debug_option, models_dir_option
from sheily_train.i18n import _


@click.command(help=_("Exporta un especialista para usarlo en otra parte."))
@click.argument("branch", metavar=_("RAMA"))
@click.option("--merge", is_flag=True, help=_("Suma el adaptador a la base: una carpeta de modelo corriente."))
@click.option(
    "--output", type=click.Path(path_type=Path), metavar=_("CARPETA"), help=_("Por defecto, <modelo>-merged.")
)
@click.option("--force", is_flag=True, help=_("Sustituye una exportación anterior."))
@models_dir_option
@debug_option
def export(branch: str, merge: bool, output: Path | None, force: bool, models_dir: Path) -> None:
    """Write the merged model."""
    from sheily_train.core.training.specialist import require_config
    from sheily_train.errors import RequestError

    require_config(models_dir / branch, branch)
    if not merge:
        raise RequestError(
            _("El especialista ya está listo para usarse en {folder}.").format(folder=models_dir / branch),
            mend=_("Si es un adaptador y hace falta una carpeta de modelo completa, añade --merge."),
        )
    from sheily_train.core.training.export import merge_specialist

    folder = merge_specialist(models_dir / branch, branch, output or models_dir / f"{branch}-merged", force=force)
    click.echo(_("Modelo completo en {folder}").format(folder=folder))
