"""``sheily evaluate``: held-out loss of base and specialist, measured now, or of every specialist on every branch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sheily_train import paths
from sheily_train.cli.options import branches_dir_option, debug_option, device_option, json_option, models_dir_option
from sheily_train.i18n import _, ngettext

if TYPE_CHECKING:
    from sheily_train.core.training.matrix import Matrix


@click.command(
    help=_(
        "Mide base y especialista sobre los ejemplos reservados. Da pérdida y perplejidad; con --matrix, la pérdida "
        "de cada especialista en cada rama."
    )
)
@click.argument("branches", metavar=_("RAMA…"), nargs=-1)
@click.option(
    "--matrix",
    "as_matrix",
    is_flag=True,
    help=_("Cada especialista en cada rama (todas las entrenadas si no se nombran), con tabla e imagen."),
)
@device_option
@branches_dir_option
@models_dir_option
@json_option
@debug_option
@click.pass_context
def evaluate(
    context: click.Context,
    branches: tuple[str, ...],
    as_matrix: bool,
    device: str,
    branches_dir: Path,
    models_dir: Path,
    as_json: bool,
) -> None:
    """Print one row per branch."""
    if as_matrix:
        _evaluate_matrix(branches, device, branches_dir, models_dir, as_json)
        return
    if not branches:
        raise click.MissingParameter(ctx=context, param=context.command.params[0])
    from sheily_train.core.training.evaluation import compare_with_base

    rows = [compare_with_base(branch, branches_dir, models_dir / branch, device) for branch in branches]
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    head = (_("Rama"), _("Reservados"), _("Base"), _("Especialista"), _("Cambio"))
    click.echo("{:<24} {:>10} {:>18} {:>18} {:>8}".format(*head))
    for row in rows:
        before, after = row["base"], row["specialist"]
        cells = [f"{part['loss']:.4f} ({part['perplexity']:.1f})" for part in (before, after)]
        change = f"{100 * (after['loss'] / before['loss'] - 1):+.1f} %"
        click.echo(f"{row['branch']:<24} {row['heldout_examples']:>10} {cells[0]:>18} {cells[1]:>18} {change:>8}")


def _evaluate_matrix(
    branches: tuple[str, ...], device: str, branches_dir: Path, models_dir: Path, as_json: bool
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sheily_train.core.training.matrix import measure, trained_branches
    from sheily_train.tools.monitoring.matrix_view import write_picture, write_table

    names = branches or trained_branches(branches_dir, models_dir)
    file = paths.logs_dir() / "matrix"
    columns = (TextColumn(_("Celdas")), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        matrix = measure(
            names,
            branches_dir,
            models_dir,
            file.with_suffix(".jsonl"),
            device=device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    write_table(file.with_suffix(".csv"), matrix)
    write_picture(file.with_suffix(".png"), matrix)
    if as_json:
        click.echo(json.dumps(matrix.to_json(), ensure_ascii=False, indent=2))
    else:
        _print_matrix(matrix)
        click.echo(_("Tabla:  {file}").format(file=file.with_suffix(".csv")))
        click.echo(_("Imagen: {file}").format(file=file.with_suffix(".png")))


def _print_matrix(matrix: Matrix) -> None:
    head = (_("Reservados de"), _("Base"), _("Propio"), _("Cambio"), _("Puesto"), _("El mejor"))
    _print_row(head)
    for name in matrix.names:
        best = matrix.best(name)
        other = "" if best == name else f"{best} ({matrix.loss[best][name]:.4f})"
        own, change = f"{matrix.loss[name][name]:.4f}", f"{100 * matrix.change(name, name):+.1f} %"
        _print_row((name, f"{matrix.base[name]:.4f}", own, change, matrix.rank(name), other or _("el propio")))
    click.echo(
        ngettext(
            "El especialista propio es el mejor en {best} de {count} rama.",
            "El especialista propio es el mejor en {best} de {count} ramas.",
            len(matrix.names),
        ).format(best=matrix.own_best, count=len(matrix.names))
    )


def _print_row(cells: tuple[Any, ...]) -> None:
    click.echo("{:<24} {:>8} {:>8} {:>9} {:>6}  {}".format(*cells))
