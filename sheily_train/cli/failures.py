"""How a command tells what went wrong."""

from __future__ import annotations

import traceback

import click


def tell_error(text: str, error: BaseException, *, debug: bool) -> None:
    """Print a text on stderr; with ``debug``, after the traceback of the error and of what caused it."""
    if debug:
        click.echo("".join(traceback.format_exception(error)), nl=False, err=True)
    click.echo(text, err=True)
