"""``sheily ask``: a question to a specialist, alone or beside its base."""

from __future__ import annotations

from pathlib import Path

import click

from sheily_train import paths
from sheily_train.cli.options import debug_option, device_option, models_dir_option
from sheily_train.i18n import _


@click.command(help=_("Pregunta al especialista de una rama. La respuesta sale según se escribe."))
@click.argument("branch", metavar=_("RAMA"))
@click.argument("question", metavar=_("PREGUNTA"))
@click.option("--compare", is_flag=True, help=_("Muestra también lo que responde la base, lado a lado."))
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    metavar=_("ENTERO"),
    help=_("Tokens de la respuesta como mucho."),
)
@device_option
@models_dir_option
@debug_option
def ask(branch: str, question: str, compare: bool, max_tokens: int, device: str, models_dir: Path) -> None:
    """Answer a question."""
    from sheily_train.core.training.evaluation import ask_specialist, open_specialist

    folder = models_dir / branch
    loaded = open_specialist(folder, branch, device)
    if not compare:
        ask_specialist(loaded, question, max_new_tokens=max_tokens, on_text=lambda text: click.echo(text, nl=False))
        click.echo()
        return
    with loaded.base() as base:
        before = ask_specialist(base, question, max_new_tokens=max_tokens)
    after = ask_specialist(loaded, question, max_new_tokens=max_tokens)
    _show_both(question, before, after)
    _show_summary(folder)


def _show_both(question: str, before: str, after: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(question), show_lines=True, expand=True)
    table.add_column(_("Base"), ratio=1)
    table.add_column(_("Especialista"), ratio=1)
    table.add_row(Text(before), Text(after))  # an answer may hold brackets
    Console(highlight=False).print(table)


def _show_summary(folder: Path) -> None:
    from sheily_train import durable
    from sheily_train.cli.summary import print_result

    metrics = durable.read_json(folder / paths.TRAINING_METRICS) or {}
    config = durable.read_json(folder / paths.TRAINING_CONFIG) or {}
    print_result(metrics, folder, config["log"])
