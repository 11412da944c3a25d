"""Writes the Colab cell: the worker's own modules, one after another, in one file that people can read; and a notebook.

    python -m sheily_train.scripts.deployment.build_colab_cell            write both
    python -m sheily_train.scripts.deployment.build_colab_cell --check    exit 1 when they are not what would be written

The parts follow from the imports of :mod:`~sheily_train.scripts.deployment.cell_start`. Each keeps its text, but for
its imports, which are gathered at the top, and the translation's name ``_``, which other cells of a notebook use for
anything. All parts share one namespace, so a name that two of them define is refused.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import symtable
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from sheily_train.durable import write_bytes
from sheily_train.errors import RequestError, SheilyError
from sheily_train.i18n import _

ROOT = Path(__file__).resolve().parents[3]
CELL_FILE = "COLAB_SERVER_OMEGA21_V4_UNIFICADO.py"
NOTEBOOK_FILE = "COLAB_SERVER_OMEGA21_V4_UNIFICADO.ipynb"

PACKAGE = "sheily_train"
INSTALLER = f"{PACKAGE}.scripts.deployment.cell_packages"
STARTER = f"{PACKAGE}.scripts.deployment.cell_start"
TRANSLATION = f"{PACKAGE}.i18n"
BUILDER = f"{PACKAGE}.scripts.deployment.build_colab_cell"
SPANISH = "_es"
EXPECTED = {"torch", "numpy"}
"""What a borrowed machine has; to install it would take minutes, or another CUDA."""
ON_DEMAND = {"pyngrok"}
"""What is imported by the function that needs it only."""

_WIDTH = 120
_HINT_LINES = 40

_HEAD = """\
# OMEGA 21: el trabajador de Sheily Train en una sola celda
#
# Qué hace: instala lo que falte, arranca en esta máquina la red CortezaCognitivaV4 detrás de una dirección pública con
# token, y muestra esa dirección. Tu PC genera los datos, los envía aquí, y guarda todo lo que hace falta para seguir en
# otra máquina si esta se apaga: aquí no hay nada que perder.
#
# Tres pasos:
#   1. En Colab: Entorno de ejecución → Cambiar tipo de entorno de ejecución → GPU.
#   2. Pega este archivo entero en una celda y ejecútala. Tarda un minuto la primera vez.
#   3. Copia la dirección entera que aparece al final (https://…#token=…) y, en tu PC:
#         ./conectar_colab.sh 'https://…#token=…'
#      Quien tenga esa dirección puede usar el trabajador: no la publiques.
#
# Las condiciones de Colab excluyen de los entornos gratuitos, entre otros usos, el control remoto y los trabajadores de
# cómputo distribuido, y permiten cortarlos sin avisar: para contar con el trabajador hace falta saldo de unidades de
# cómputo, o una máquina de otra clase (https://research.google.com/colaboratory/faq.html).
#
# Licencia: Apache-2.0. SPDX-License-Identifier: Apache-2.0
# Generado a partir de los módulos de sheily_train por sheily_train/scripts/deployment/build_colab_cell.py: los cambios
# se hacen allí.
# ruff: noqa
# fmt: off

from __future__ import annotations

TUNEL = "auto"  # auto (cloudflared y, si no puede ser, ngrok), cloudflared, ngrok, o none: sin dirección pública
PUERTO = 8000  # 0 toma uno libre
CARPETA = "omega21"  # aquí queda el estado; con la misma carpeta, el trabajador sigue donde estaba y con el mismo token
"""

_TRANSLATION_PART = f'''\
def {SPANISH}(text: str) -> str:
    """The text itself: the program's messages are written in Spanish."""
    return text
'''

_STOP = """\
if "trabajador" in globals():
    globals().pop("trabajador").stop()  # la celda se ejecuta otra vez: el de antes guarda su estado y deja el sitio
"""

_START = "trabajador = start_in_cell(TUNEL, PUERTO, CARPETA, ngrok_package={ngrok!r})\n"

_GUIDE = """\
# OMEGA 21 en Colab

1. **Entorno de ejecución → Cambiar tipo de entorno de ejecución → GPU.**
2. Ejecuta la celda de abajo. La primera vez tarda alrededor de un minuto.
3. Copia la dirección entera que aparece al final, con su `#token=…`, y en tu PC: `./conectar_colab.sh 'DIRECCIÓN'`

Si ejecutas la celda otra vez, el trabajador sigue donde estaba. Para pararlo: `trabajador.stop()`. Las condiciones de \
Colab restringen este uso en los entornos gratuitos y permiten cortarlos sin avisar: lee el principio de la celda.
"""


@dataclass(frozen=True)
class Import:
    """One name that an import binds: ``from module import name as bound``, or ``import module as bound``."""

    module: str
    name: str | None
    bound: str

    @property
    def root(self) -> str:
        """The top package, as ``fastapi``."""
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Part:
    """One module of the package, taken apart.

    Attributes:
        title: its file, as people find it.
        intro: its docstring.
        code: the rest, without the imports at its top.
        needs: the package's modules that it imports, in order.
        imports: what it imports at its top from elsewhere, for its types too.
        inner: the packages that its functions import.
        defines: the names that it defines at its top.
    """

    module: str
    title: str
    intro: str
    code: str
    needs: list[str] = field(default_factory=list)
    imports: list[Import] = field(default_factory=list)
    inner: set[str] = field(default_factory=set)
    defines: set[str] = field(default_factory=set)


@click.command(help=_("Escribe la celda de Colab y su cuaderno a partir de los módulos del paquete."))
@click.option("--check", is_flag=True, help=_("Solo comprueba que los archivos están al día; si no, sale con 1."))
def main(check: bool) -> None:
    """Write both files, or check them."""
    try:
        files = generate(ROOT)
    except SheilyError as error:
        raise click.ClickException(str(error)) from error
    stale = False
    for name, content in files.items():
        path = ROOT / name
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        if old == content:
            continue
        stale = True
        if check:
            click.echo(difference(name, old, content))
        else:
            write_bytes(path, content.encode())
            click.echo(_("Escrito: {name}").format(name=name))
    if check and stale:
        click.echo(_("No está al día. Ejecuta: python -m {module}").format(module=BUILDER))
        sys.exit(1)


def generate(root: Path) -> dict[str, str]:
    """The text of each generated file, by its name.

    Args:
        root: a checkout: ``pyproject.toml`` and the package.

    Raises:
        RequestError: a module cannot be a part of the cell; the text names it and says why.
    """
    cell = build_cell(root)
    return {CELL_FILE: cell, NOTEBOOK_FILE: build_notebook(cell)}


def build_cell(root: Path) -> str:
    """The cell's text."""
    parts = collect_parts(root)
    check_names(parts)
    installer, *others = parts
    first = set(installer.imports)
    later = {found for part in others for found in part.imports} - first
    roots = {found.root for found in first | later} - sys.stdlib_module_names
    check_inner(parts, roots)
    requirements, ngrok = read_requirements(root, roots - EXPECTED)
    wanted = "".join(f"    {requirement!r},\n".replace("'", '"') for requirement in requirements)
    sections = [
        _HEAD,
        _heading(_("Paquetes que faltan"), "") + _import_lines(first),
        _TRANSLATION_PART,
        installer.code,
        f"install_missing([\n{wanted}])\n\n{_STOP}",
        _heading(_("Importaciones"), "") + _import_lines(later),
        *(f"{_heading(part.title, part.intro)}{part.code}" for part in others),
        _heading(_("Arranque"), "") + _START.format(ngrok=ngrok).replace("'", '"'),
    ]
    return "\n\n".join(sections)


def build_notebook(cell: str) -> str:
    """A notebook (nbformat 4.5) with a guide and the cell."""
    guide = {"cell_type": "markdown", "id": "guia", "metadata": {}, "source": _GUIDE.strip().splitlines(True)}
    code: dict[str, Any] = {
        "cell_type": "code",
        "execution_count": None,
        "id": "trabajador",
        "metadata": {},
        "outputs": [],
        "source": cell.rstrip("\n").splitlines(True),
    }
    metadata = {
        "accelerator": "GPU",
        "colab": {"gpuType": "T4", "provenance": []},
        "kernelspec": {"display_name": "Python 3", "name": "python3"},
        "language_info": {"name": "python"},
    }
    content = {"cells": [guide, code], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def difference(name: str, old: str, new: str) -> str:
    """The first lines of what would change."""
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), name, _("{name} (nuevo)").format(name=name), lineterm="", n=1
    )
    return "\n".join(line for _number, line in zip(range(_HINT_LINES), lines, strict=False))


# Modules into parts


def collect_parts(root: Path) -> list[Part]:
    """The modules that the cell is made of, each after those that it imports; the installer first."""
    parts: dict[str, Part] = {}

    def visit(module: str) -> None:
        if module in parts or module == TRANSLATION:
            return
        part = read_part(root, module)
        for needed in part.needs:
            visit(needed)
        parts[module] = part

    visit(INSTALLER)
    if len(parts) > 1:
        raise _unfit(INSTALLER, _("importa otros módulos del paquete, y va antes que todos"))
    visit(STARTER)
    return list(parts.values())


def read_part(root: Path, module: str) -> Part:
    """Take a module of the package apart."""
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        raise _unfit(module, _("no es un archivo"))
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    part = Part(
        module, path.relative_to(root).as_posix(), ast.get_docstring(tree) or "", _kept_code(module, source, tree)
    )
    _check_content(module, tree)
    part.defines.update(_defined_names(source, path))
    for statement, for_types in _top_imports(tree):
        if isinstance(statement, ast.ImportFrom) and _is_own(statement.module):
            if not for_types:
                part.needs.append(str(statement.module))
        elif not isinstance(statement, ast.ImportFrom) or statement.module != "__future__":
            part.imports.extend(found for found in _bindings(statement) if found.name != "TYPE_CHECKING")
    part.inner.update(found.root for statement in _inner_imports(tree) for found in _bindings(statement))
    return part


def _kept_code(module: str, source: str, tree: ast.Module) -> str:
    """The text without docstring and imports, and with the translation under its other name."""
    lines = _rename_translation(module, source, tree).splitlines(True)
    dropped = [statement for statement in tree.body if _is_import(statement) or _is_for_types(statement)]
    if ast.get_docstring(tree) is not None:
        dropped.append(tree.body[0])
    for statement in dropped:
        for number in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
            lines[number - 1] = ""
    return "".join(lines).strip("\n") + "\n"


def _rename_translation(module: str, source: str, tree: ast.Module) -> str:
    imported = sum(_imports_translation(node) for node in ast.walk(tree))
    if not imported:
        return source
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "_"]
    found = [token.start for token in _name_tokens(source) if token.string == "_"]
    if any(not isinstance(node.ctx, ast.Load) for node in uses) or len(found) != len(uses) + imported:
        raise _unfit(module, _("usa «_» para algo más que la traducción"))
    lines = source.splitlines(True)
    for row, column in reversed(found):
        lines[row - 1] = lines[row - 1][:column] + SPANISH + lines[row - 1][column + 1 :]
    return "".join(lines)


def _name_tokens(source: str) -> Iterator[tokenize.TokenInfo]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return (token for token in tokens if token.type == tokenize.NAME)


def _imports_translation(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and any(alias.name == "_" for alias in node.names)


def _check_content(module: str, tree: ast.Module) -> None:
    """Refuse what means something else, or nothing, in a cell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("__file__", "__name__"):
            raise _unfit(module, _("usa {name}, que en una celda no vale").format(name=node.id))
        if isinstance(node, ast.Import) and any(_is_own(alias.name) for alias in node.names):
            raise _unfit(
                module,
                _("importa el paquete con «import»; solo se admite from {package}.x import nombre").format(
                    package=PACKAGE
                ),
            )
        if isinstance(node, ast.ImportFrom) and _is_own(node.module) and any(alias.asname for alias in node.names):
            raise _unfit(module, _("da otro nombre a lo que importa de {other}").format(other=node.module))
    if any(isinstance(statement, ast.ImportFrom) and _is_own(statement.module) for statement in _inner_imports(tree)):
        raise _unfit(module, _("importa el paquete dentro de una función"))


def _defined_names(source: str, path: Path) -> Iterator[str]:
    names = symtable.symtable(source, str(path), "exec").get_symbols()
    return (name.get_name() for name in names if name.is_assigned() and not name.is_imported())


def _top_imports(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The imports at the top, each with whether only types need it."""
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement, False
        elif isinstance(statement, ast.If) and _is_for_types(statement):
            yield from ((inner, True) for inner in statement.body if isinstance(inner, ast.Import | ast.ImportFrom))


def _inner_imports(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    top = {statement for statement, _for_types in _top_imports(tree)}
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in top)


def _bindings(statement: ast.Import | ast.ImportFrom) -> Iterator[Import]:
    for alias in statement.names:
        if isinstance(statement, ast.ImportFrom):
            yield Import(str(statement.module), alias.name, alias.asname or alias.name)
        else:
            yield Import(alias.name, None, alias.asname or alias.name.partition(".")[0])


def _is_import(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Import | ast.ImportFrom)


def _is_for_types(statement: ast.stmt) -> bool:
    """Whether it is ``if TYPE_CHECKING:`` with nothing but imports in it."""
    return (
        isinstance(statement, ast.If)
        and isinstance(statement.test, ast.Name)
        and statement.test.id == "TYPE_CHECKING"
        and not statement.orelse
        and all(_is_import(inner) for inner in statement.body)
    )


def _is_own(module: str | None) -> bool:
    return module is None or module.partition(".")[0] == PACKAGE


# What all parts together must fulfil


def check_names(parts: list[Part]) -> None:
    """Refuse two meanings of one name."""
    owners = dict.fromkeys(("TUNEL", "PUERTO", "CARPETA", "trabajador"), _("el principio de la celda"))
    owners[SPANISH] = TRANSLATION
    meanings: dict[str, Import] = {}
    for part in parts:
        for name in sorted(part.defines):
            if name in owners:
                raise _clash(name, owners[name], part.module)
            owners[name] = part.module
    for part in parts:
        for found in part.imports:
            if found.bound in owners:
                raise _clash(found.bound, owners[found.bound], part.module)
            if meanings.setdefault(found.bound, found) != found:
                other = next(other.module for other in parts if meanings[found.bound] in other.imports)
                raise _clash(found.bound, other, part.module)


def check_inner(parts: list[Part], installed: set[str]) -> None:
    """Refuse a function's import of a package that nobody installs."""
    for part in parts:
        for root in sorted(part.inner - installed - EXPECTED - ON_DEMAND - sys.stdlib_module_names):
            raise _unfit(part.module, _("importa en una función «{root}», que nadie instala").format(root=root))


def read_requirements(root: Path, packages: set[str]) -> tuple[list[str], str]:
    """What pip must install for these packages, in the versions of ``pyproject.toml``; and what ngrok needs."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {line.partition(">=")[0].replace("-", "_"): line for line in project["dependencies"]}
    for name in sorted(packages - known.keys()):
        raise RequestError(_("La celda importa «{name}», que no está en pyproject.toml.").format(name=name))
    return sorted(known[name] for name in packages), project["optional-dependencies"]["ngrok"][0]


def _clash(name: str, one: str, other: str) -> RequestError:
    return RequestError(
        _("En la celda, «{name}» sería dos cosas: lo usan {one} y {other}.").format(name=name, one=one, other=other),
        mend=_("Cambia el nombre en uno de los dos."),
    )


def _unfit(module: str, reason: str) -> RequestError:
    return RequestError(_("{module} no puede ir en la celda: {reason}.").format(module=module, reason=reason))


# Text


def _heading(title: str, intro: str) -> str:
    """A comment that says where a part begins, and what its docstring says."""
    rule = "# " + "-" * (_WIDTH - 2)
    said = [f"# {line}".rstrip() for line in ["", *intro.splitlines()]] if intro else []
    return "\n".join([rule, f"# {title}", *said, rule]) + "\n\n"


def _import_lines(imports: set[Import]) -> str:
    """Import statements: the standard library's, an empty line, the others'."""
    own = [found for found in imports if found.root in sys.stdlib_module_names]
    others = [found for found in imports if found.root not in sys.stdlib_module_names]
    return "\n".join(_import_block(group) for group in (own, others) if group)


def _import_block(imports: list[Import]) -> str:
    whole = sorted(f"import {found.module}" + _renamed(found, found.module) for found in imports if found.name is None)
    by_module: dict[str, list[str]] = {}
    for found in imports:
        if found.name is not None:
            by_module.setdefault(found.module, []).append(found.name + _renamed(found, found.name))
    members = [_from_line(module, sorted(by_module[module])) for module in sorted(by_module)]
    return "\n".join([*whole, *members]) + "\n"


def _from_line(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    return (
        line if len(line) <= _WIDTH else f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
    )


def _renamed(found: Import, name: str) -> str:
    return "" if found.bound == name.partition(".")[0] else f" as {found.bound}"


if __name__ == "__main__":
    main()
