"""How long short commands take, as whole processes, and whether they load torch: two that should be instant, and one
that loads all that a training needs, and ends.

    python benchmarks/startup.py all-Branches

Writes ``<date>-startup.json`` beside this file. The first run of each command warms the caches and is not counted.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

ENTRY = "from sheily_train.cli import main; main()"


@click.command()
@click.argument("branches_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--runs", type=click.IntRange(1), default=20, show_default=True)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=Path(__file__).parent)
def startup(branches_dir: Path, runs: int, output: Path) -> None:
    """Time ``sheily --help``, ``--list-branches`` and ``--dry-run`` over BRANCHES_DIR."""
    first = min(folder.name for folder in branches_dir.iterdir() if folder.is_dir())
    commands = {
        "sheily --help": ["--help"],
        f"sheily train --list-branches --branches-dir {branches_dir.name}": [
            *("train", "--list-branches", "--branches-dir", str(branches_dir))
        ],
        f"sheily train --dry-run --lora --branch {first} --branches-dir {branches_dir.name}": [
            *("train", "--dry-run", "--lora", "--branch", first, "--branches-dir", str(branches_dir))
        ],
    }
    today = datetime.date.today().isoformat()
    results = [{"command": shown, **measure(arguments, runs)} for shown, arguments in commands.items()]
    for result in results:
        seconds = ", ".join(f"{name} {value:.3f} s" for name, value in result["seconds"].items())
        click.echo(f"{result['command']}: {seconds}; torch loaded: {'yes' if result['torch_loaded'] else 'no'}")
    record = {
        "date": today,
        "command": f"python benchmarks/startup.py {branches_dir.name} --runs {runs}",
        "machine": machine(),
        "results": results,
    }
    file = output / f"{today}-startup.json"
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    click.echo(f"written: {file}")


def measure(arguments: list[str], runs: int) -> dict[str, Any]:
    """Seconds of whole processes, and whether torch was among their imports."""
    imports = run([sys.executable, "-X", "importtime", "-c", ENTRY, *arguments]).stderr
    command = installed_command() or [sys.executable, "-c", ENTRY]
    run([*command, *arguments])
    seconds = []
    for _run in range(runs):
        begin = time.perf_counter()
        run([*command, *arguments])
        seconds.append(round(time.perf_counter() - begin, 4))
    return {
        "seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        "torch_loaded": any(line.split("|")[-1].strip() == "torch" for line in imports.splitlines()),
    }


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, its output caught; an error stops the benchmark."""
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} left with {done.returncode}:\n{done.stderr}")
    return done


def installed_command() -> list[str] | None:
    """The ``sheily`` that lies beside this Python."""
    script = Path(sys.executable).with_name("sheily.exe" if os.name == "nt" else "sheily")
    return [str(script)] if script.exists() else None


def machine() -> dict[str, Any]:
    """Cores, processor, system and Python."""
    return {
        "cores": os.cpu_count(),
        "processor": processor_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def processor_name() -> str:
    """The name the processor gives itself, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    startup()
