"""The ``sheily`` command: one file a command, imports inside the bodies, so that ``--help`` loads nothing heavy."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import NoReturn

import click

from sheily_train import __version__, durable
from sheily_train.cli.ask import ask
from sheily_train.cli.branches import branches
from sheily_train.cli.connect import connect
from sheily_train.cli.doctor import doctor
from sheily_train.cli.evaluate import evaluate
from sheily_train.cli.export import export
from sheily_train.cli.failures import tell_error
from sheily_train.cli.models import models
from sheily_train.cli.spanish import name_placeholders, teach_click_spanish
from sheily_train.cli.train import train
from sheily_train.cli.worker import worker
from sheily_train.errors import INTERNAL_ERROR, ResourceError, SheilyError, internal_error_text
from sheily_train.i18n import _

teach_click_spanish()


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, help=_("Especialistas por ramas, y OMEGA 21."))
@click.version_option(__version__, prog_name="sheily", message="%(prog)s %(version)s")
def sheily() -> None:
    """Hold the commands."""


for command in (train, branches, models, evaluate, ask, export, worker, connect, doctor):
    sheily.add_command(command)
name_placeholders(sheily)


def run(command: click.Command, arguments: Sequence[str] | None = None, prog: str = "sheily") -> NoReturn:
    """Run a command and leave with its exit code.

    Errors of the program's own family become one line on stderr. ``--debug`` anywhere on the line, or
    ``SHEILY_DEBUG=1``, shows their traceback before it; commands find it as their context's ``obj``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("SHEILY_DEBUG") == "1"
    try:
        code = command.main(
            [word for word in words if word != "--debug"], prog_name=prog, standalone_mode=False, obj=debug
        )
    except SheilyError as error:
        tell_error(_("Error: {error}").format(error=error), error, debug=debug)
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = error.exit_code
    except click.ClickException as error:
        usage = error.ctx.get_usage() + "\n" if isinstance(error, click.UsageError) and error.ctx else ""
        click.echo(usage + _("Error: {error}").format(error=error.format_message()), err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        tell_error(_("Interrumpido."), error, debug=debug)
        code = 130
    except Exception as error:
        if isinstance(error, OSError) and durable.is_full_disk(error):
            text, code = _full_disk_text(error), ResourceError.exit_code
        else:
            text, code = internal_error_text(error), INTERNAL_ERROR
        tell_error(_("Error: {error}").format(error=text), error, debug=debug)
    sys.exit(code if isinstance(code, int) else 0)


def _full_disk_text(error: OSError) -> str:
    return _("El disco está lleno ({error}). Libera espacio y repite la orden; lo que había sigue intacto.").format(
        error=error
    )


def main(command: click.Command = sheily, prog: str = "sheily") -> NoReturn:
    """Run a command as the whole work of this process.

    torch and transformers load a million objects that stay. Going through them for garbage, again and again while they
    load and once more at the end, took a quarter of a short command's time.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a pipe that knows no «→» gets a question mark
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)
    run(command, prog=prog)
