"""Take one safeguard of the protocol out at a time, and see that the simulation or the fault campaign notices.

    python -m sheily_train.scripts.testing.mutants --jobs 2

A test that passes without what it tests proves nothing. Each mutant is a copy of the package in which one safeguard is
missing; the program that is to notice runs on it until it fails. A mutant that survives ends the command with 1. The
unchanged copy goes first, and must pass.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

import sheily_train
from sheily_train.i18n import _

PACKAGE = Path(sheily_train.__file__).parent
JUDGES = {"simulation": ("--until-failure",), "faults": ()}
"""The programs that notice, and the further options that they are given."""

_NOTICED = re.compile(r"^semilla \d+: .*", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """A safeguard and how it is taken out.

    Attributes:
        name: the safeguard.
        file: in the package.
        old, new: a text that stands there exactly once, and what stands there in its place.
        judge: the program that must notice.
        seed: where it begins; for a safeguard that few histories need, one at which it is known to be missed.
    """

    name: str
    file: str
    old: str
    new: str
    judge: str = "simulation"
    seed: int = 1


MUTANTS = (
    Mutant(
        "duplicate check",
        "colab/protocol.py",
        "        digest, answer = self.answers[claim.seq]\n",
        "        return None\n        digest, answer = self.answers[claim.seq]\n",
    ),
    Mutant(
        "chain check",
        "colab/protocol.py",
        "            if claim.chain != next_chain(self.chain, claim.digest):\n",
        "            if False:\n",
    ),
    Mutant("fencing", "colab/protocol.py", "        if owner != self.owner:\n", "        if False:\n"),
    Mutant(
        "fsync of the journal",
        "colab/journal.py",
        'connection.execute("PRAGMA synchronous=FULL")',
        'connection.execute("PRAGMA synchronous=OFF")',
    ),
    Mutant("fsync of files", "durable.py", "    descriptor = os.open(path, os.O_RDWR)\n", "    return\n", seed=141),
    Mutant("fsync of folders", "durable.py", '    if os.name == "nt":', "    if True:"),
    Mutant(
        "seed of each step",
        "core/omega/learner.py",
        "        return torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 128 + epoch) % 2**63)\n",
        "        self._one = getattr(self, '_one', None) or torch.Generator().manual_seed(self.seed)\n"
        "        return self._one\n",
        judge="faults",
    ),
)


def copy_of_the_package(folder: Path) -> Path:
    """A copy that can be changed."""
    return Path(shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__")))


def mutate(package: Path, mutant: Mutant) -> None:
    """Take the safeguard out of a copy; :class:`ValueError` when it is not where it was."""
    file = package / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {text.count(mutant.old)} times in {mutant.file}: {mutant.old.strip()}")
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def noticed(package: Path, judge: str, runs: int, jobs: int, seed: int = 1) -> str:
    """What a judge says of a copy, beginning at a seed: its first complaint, or nothing."""
    command = [sys.executable, "-m", f"sheily_train.scripts.testing.{judge}"]
    command += ["--runs", str(runs), "--jobs", str(jobs), "--seed", str(seed)]
    done = subprocess.run(
        [*command, *JUDGES[judge]],
        cwd=package.parent,
        env=os.environ | {"PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    complaint = _NOTICED.search(done.stdout + "\n" + done.stderr)
    if done.returncode != bool(complaint):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return complaint[0] if complaint else ""


def verdict(mutant: Mutant | None, runs: dict[str, int], jobs: int) -> tuple[bool, str]:
    """Whether all is as it should be with a mutant (or the unchanged copy), and a sentence that says so."""
    with tempfile.TemporaryDirectory() as folder:
        package = copy_of_the_package(Path(folder))
        if mutant is None:
            complaints = [found for judge in JUDGES if (found := noticed(package, judge, runs[judge] // 10, jobs))]
            return not complaints, "; ".join(complaints)[:100] or _("nada que objetar")
        mutate(package, mutant)
        complaint = noticed(package, mutant.judge, runs[mutant.judge], jobs, mutant.seed)
        return bool(complaint), complaint[:100] or _("SOBREVIVE")


@click.command(help=_("Quita una salvaguarda tras otra y comprueba que se nota."))
@click.option("--runs", type=click.IntRange(10), default=2000, help=_("Historias de la simulación como mucho."))
@click.option("--fault-runs", type=click.IntRange(10), default=20, help=_("Pruebas de la campaña de fallos."))
@click.option("--jobs", type=click.IntRange(1), default=1, help=_("Cuántas a la vez."))
def command(runs: int, fault_runs: int, jobs: int) -> None:
    """Judge the unchanged copy and every mutant."""
    right = True
    for mutant in (None, *MUTANTS):
        begun = time.monotonic()
        well, text = verdict(mutant, {"simulation": runs, "faults": fault_runs}, jobs)
        right = right and well
        name = mutant.name if mutant else _("sin cambios")
        click.echo(f"{name:24} {time.monotonic() - begun:5.0f} s  {text}")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    command()
