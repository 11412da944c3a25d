from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import sheily_train
from sheily_train import errors
from sheily_train.errors import MissingExtraError, SheilyError

FAMILY = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
DRAWN = {name: int(code) for name, code in re.findall(r"^\W*([A-Z]\w+) +(\d+)", errors.__doc__ or "", re.MULTILINE)}


def test_the_drawn_tree_is_the_family() -> None:
    """The docstring draws every class of the module with its exit code, and no other; all hang from the one parent."""
    assert {name: getattr(kind, "exit_code", None) for name, kind in FAMILY.items()} == DRAWN
    assert {kind.__base__ for kind in FAMILY.values()} <= {Exception, *FAMILY.values()}
    assert [kind for kind in FAMILY.values() if kind.__base__ is Exception] == [SheilyError]
    assert len(set(DRAWN.values())) == len(DRAWN)


def test_no_module_grows_the_family() -> None:
    """An error of the family is defined in errors.py or nowhere."""
    package = Path(inspect.getfile(sheily_train)).parent
    strangers = [
        f"{path.name}: {node.name}"
        for path in package.rglob("*.py")
        if path != Path(inspect.getfile(errors))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and {ast.unparse(base).rpartition(".")[2] for base in node.bases} & set(FAMILY)
    ]
    assert strangers == []


@pytest.mark.parametrize(("mend", "shown"), [("Haz esto.", "Pasó algo. Haz esto."), ("", "Pasó algo.")])
def test_an_error_says_what_and_how_to_mend_it(mend: str, shown: str) -> None:
    """The text is the message and, when there is one, the mend."""
    assert str(SheilyError("Pasó algo.", mend=mend)) == shown


def test_a_missing_extra_gives_the_install_line() -> None:
    """The package, what it is for and the command that installs it."""
    error = MissingExtraError("wandb", "trackers", "--report-to")
    assert "«wandb», necesario para --report-to" in error.message
    assert error.mend == "Instálalo con: pip install 'sheily-train[trackers]'"
