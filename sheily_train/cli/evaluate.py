"""``sheily evaluate``: held-out loss of base and specialist, measured now."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sheily_train.cli.options import branches_dir_option, debug_option, device_option, json_option, models_dir_option
from sheily_train.i18n import _


@click.command(help=_("Mide la pérdida y la perplejidad de base y especialista sobre los ejemplos reservados."))
@click.argument("branches", metavar=_("RAMA…"), nargs=-1, required=True)
@device_option
@branches_dir_option
@models_dir_option
@json_option
@debug_option
def evaluate(branches: tuple[str, ...], device: str, branches_dir: Path, models_dir: Path, as_json: bool) -> None:
    """Print one row per branch."""
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
