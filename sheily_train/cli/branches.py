"""``sheily branches``: list, show, check and import."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sheily_train.cli.options import branches_dir_option, debug_option, json_option, models_dir_option
from sheily_train.i18n import _

if TYPE_CHECKING:
    from sheily_train.core.branches.catalog import Branch
    from sheily_train.core.branches.examples import Example, Problem

_STATES = {"none": _("sin entrenar"), "current": _("al día"), "stale": _("desfasado")}
_ROLES = {"system": _("sistema"), "user": _("usuario"), "assistant": _("asistente")}
_UNKNOWN_FORMAT = "?"


@click.group(help=_("Ramas: verlas, comprobarlas y llenarlas."))
def branches() -> None:
    """Hold the commands."""


@branches.command("list", help=_("Lista las ramas con sus ejemplos y el estado de su modelo."))
@branches_dir_option
@models_dir_option
@json_option
@debug_option
def list_command(branches_dir: Path, models_dir: Path, as_json: bool) -> None:
    """List the branches."""
    print_branches(branches_dir, models_dir, as_json)


def print_branches(branches_dir: Path, models_dir: Path, as_json: bool) -> None:
    """Print every branch: name, files, examples, held-out examples, format, state of its model.

    Rows are counted, not parsed: the format is that of each file's first usable row.
    """
    listing = _listing(branches_dir, models_dir)
    if as_json:
        _print_json(listing)
        return
    header = [_("RAMA"), _("ARCHIVOS"), _("EJEMPLOS"), _("RESERVADOS"), _("FORMATO"), _("MODELO")]
    rows = [
        [
            *(str(entry[key]) for key in ("name", "files", "examples", "held_out")),
            ", ".join(entry["formats"]) or _UNKNOWN_FORMAT,
            _STATES[entry["state"]],
        ]
        for entry in listing
    ]
    _print_table(header, rows) if sys.stdout.isatty() else _print_aligned([header, *rows])


def _listing(branches_dir: Path, models_dir: Path) -> list[dict[str, Any]]:
    from sheily_train.core.branches import catalog, examples

    return [
        {
            "name": branch.name,
            "files": len(branch.training_files) + len(branch.evaluation_files),
            "examples": sum(map(catalog.count_rows, branch.training_files)),
            "held_out": sum(map(catalog.count_rows, branch.evaluation_files)),
            "formats": sorted({found for file in branch.training_files if (found := examples.file_format(file))}),
            "state": _state(branch, models_dir),
        }
        for branch in catalog.find_branches(branches_dir)
    ]


@branches.command(help=_("Muestra una rama: archivos, estado, descripción y un par de filas."))
@click.argument("name", metavar=_("RAMA"))
@branches_dir_option
@models_dir_option
@json_option
@debug_option
def show(name: str, branches_dir: Path, models_dir: Path, as_json: bool) -> None:
    """Show a branch."""
    from sheily_train.core.branches import catalog

    branch = catalog.find_branch(branches_dir, name)
    facts = {
        "name": branch.name,
        "folder": catalog.shown_path(branch.folder),
        "state": _state(branch, models_dir),
        "description": catalog.read_description(branch),
        "files": _files(branch),
    }
    samples = _samples(branch)
    if as_json:
        turns = [[{"role": turn.role, "content": turn.content} for turn in sample.turns] for sample in samples]
        _print_json({**facts, "samples": turns})
    else:
        _print_facts(facts, samples)


def _files(branch: Branch) -> list[dict[str, Any]]:
    from sheily_train.core.branches import catalog, examples

    return [
        {
            "file": file.relative_to(branch.folder).as_posix(),
            "rows": catalog.count_rows(file),
            "format": examples.file_format(file),
            "bytes": file.stat().st_size,
        }
        for file in (*branch.training_files, *branch.evaluation_files)
    ]


def _samples(branch: Branch, count: int = 2) -> list[Example]:
    from itertools import islice

    from sheily_train.core.branches.examples import Example, read_file

    items = (item for file in branch.training_files for _line, item in read_file(file))
    return list(islice((item for item in items if isinstance(item, Example)), count))


def _print_facts(facts: dict[str, Any], samples: Iterable[Example]) -> None:
    from sheily_train.core.branches.examples import excerpt

    click.echo(_("{name}: modelo {state}").format(name=facts["name"], state=_STATES[facts["state"]]))
    click.echo(facts["folder"])
    for key, value in facts["description"].items():
        shown = " / ".join(map(str, value.values())) if isinstance(value, dict) else value  # a text per language
        click.echo(f"  {excerpt(key)}: {excerpt(shown, 1000)}")
    click.echo()
    _print_aligned(
        [
            [_("ARCHIVO"), _("FILAS"), _("BYTES"), _("FORMATO")],
            *([e["file"], str(e["rows"]), str(e["bytes"]), e["format"] or _UNKNOWN_FORMAT] for e in facts["files"]),
        ]
    )
    for sample in samples:
        click.echo("\n" + sample.source)
        for turn in sample.turns:
            click.echo(f"  {_ROLES[turn.role]}: {excerpt(turn.content, 300)}")


@branches.command(help=_("Comprueba las filas de todas las ramas, o de las nombradas. Sale con 1 si algo va mal."))
@click.argument("names", metavar=_("[RAMA]…"), nargs=-1)
@click.option(
    "--max-characters",
    type=click.IntRange(1),
    metavar=_("ENTERO"),
    help=_("Avisa de las filas más largas. [por defecto: 4000]"),
)
@click.option(
    "--limit",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    metavar=_("ENTERO"),
    help=_("Hallazgos que se muestran como mucho; 0, todos."),
)
@branches_dir_option
@json_option
@debug_option
def check(names: tuple[str, ...], max_characters: int | None, limit: int, branches_dir: Path, as_json: bool) -> int:
    """Check branches."""
    from sheily_train.core.branches import catalog, checks

    if names:
        chosen, problems = [catalog.find_branch(branches_dir, name) for name in dict.fromkeys(names)], []
    else:
        chosen, problems = catalog.find_branches(branches_dir), checks.check_folder(branches_dir)
    problems += checks.check_branches(chosen, max_characters=max_characters or checks.MAX_CHARACTERS)
    rows = sum(
        catalog.count_rows(file) for branch in chosen for file in branch.training_files + branch.evaluation_files
    )
    if as_json:
        _print_json({"branches": len(chosen), "rows": rows, "problems": [_as_json(problem) for problem in problems]})
    else:
        _print_problems(problems, limit or len(problems))
        errors = sum(problem.is_error for problem in problems)
        click.echo(
            _("Ramas: {branches}; filas: {rows}; errores: {errors}; avisos: {warnings}.").format(
                branches=len(chosen), rows=rows, errors=errors, warnings=len(problems) - errors
            )
        )
    return 1 if problems else 0


def _as_json(problem: Problem) -> dict[str, Any]:
    return {
        "code": problem.code,
        "severity": "error" if problem.is_error else "warning",
        "file": str(problem.file),
        "line": problem.line or None,
        "found": problem.found,
        "expected": problem.expected,
        "mend": problem.mend,
    }


def _print_problems(problems: Sequence[Problem], limit: int) -> None:
    for problem in problems[:limit]:
        severity = _("error") if problem.is_error else _("aviso")
        click.echo(f"{problem.place}: {severity} [{problem.code}] {problem}")
    if len(problems) > limit:
        click.echo(_("… y {count} más; con --limit 0 se ven todos.").format(count=len(problems) - limit))


@branches.command(
    "import",
    help=_(
        "Importa filas a una rama, que se crea si no existe. Toma archivos JSONL, CSV, TSV o Parquet, o el nombre de "
        "un conjunto de Hugging Face. Si una sola fila está mal no se escribe nada."
    ),
)
@click.argument("name", metavar=_("RAMA"))
@click.argument("sources", metavar=_("ARCHIVO…"), nargs=-1, required=True)
@click.option(
    "--map",
    "mapping",
    multiple=True,
    metavar=_("CAMPO=COLUMNA,…"),
    help=_("Qué columna es cada campo, como instruction=question,output=answer."),
)
@click.option("--evaluation", is_flag=True, help=_("Las filas son para evaluar, no para entrenar."))
@click.option(
    "--held-out",
    type=click.FloatRange(0, 100, min_open=True, max_open=True),
    metavar=_("PORCENTAJE"),
    help=_("Reserva esta parte de las filas para evaluar; siempre las mismas."),
)
@click.option(
    "--split", default="train", show_default=True, metavar=_("NOMBRE"), help=_("Parte del conjunto de Hugging Face.")
)
@click.option("--subset", metavar=_("NOMBRE"), help=_("Subconjunto (configuración) del conjunto de Hugging Face."))
@click.option("--force", is_flag=True, help=_("Reemplaza los archivos que ya existan."))
@branches_dir_option
@json_option
@debug_option
def import_command(
    name: str,
    sources: tuple[str, ...],
    mapping: tuple[str, ...],
    evaluation: bool,
    held_out: float | None,
    split: str,
    subset: str | None,
    force: bool,
    branches_dir: Path,
    as_json: bool,
) -> None:
    """Import rows."""
    from sheily_train.core.branches.catalog import shown_path
    from sheily_train.core.branches.importer import ImportRequest, import_rows

    if evaluation and held_out:
        raise click.UsageError(_("--evaluation y --held-out no van juntos."))
    request = ImportRequest(
        branches_dir, name, sources, _parse_mapping(mapping), evaluation, held_out or 0.0, split, subset, force
    )
    written = import_rows(request)
    if as_json:
        _print_json(
            [
                {
                    "file": str(file.file),
                    "rows": file.rows,
                    "format": file.format,
                    "unused_columns": file.unused_columns,
                }
                for file in written
            ]
        )
        return
    for file in written:
        shown = shown_path(file.file)
        click.echo(_("{file}: filas: {rows}; formato: {format}").format(file=shown, rows=file.rows, format=file.format))
        if file.unused_columns:
            click.echo("  " + _("columnas sin usar: {columns}").format(columns=", ".join(file.unused_columns)))
    click.echo(_("Compruébalas con: sheily branches check {name}").format(name=name))


def _parse_mapping(texts: Iterable[str]) -> dict[str, str]:
    mapping: dict[str, str] = {}
    for pair in ",".join(texts).split(",") if texts else ():
        field, equals, column = (part.strip() for part in pair.partition("="))
        if not (field and equals and column):
            raise click.BadParameter(
                _("«{pair}» no es CAMPO=COLUMNA, como instruction=question,output=answer.").format(pair=pair),
                param_hint="--map",
            )
        mapping[field] = column
    return mapping


def _state(branch: Branch, models_dir: Path) -> str:
    from sheily_train.core.branches.catalog import data_hash
    from sheily_train.core.training.specialist import state_of

    return state_of(models_dir / branch.name, data_hash(branch))


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))  # TOML has dates


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for column, title in enumerate(header):
        table.add_column(title, justify="right" if 0 < column < 4 else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def _print_aligned(rows: Sequence[Sequence[str]]) -> None:
    """Plain lines whose columns begin at the same place, two spaces apart at least; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if cell.isdigit() else cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        )
        click.echo("  ".join(cells).rstrip())
