"""What pyproject.toml asks for, what constraints.txt pins and what is installed agree, and leave known holes out."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
HOLES = {
    "filelock": ("3.20.2", "a lock file that is a link empties another file: CVE-2025-68146, CVE-2026-22701"),
    "h11": ("0.15.0", "chunks that are read otherwise than by the proxy before it: CVE-2025-43859"),
    "jinja2": ("3.1.5", "templates that leave their sandbox: CVE-2025-27516"),
    "mlflow-skinny": ("3.10.1", "requests that pass authorization: CVE-2026-2652"),
    "orjson": ("3.11.5", "nested JSON that overflows the stack: CVE-2024-27454, CVE-2025-67221"),
    "pyarrow": ("23.0.0", "memory used after it was freed: CVE-2026-25087"),
    "pytest": ("9.0.2", "a temporary folder that others can foresee: CVE-2025-71176"),
    "python-dotenv": ("1.2.1", "a link that leads a write elsewhere: CVE-2026-28684"),
    "starlette": ("1.3.0", "Host and forms that get round their checks: CVE-2026-48710, CVE-2026-54283"),
    "torch": ("2.9.1", "a checkpoint that spoils memory though it holds weights only: CVE-2026-24747"),
    "transformers": ("5.2.0", "a model's configuration that runs code: CVE-2026-1839, CVE-2026-4372"),
}
"""For each package its last release with a hole that matters to whoever installs it, and what the hole is."""


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for texts in (PROJECT["dependencies"], *extras) for text in texts]


BOUNDED = [requirement for requirement in requirements() if requirement.specifier]


@pytest.mark.parametrize("requirement", BOUNDED, ids=str)
def test_what_is_pinned_and_installed_is_what_is_asked_for(requirement: Requirement) -> None:
    """The tested version of a package, and the one in this environment, satisfy the bound that users get."""
    name = canonicalize_name(requirement.name)
    assert name not in PINNED or requirement.specifier.contains(PINNED[name])
    installed = {canonicalize_name(found.name): found.version for found in metadata.distributions()}
    assert name not in installed or requirement.specifier.contains(installed[name], prereleases=True)


def test_every_dependency_is_pinned() -> None:
    """What everybody installs, and what the tests and the audit need, has its tested version."""
    texts = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["dev"],
        *PROJECT["optional-dependencies"]["audit"],
    ]
    assert {canonicalize_name(Requirement(text).name) for text in texts} - PINNED.keys() == set()


@pytest.mark.parametrize("name", HOLES)
def test_releases_with_known_holes_are_left_out(name: str) -> None:
    """No bound of the package lets in its last release with a known hole."""
    bounds = [requirement.specifier for requirement in requirements() if canonicalize_name(requirement.name) == name]
    assert bounds, f"{name} is no dependency any more: drop its line"
    assert not any(bound.contains(HOLES[name][0]) for bound in bounds), HOLES[name][1]


def test_forms_are_never_parsed() -> None:
    """No parser of multipart forms is among the dependencies: the worker takes none."""
    assert "python-multipart" not in {canonicalize_name(requirement.name) for requirement in requirements()}
