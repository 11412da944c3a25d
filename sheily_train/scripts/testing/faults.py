"""The fault campaign: many runs of a real worker and a real client, each struck at least ten times, each to end with
the very bits of a run that nothing disturbed.

    python -m sheily_train.scripts.testing.faults --runs 300 --seed 1 --jobs 2 --json faults.json

Run ``i`` is decided by the seed ``S + i``: ``--runs 1 --seed X`` repeats it. Of each run it is asked that the sha256 of
every tensor of its state, its statistics and its stored answers equal the undisturbed run's; that the events which the
state itself says were applied are 1 to N; that each answer was told once; that the journal checks; that it ends in
time; and that no process and no port is left. Linux only.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import click

from sheily_train.core.training.hardware import fingerprint
from sheily_train.i18n import _
from sheily_train.scripts.testing.actors import Prepare
from sheily_train.scripts.testing.drill import PRELOADED, PROCESSES, Drill, Report
from sheily_train.scripts.testing.ending import Ending
from sheily_train.scripts.testing.scenario import Scenario, draw, undisturbed
from sheily_train.scripts.testing.workload import Workload

COMMAND = "python -m sheily_train.scripts.testing.faults"


class Campaign:
    """Runs of many seeds, several at a time.

    Args:
        folder: where their files lie; those of a failed run stay.
        prepare: what each worker process does to itself first.
    """

    def __init__(
        self, scenarios: Sequence[Scenario], folder: Path, jobs: int = 1, prepare: Prepare | None = None
    ) -> None:
        self._scenarios, self._folder, self._jobs, self._prepare = scenarios, folder, jobs, prepare
        PROCESSES.set_forkserver_preload(PRELOADED)

    def run(self) -> list[Report]:
        """The undisturbed runs first, one a workload; then all the others."""
        workloads = sorted({scenario.workload for scenario in self._scenarios}, key=lambda workload: workload.name)
        with ThreadPoolExecutor(self._jobs) as threads:
            endings = dict(zip(workloads, threads.map(self.undisturbed, workloads), strict=True))
            expected = [endings[scenario.workload] for scenario in self._scenarios]
            return list(threads.map(self._drill, self._scenarios, expected))

    def undisturbed(self, workload: Workload) -> Ending:
        """What a workload comes to when nothing disturbs it."""
        report = self._drill(undisturbed(workload), None, workload.name)
        if report.ending is None:
            raise click.ClickException(
                _("Sin ningún fallo inyectado, «{workload}» no llegó al final: {reason}").format(
                    workload=workload.name, reason=report.reason
                )
            )
        return report.ending

    def _drill(self, scenario: Scenario, expected: Ending | None, name: str = "") -> Report:
        folder = self._folder / (name or str(scenario.seed))
        folder.mkdir(parents=True)
        report = Drill(scenario, expected, folder, self._prepare).run()
        if report.reason:
            text = _("Semilla {seed}: {reason} (sus archivos: {folder})")
            click.echo(text.format(seed=report.seed, reason=report.reason, folder=folder), err=True)
        else:
            shutil.rmtree(folder)
        return report


def table(reports: Iterable[Report]) -> str:
    """Per kind of fault: how many were injected, into how many runs, and how many of these failed."""
    injected, runs, failed = _counts(reports)
    width = max(map(len, injected), default=0)
    line = "{:" + str(width) + "}  {:>10}  {:>8}  {:>8}"
    rows = [line.format(kind, injected[kind], runs[kind], failed[kind]) for kind in sorted(injected)]
    return "\n".join([line.format(_("fallo"), _("inyectados"), _("pruebas"), _("fallidas")), *rows])


def _counts(reports: Iterable[Report]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    injected: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for report in reports:
        injected.update(report.faults)
        runs.update(report.faults.keys())
        failed.update(report.faults.keys() if report.reason else ())
    return injected, runs, failed


def result_of(reports: Sequence[Report], command: str, seconds: float) -> dict[str, Any]:
    """The campaign's result, as JSON values."""
    injected, _runs, _failed = _counts(reports)
    repeats = sum((report.repeats for report in reports), Counter[str]())
    return {
        "date": date.today().isoformat(),
        "command": command,
        "machine": fingerprint("cpu"),
        "runs": len(reports),
        "failures": [{"seed": report.seed, "reason": report.reason} for report in reports if report.reason],
        "seconds": round(seconds, 1),
        "seconds_per_run": round(sum(report.seconds for report in reports) / len(reports), 2),
        "faults": injected.total(),
        "fewest_faults_in_a_run": min(report.faults.total() for report in reports),
        "faults_by_kind": dict(sorted(injected.items())),
        "commands_given_again": dict(sorted(repeats.items())),
        "runs_by_workload": dict(Counter(report.workload for report in reports)),
    }


@click.command(help=_("Entrena bajo fallos inyectados y comprueba que los bits finales son los de siempre."))
@click.option("--runs", type=click.IntRange(1), default=20, show_default=True, help=_("Cuántas pruebas."))
@click.option("--seed", type=int, default=1, show_default=True, help=_("La de la primera."))
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help=_("Cuántas a la vez."))
@click.option("--full-size", type=click.IntRange(0), default=0, help=_("Cuántas, las primeras, con la red entera."))
@click.option("--json", "file", type=click.Path(path_type=Path), help=_("Escribe ahí el resultado."))
def main(runs: int, seed: int, jobs: int, full_size: int, file: Path | None) -> None:
    """The command."""
    begun = time.monotonic()
    scenarios = [draw(seed + run, full_size=run < full_size) for run in range(runs)]
    folder = Path(tempfile.mkdtemp(prefix="sheily-faults-"))
    reports = Campaign(scenarios, folder, jobs).run()
    result = result_of(reports, " ".join([COMMAND, *sys.argv[1:]]), time.monotonic() - begun)
    click.echo(table(reports))
    click.echo(
        _(
            "{faults} fallos en {runs} pruebas, {fewest_faults_in_a_run} o más en cada una; {failed} fallidas; "
            "{seconds} s, {seconds_per_run} s cada una."
        ).format(failed=len(result["failures"]), **result)
    )
    if file is not None:
        file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if result["failures"]:
        seeds = ", ".join(str(failure["seed"]) for failure in result["failures"])
        raise click.ClickException(_("Semillas fallidas: {seeds}").format(seeds=seeds))
    folder.rmdir()


if __name__ == "__main__":
    main()
