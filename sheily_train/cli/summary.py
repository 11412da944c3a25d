"""What a person sees when training has ended: one branch in lines, several in a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sheily_train import paths
from sheily_train.i18n import _

if TYPE_CHECKING:
    from sheily_train.core.training.fleet import Outcome
    from sheily_train.core.training.specialist import TrainingResult


def print_one(result: TrainingResult) -> None:
    """Held-out loss before and after, and where everything lies."""
    branch = result.metrics["branch"]
    if result.skipped:
        click.echo(
            _("{branch} ya estaba entrenada con estos datos y ajustes (--fresh la repite).").format(branch=branch)
        )
    print_result(result.metrics, result.folder, result.log)
    folder = result.folder.absolute()
    elsewhere = "" if folder.parent == paths.models_dir() else f" --models-dir {_word(result.folder.parent)}"
    click.echo(_('Pregunta: sheily ask {name} "…"{elsewhere}').format(name=_word(folder.name), elsewhere=elsewhere))


def print_result(metrics: dict[str, Any], folder: Path, log: Path | str) -> None:
    """Held-out loss before and after, the model's folder and the run's log."""
    click.echo(_("Pérdida reservada: {change}").format(change=loss_change(metrics)))
    click.echo(_("Modelo:   {folder}").format(folder=folder))
    click.echo(_("Registro: {log}").format(log=log))


def _word(text: object) -> str:
    """The text as one word of a command line."""
    return f'"{text}"' if " " in str(text) else str(text)


def print_fleet(outcomes: list[Outcome], log: Path | None) -> None:
    """One row per branch, where the fleet's log is, and how many are ready."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sheily_train.tools.monitoring.fleet_view import STATES

    table = Table(_("Rama"), _("Estado"), _("Pérdida reservada"), _("Segundos"), box=None)
    for outcome in outcomes:
        state = STATES[outcome.state]
        if outcome.result is None:
            table.add_row(outcome.branch, state, Text(str(outcome.error)), "")
        else:
            seconds = f"{outcome.result.metrics['timing']['seconds']:.1f}"
            table.add_row(outcome.branch, state, loss_change(outcome.result.metrics), seconds)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)
    failed = sum(outcome.result is None for outcome in outcomes)
    click.echo(_("Registro: {log}").format(log=log))
    click.echo(_("{done} de {count} ramas listas.").format(done=len(outcomes) - failed, count=len(outcomes)))


def loss_change(metrics: dict[str, Any]) -> str:
    """``3.21 → 2.34 (−27.1 %)``."""
    before, after = metrics["heldout_before"], metrics["heldout_after"]
    if before is None or after is None:
        return _("sin datos reservados")
    change = 100 * (after["loss"] / before["loss"] - 1)
    return f"{before['loss']:.4f} → {after['loss']:.4f} ({change:+.1f} %)"
