"""Models of the Hugging Face hub as local snapshots, all files of one commit, and what keeps one from being had.

Nothing is reported to anybody, and of the weights only safetensors are downloaded.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from sheily_train import durable
from sheily_train.core.training import embedded
from sheily_train.errors import BaseModelError, ResourceError, SheilyError
from sheily_train.i18n import _

ANSWER_SECONDS = 10.0
"""How long the hub may take for its first answer."""

_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_WEIGHTS = ["model*.safetensors"]


def snapshot(name: str, *, weights: bool) -> Path:
    """A model's folder in the hub's own cache, named after its commit; configuration and tokenizer at least.

    What the cache holds is used when the hub does not answer or refuses.

    Args:
        name: ``org/name``.
        weights: whether the weights are wanted too.

    Raises:
        BaseModelError: neither the hub nor the cache gives it.
        ResourceError: the disk is full.
    """
    with quiet_transformers():
        from huggingface_hub.utils.tqdm import enable_progress_bars

        folder, refusal = _small_files(name)
        if weights:
            if sys.stderr.isatty():  # gigabytes: there, a bar is welcome
                enable_progress_bars()
            _download(name, _WEIGHTS, refusal, revision=folder.name)
    return folder


@lru_cache
def _small_files(name: str) -> tuple[Path, Exception | None]:
    """The folder with configuration and tokenizer, and why the hub gave no answer, if it gave none.

    First one short question without retries, so that a person without network or token hears of it within seconds.
    The answer holds for the whole process.
    """
    from huggingface_hub import HfApi

    refusal: Exception | None = None
    try:
        HfApi().model_info(name, timeout=ANSWER_SECONDS)
    except Exception as error:
        refusal = error
    return _download(name, _SMALL_FILES, refusal), refusal


def _download(name: str, patterns: list[str], refusal: Exception | None, revision: str | None = None) -> Path:
    """Some of a model's files, from the cache alone if the hub has refused."""
    from huggingface_hub import snapshot_download

    offline = refusal is not None
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*", local_files_only=offline
            )
        )
    except Exception as error:
        raise _explained(name, refusal or error) from error


def _explained(name: str, error: Exception) -> SheilyError:
    """What keeps a hub model from being had, and what a person can do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    access = _("acepta su licencia en {page} y pon tu token en la variable HF_TOKEN").format(
        page=f"{constants.ENDPOINT}/{name}"
    )
    if isinstance(error, OSError) and durable.is_full_disk(error):
        return ResourceError(
            _("No queda disco para descargar el modelo «{name}».").format(name=name),
            mend=_("Haz sitio, o elige otra carpeta con la variable HF_HOME."),
        )
    if isinstance(error, GatedRepoError):
        return BaseModelError(
            _("El modelo «{name}» es de acceso restringido.").format(name=name),
            mend=_("Para usarlo, {access}.").format(access=access),
        )
    if isinstance(error, RepositoryNotFoundError):
        return BaseModelError(
            _("No hay ningún modelo «{name}» en el Hub ni una carpeta con ese nombre.").format(name=name),
            mend=_("Revisa el nombre; si es privado, pon tu token en la variable HF_TOKEN."),
        )
    if constants.HF_HUB_OFFLINE:
        reason = _("HF_HUB_OFFLINE está activa y no está en la caché")
    elif isinstance(error, LocalEntryNotFoundError) or type(error).__module__.startswith("httpx"):
        reason = _("no hay conexión con el Hub")
    else:
        reason = first_line(error)
    return BaseModelError(
        _("No se pudo descargar el modelo «{name}»: {reason}.").format(name=name, reason=reason),
        mend=_(
            "Comprueba la red; si es de acceso restringido, {access}. Sin red: --model {embedded} o una carpeta."
        ).format(access=access, embedded=embedded.NAME),
    )


def first_line(error: Exception) -> str:
    """An error in one line, without its full stop."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers and the hub without telemetry, bars, warnings and advice; what goes wrong comes as an exception."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    constants.HF_HUB_DISABLE_TELEMETRY = True
    loggers: list[Any] = [transformers_logging, hub_logging]
    levels = [logger.get_verbosity() for logger in loggers]
    bars = loggers[0].is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers[0].disable_progress_bar()
        for logger in loggers:
            logger.set_verbosity_error()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.set_verbosity(level)
            if bars:
                loggers[0].enable_progress_bar()
