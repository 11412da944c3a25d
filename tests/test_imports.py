from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sheily_train

PACKAGE = Path(sheily_train.__file__).parent
LEVELS = {
    "sheily_train": 0,
    "sheily_train.errors": 0,
    "sheily_train.paths": 0,
    "sheily_train.runlog": 0,
    "sheily_train.durable": 0,
    "sheily_train.i18n": 0,
    "sheily_train.core": 0,
    "sheily_train.core.branches": 1,
    "sheily_train.core.processor": 1,
    "sheily_train.colab": 3,
    "sheily_train.colab.batches": 1,
    "sheily_train.colab.protocol": 1,
    "sheily_train.core.training": 2,
    "sheily_train.core.omega": 2,
    "sheily_train.tools": 4,
    "sheily_train.cli": 5,
    "sheily_train.__main__": 6,
    "sheily_train.scripts": 6,
    "sheily_train.train_branch": 6,
}
"""The map of DESIGN.md: a module imports from its own level or a lower one. A part that is new gets its line here."""

_EACH_HAS_ITS_LINE = {"sheily_train", "sheily_train.core"}
HEAVY = ("torch", "transformers", "peft")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def level(name: str) -> int:
    """The level of a module: its own line of the map, or that of the package it lies in."""
    parts = name.split(".")
    known = next(part for end in range(len(parts), 0, -1) if (part := ".".join(parts[:end])) in LEVELS)
    if known in _EACH_HAS_ITS_LINE and known != name:
        pytest.fail(f"{name} has no level: give it a line in LEVELS, after DESIGN.md's map")
    return LEVELS[known]


def imported(path: Path) -> Iterator[str]:
    """The package's modules that a file imports: at its top, in its functions, for its types."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            names = [f"{node.module}.{name}" for name in names]
            names = [name if name in MODULES else str(node.module) for name in names]
        yield from (name for name in names if name.partition(".")[0] == PACKAGE.name)


@pytest.mark.parametrize("name", MODULES)
def test_no_arrow_turns_back(name: str) -> None:
    """A module imports nothing of a level above its own, not even inside a function."""
    turned = sorted(found for found in imported(MODULES[name]) if level(found) > level(name))
    assert turned == [], f"{name} imports what stands above it"


def test_light_modules_load_no_heavy_package() -> None:
    """What ``--help``, ``branches`` and a request need starts without torch, transformers and peft."""
    levels = {name: level(name) for name in MODULES}
    light = [name for name in MODULES if levels[name] < 2 or levels[name] == 4]
    light += [f"sheily_train.core.training.{name}" for name in ("request", "specialist", "fleet")]
    code = f"import sys, {', '.join(light)}\nprint(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
