"""The adapter that training begins with in place of a blank one: another specialist's, or any LoRA in PEFT's format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sheily_train import paths
from sheily_train.core.branches import catalog
from sheily_train.core.training import specialist
from sheily_train.core.training.file_hashes import kept_sha256
from sheily_train.core.training.request import TrainRequest
from sheily_train.errors import RequestError
from sheily_train.i18n import _


def find(request: TrainRequest) -> Path:
    """The folder of ``request.init_adapter``: a trained branch's, where one is called so, else a path.

    Raises:
        RequestError: there is no adapter, or it is the folder that the run itself will fill.
    """
    name = request.init_adapter
    folders = [paths.models_dir() / name, Path(name).expanduser()]
    found = next((folder for folder in folders if (folder / paths.ADAPTER_WEIGHTS).is_file()), None)
    if found is None:
        raise RequestError(
            _("--init-adapter {name}: no hay ningún adaptador en {folders}.").format(
                name=name, folders=_(" ni en ").join(dict.fromkeys(map(str, folders)))
            ),
            mend=_("Entrénalo antes con: sheily train --branch {name} --lora").format(name=name)
            if catalog.is_name(name)
            else _("Da la carpeta de un adaptador LoRA con el formato de PEFT."),
        )
    if found.resolve() == request.model_folder.resolve():
        raise RequestError(
            _("--init-adapter {name}: es la misma carpeta que recibirá el resultado.").format(name=name),
            mend=_("Elige otra con --output, y el adaptador de partida queda como está."),
        )
    return found


def weights_hash(request: TrainRequest) -> str:
    """The sha256 of the adapter's weights, in hexadecimal; empty when training begins with a blank one."""
    if not request.init_adapter:
        return ""
    return kept_sha256(find(request) / paths.ADAPTER_WEIGHTS)


def check(request: TrainRequest, base: str, model: Any) -> None:
    """Raise RequestError unless the adapter fits.

    Args:
        request: the rank, scale and layers it must have.
        base: what the base model is, as :func:`~sheily_train.core.training.bases.identity` tells.
        model: one with a blank adapter as it is asked for, with or without data.
    """
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    folder = find(request)
    try:
        config = dict(json.loads((folder / paths.ADAPTER_CONFIG).read_bytes()))
        with safe_open(folder / paths.ADAPTER_WEIGHTS, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise RequestError(
            _("El adaptador de {folder} no se puede leer: {error}.").format(folder=folder, error=error),
            mend=_("Entrénalo de nuevo, o copia otra vez su carpeta."),
        ) from error
    trained = specialist.read_config(folder)
    if trained and trained["base"] != base:
        raise _misfit(
            folder,
            _("es de la base {its}, no de {asked}").format(its=trained["base"], asked=base),
            _("Pide la suya con --model."),
        )
    mend = _("Pide lo mismo que él: --lora-r {r} --lora-alpha {lora_alpha} --lora-targets {targets}").format(
        r=config.get("r"), lora_alpha=config.get("lora_alpha"), targets=_targets(config)
    )
    if shapes != {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}:
        raise _misfit(folder, _("sus tensores no son los pedidos"), mend)
    if _scale(config) != request.effective_alpha / request.lora_r:
        raise _misfit(folder, _("su escala no es la pedida"), mend)


def load(request: TrainRequest, known_hash: str, model: Any, adapter: str) -> None:
    """Give its weights to an adapter of a model. Raises RequestError when they are others by now."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load

    folder = find(request)
    content = (folder / paths.ADAPTER_WEIGHTS).read_bytes()
    if hashlib.sha256(content).hexdigest() != known_hash:
        raise RequestError(
            _("El adaptador de {folder} ha cambiado entretanto.").format(folder=folder),
            mend=_("Repite la orden cuando haya terminado lo que lo escribe."),
        )
    set_peft_model_state_dict(model, load(content), adapter_name=adapter)


def _misfit(folder: Path, why: str, mend: str) -> RequestError:
    return RequestError(
        _("El adaptador de {folder} no sirve de partida: {why}.").format(folder=folder, why=why), mend=mend
    )


def _targets(config: dict[str, Any]) -> str:
    targets = config.get("target_modules") or "?"
    return targets if isinstance(targets, str) else ",".join(sorted({name.rpartition(".")[2] for name in targets}))


def _scale(config: dict[str, Any]) -> float | None:
    """By what PEFT multiplies the product of the two factors; ``None`` when it is not the same in every layer."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("use_rslora") or config.get("alpha_pattern") or not rank:
        return None
    return alpha / rank if isinstance(alpha, int | float) and isinstance(rank, int) else None
