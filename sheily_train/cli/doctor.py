"""``sheily doctor``, which is also ``./verificar_setup_colab.sh``."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from sheily_train.cli.options import debug_option, json_option
from sheily_train.i18n import _

if TYPE_CHECKING:
    from sheily_train.colab.findings import Check

_MARKS = {"ok": "✓", "aviso": "!", "mal": "✗"}
_PLAIN_MARKS = {"ok": "+", "aviso": "!", "mal": "x"}
_COLOURS = {"ok": "green", "aviso": "yellow", "mal": "red"}
_NAME_WIDTH = 11


@click.command(help=_("Comprueba que todo está a punto para entrenar en Colab. De lo que no, dice cómo arreglarlo."))
@click.argument("url", required=False, metavar=_("[URL]"))
@click.option("--token", metavar=_("TOKEN"), help=_("El token del trabajador, si la dirección no lo lleva."))
@click.option("--torch", "with_torch", is_flag=True, help=_("Carga también PyTorch y di qué dispositivos ve."))
@json_option
@debug_option
def doctor(url: str | None, token: str | None, with_torch: bool, as_json: bool) -> int:
    """Print every check as it is made; 1 when something is bad."""
    from sheily_train.colab.doctor import examine
    from sheily_train.colab.findings import State

    checks = []
    for check in examine(url, token, with_torch=with_torch):
        checks.append(check)
        if not as_json:
            _show(check)
    counts = Counter(check.state for check in checks)
    if as_json:
        content = {"ok": not counts[State.BAD], "checks": [asdict(check) for check in checks]}
        click.echo(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        _echo(
            _("{good} bien, {warnings} con aviso, {bad} mal.").format(
                good=counts[State.OK], warnings=counts[State.WARNING], bad=counts[State.BAD]
            )
        )
    return 1 if counts[State.BAD] else 0


def _show(check: Check) -> None:
    marks = _MARKS if _can_print("".join(_MARKS.values())) else _PLAIN_MARKS
    mark = click.style(marks[check.state], fg=_COLOURS[check.state])
    _echo(f"{mark} {check.name:<{_NAME_WIDTH}} {check.found}")
    if check.mend:
        _echo(f"  {'':<{_NAME_WIDTH}} → {check.mend}")


def _echo(line: str) -> None:
    """Print a line; a terminal that knows no accents gets the bare letters."""
    if not _can_print(line):
        line = line.replace("→", "->").replace("«", '"').replace("»", '"').replace("…", "...")
        line = unicodedata.normalize("NFKD", line).encode("ascii", "ignore").decode()
    click.echo(line)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
