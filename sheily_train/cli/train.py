"""``sheily train``, which is also ``python3 sheily_train/train_branch.py``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import Field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sheily_train import paths
from sheily_train.cli.failures import tell_error
from sheily_train.core.training.request import TrainRequest, flag, resolve, settings
from sheily_train.errors import INTERNAL_ERROR, RequestError, SheilyError
from sheily_train.i18n import _

if TYPE_CHECKING:
    from sheily_train.core.training.fleet import Outcome

_TRACKERS = ("tensorboard", "wandb", "mlflow")


def _setting_option(item: Field[Any]) -> Callable[[Any], Any]:
    """A click option for a field of the request. Values stay text; the request itself converts and checks them."""
    help_text = item.metadata["help"]
    if item.type == "bool":
        names = f"{flag(item.name)}/--no-{item.name.replace('_', '-')}"
        return click.option(names, item.name, default=None, help=help_text)
    choices, default = item.metadata["choices"], item.default
    shown = ",".join(default) if isinstance(default, tuple) else default
    if isinstance(shown, str | int | float) and shown != "":
        help_text += " " + _("[por defecto: {default}]").format(default=shown)
    metavar = f"[{'|'.join(choices)}]" if choices else _METAVARS.get(str(item.type).partition(" ")[0], _("TEXTO"))
    return click.option(flag(item.name), *item.metadata["aliases"], item.name, metavar=metavar, help=help_text)


_METAVARS = {"int": _("ENTERO"), "float": _("NÚMERO"), "Path": _("CARPETA"), "tuple[str,": _("NOMBRES")}


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option per setting of the request, the branch apart."""
    for item in reversed([item for item in settings() if item.name != "branch"]):
        command = _setting_option(item)(command)
    return command


@click.command(
    help=_("Entrena una rama o varias, o sigue donde se cortó."),
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)
@click.option("--list-branches", "listing", is_flag=True, help=_("Muestra las ramas y termina."))
@click.option("--branch", "names", multiple=True, metavar=_("NOMBRE"), help=_("Rama que se entrena; se puede repetir."))
@click.option("--all", "everything", is_flag=True, help=_("Entrena todas las ramas."))
@setting_options
@click.option("--config", type=click.Path(path_type=Path), metavar=_("ARCHIVO"), help=_("Ajustes en YAML o JSON."))
@click.option("--dry-run", is_flag=True, help=_("Di qué se haría, con su memoria, disco y pasos, y termina."))
@click.option("--fresh", is_flag=True, help=_("Empieza de nuevo, sin puntos de control ni resultado anterior."))
@click.option("--quiet", is_flag=True, help=_("Muestra solo los errores."))
@click.option("--json", "as_json", is_flag=True, help=_("Da el resultado como JSON."))
@click.option("--report-to", type=click.Choice(_TRACKERS), help=_("Envía también las cifras a un panel."))
@click.option("--debug", is_flag=True, expose_value=False, help=_("Muestra la traza completa de los errores."))
def train(
    listing: bool,
    names: tuple[str, ...],
    everything: bool,
    config: Path | None,
    dry_run: bool,
    fresh: bool,
    quiet: bool,
    as_json: bool,
    report_to: str | None,
    **flags: Any,
) -> int:
    """Train, or list the branches."""
    given = resolve(flags, os.environ, config)
    if listing:
        from sheily_train.cli.branches import print_branches

        print_branches(given.get("branches_dir") or paths.branches_dir(), paths.models_dir(), as_json)
        return 0
    requests = _requests(given, names, everything)
    _have_base(requests[0].model, quiet=quiet or as_json)
    if dry_run:
        return _dry_run(requests, as_json)
    return _train(requests, fresh=fresh, quiet=quiet or as_json, as_json=as_json, report_to=report_to)


def _requests(given: dict[str, Any], names: tuple[str, ...], everything: bool) -> list[TrainRequest]:
    from sheily_train.core.branches import catalog

    configured = given.pop("branch", "")
    if everything and names:
        raise RequestError(_("--branch y --all a la vez."), mend=_("Da una de las dos."))
    if everything:
        names = tuple(
            branch.name for branch in catalog.find_branches(given.get("branches_dir") or paths.branches_dir())
        )
        if not names:
            raise RequestError(
                _("No hay ninguna rama que entrenar."), mend=_("Crea una: sheily branches import NOMBRE ARCHIVO")
            )
    names = tuple(dict.fromkeys(names)) or ((configured,) if configured else ())
    if not names:
        raise RequestError(
            _("No se ha dicho qué rama entrenar."), mend=_("Usa --branch NOMBRE, --all, o --list-branches para verlas.")
        )
    output = given.pop("output", None)
    several = everything or len(names) > 1
    outputs = {name: output / name if output and several else output for name in names}
    return [TrainRequest(branch=name, output=outputs[name], **given) for name in names]


def _have_base(model: str, *, quiet: bool) -> None:
    """Fetch the embedded base if it is not there yet, telling so; a base that cannot be had ends the command here."""
    from sheily_train.core.training import bases

    bases.locate(model, notify=lambda text: None if quiet else click.echo(text))


def _dry_run(requests: list[TrainRequest], as_json: bool) -> int:
    from sheily_train.core.training.fleet import told
    from sheily_train.core.training.narration import describe
    from sheily_train.core.training.preparation import check_resources, prepare

    facts: list[dict[str, Any]] = []
    errors: list[SheilyError] = []
    for request in requests:
        try:
            job = prepare(request)
            check_resources(job)
        except Exception as error:
            if len(requests) == 1:
                raise
            errors.append(told(error))
            facts.append({"branch": request.branch, "error": str(errors[-1])})
            _tell_error(request.branch, errors[-1])
            continue
        facts.append(job.facts())
        if not as_json:
            click.echo("\n".join(describe({"event": "start", **job.facts()})))
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
    return _exit_code(errors)


def _train(requests: list[TrainRequest], *, fresh: bool, quiet: bool, as_json: bool, report_to: str | None) -> int:
    from sheily_train.core.training.fleet import new_log, train_branches
    from sheily_train.tools.monitoring.terminal import view_for

    several = len(requests) > 1
    if report_to:
        requests = [replace(request, together=1) for request in requests]  # a panel takes one run at a time
    log = new_log() if several else None
    with view_for(sys.stdout, quiet=quiet, several=several) as view:
        listeners = (view, *([_tracker(report_to)] if report_to else []))
        outcomes = []
        for outcome in train_branches(requests, log=log, listeners=listeners, fresh=fresh):
            outcomes.append(outcome)
            if outcome.error is not None and several:
                _tell_error(outcome.branch, outcome.error)
    if len(outcomes) == 1 and outcomes[0].error is not None:
        raise outcomes[0].error
    if as_json:
        click.echo(json.dumps([_as_json(outcome) for outcome in outcomes], ensure_ascii=False, indent=2))
    elif not quiet:
        _print_summary(outcomes, log)
    return _exit_code([outcome.error for outcome in outcomes if outcome.error])


def _tell_error(branch: str, error: SheilyError) -> None:
    text = _("{branch}: {error}").format(branch=branch, error=error)
    tell_error(text, error, debug=bool(click.get_current_context().obj))


def _exit_code(errors: list[SheilyError]) -> int:
    """That of several branches: 70 where one met a defect of the program, else 1 where one failed."""
    if any(error.exit_code == INTERNAL_ERROR for error in errors):
        return INTERNAL_ERROR
    return 1 if errors else 0


def _tracker(name: str) -> Callable[[dict[str, Any]], None]:
    """A tracker that opens one run per branch, when the branch starts."""
    from sheily_train.tools.monitoring.trackers import tracker

    current: list[Callable[[dict[str, Any]], None]] = []

    def listen(record: dict[str, Any]) -> None:
        if record["event"] in {"start", "resume"}:
            for unfinished in current:
                unfinished({"event": "done"})
            current[:] = [tracker(name, record["branch"], paths.logs_dir() / name)]
        for listener in current:
            listener(record)

    return listen


def _as_json(outcome: Outcome) -> dict[str, Any]:
    if outcome.result is None:
        return {"branch": outcome.branch, "error": str(outcome.error)}
    result = outcome.result
    return {
        "branch": outcome.branch,
        "folder": str(result.folder),
        "log": str(result.log),
        "skipped": result.skipped,
        "metrics": result.metrics,
    }


def _print_summary(outcomes: list[Outcome], log: Path | None) -> None:
    from sheily_train.cli.summary import print_fleet, print_one

    if len(outcomes) == 1 and outcomes[0].result is not None:
        print_one(outcomes[0].result)
    else:
        print_fleet(outcomes, log)
