"""What a user asks for: every setting of a training run, its check, and where its value came from.

The order is flag, then environment (``SHEILY_EPOCHS``), then file (``--config``), then default. The command line's
options are made from the fields below, so that a setting is described once.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from sheily_train import paths
from sheily_train.errors import RequestError
from sheily_train.i18n import _

ENVIRONMENT_PREFIX = "SHEILY_"


def _setting(
    default: Any,
    help: str,
    *aliases: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    decides_weights: bool = True,
) -> Any:
    """A field of the request with its one-sentence description, further flag names and bounds.

    ``low`` and ``high`` are inclusive, ``above`` is exclusive. ``decides_weights`` says that another value gives
    another model; such settings make up the identity of a run.
    """
    metadata = {
        "help": help,
        "aliases": aliases,
        "choices": choices,
        "low": low,
        "above": above,
        "high": high,
        "decides_weights": decides_weights,
    }
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainRequest:
    """One branch to train and how. Raises :class:`RequestError` for a value that cannot be used."""

    branch: str = _setting("", _("Rama que se entrena."))
    model: str = _setting(
        "smollm2-135m", _("Modelo base: smollm2-135m, un id de Hugging Face o una carpeta."), "--model-name-or-path"
    )
    lora: bool = _setting(False, _("Entrena un adaptador LoRA en lugar de todos los pesos."))
    qlora: bool = _setting(False, _("LoRA sobre la base en 4 bits (CUDA y bitsandbytes)."))
    epochs: float = _setting(3.0, _("Pasadas por los datos."), "--num-train-epochs", above=0)
    max_steps: int = _setting(0, _("Pasos como mucho; 0: los que den las pasadas."), low=0)
    batch_size: int = _setting(4, _("Ejemplos por lote."), "--per-device-train-batch-size", low=1)
    gradient_accumulation: int = _setting(
        1, _("Lotes que se suman en cada paso del optimizador."), "--gradient-accumulation-steps", low=1
    )
    micro_tokens: int = _setting(
        0, _("Tokens que pasan juntos por el modelo; 0: según la memoria libre."), low=0, decides_weights=False
    )
    together: int = _setting(
        0,
        _("Ramas que se entrenan a la vez sobre una base; 0: se mide qué es más rápido."),
        low=0,
        decides_weights=False,
    )
    lr: float | None = _setting(
        None,
        _("Tasa de aprendizaje; por defecto 5e-5, y con LoRA 1e-3, o más con pocas --lora-targets."),
        "--learning-rate",
        above=0,
    )
    schedule: str = _setting(
        "cosine", _("Curso de la tasa de aprendizaje."), "--lr-scheduler-type", choices=("cosine", "linear", "constant")
    )
    warmup_steps: float = _setting(0.0, _("Pasos de calentamiento; por debajo de 1, parte del total."), low=0)
    weight_decay: float = _setting(0.0, _("Decaimiento de los pesos (AdamW)."), low=0)
    max_grad_norm: float = _setting(1.0, _("Norma a la que se recorta el gradiente; 0: sin recorte."), low=0)
    seed: int = _setting(0, _("Semilla."), low=0, high=2**32 - 1)
    max_length: int = _setting(1024, _("Tokens por ejemplo como mucho."), low=8)
    template: str = _setting(
        "sheily", _("Forma del texto: la de Sheily o la de chat del modelo."), choices=("sheily", "chat")
    )
    lora_r: int = _setting(8, _("Rango del adaptador."), low=1)
    lora_alpha: float | None = _setting(None, _("Escala del adaptador; por defecto, el doble del rango."), above=0)
    lora_dropout: float = _setting(
        0.0, _("Parte de la entrada del adaptador que se apaga al entrenar."), low=0, high=0.99
    )
    lora_targets: tuple[str, ...] = _setting(
        ("all-linear",), _("Capas del adaptador, separadas por comas; all-linear: todas las lineales.")
    )
    init_adapter: str = _setting(
        "",
        _("Adaptador del que se parte: una rama ya entrenada, o la carpeta de un adaptador LoRA."),
        "--adapter-name-or-path",
        decides_weights=False,  # its content does
    )
    precision: str = _setting("auto", _("Precisión de los cálculos."), choices=("auto", "bf16", "fp16", "fp32"))
    device: str = _setting("auto", _("Dispositivo."), choices=("auto", "cpu", "cuda", "mps"))
    attention: str = _setting("auto", _("Cálculo de la atención."), choices=("auto", "eager", "sdpa"))
    early_stopping: int = _setting(
        0, _("Para tras tantas pasadas sin mejorar en lo reservado y deja los mejores pesos; 0: nunca."), low=0
    )
    save_steps: int = _setting(0, _("Pasos entre puntos de control; 0: según el tiempo."), low=0, decides_weights=False)
    save_minutes: float = _setting(1.0, _("Minutos entre puntos de control."), low=0, decides_weights=False)
    branches_dir: Path = _setting(paths.branches_dir, _("Carpeta de las ramas."), decides_weights=False)
    output: Path | None = _setting(
        None,
        _("Carpeta del modelo (de una rama), o la que contiene una por rama (de varias)."),
        "--output-dir",
        decides_weights=False,
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_bounds(item, getattr(self, item.name))
        if not self.lora_targets:
            raise RequestError(_("--lora-targets está vacío."), mend=_("Da nombres de capas, o all-linear."))
        if self.init_adapter and not self.uses_adapter:
            raise RequestError(_("--init-adapter sin --lora ni --qlora."), mend=_("Añade --lora."))

    @property
    def uses_adapter(self) -> bool:
        """Whether an adapter is trained (LoRA, QLoRA) rather than every weight."""
        return self.lora or self.qlora

    @property
    def learning_rate(self) -> float:
        """The peak learning rate; the fewer layers of a block have an adapter, the more each has to learn."""
        if self.lr is not None:
            return self.lr
        if not self.uses_adapter:
            return 5e-5
        all_linear = self.lora_targets == ("all-linear",)
        return 1e-3 if all_linear else max(1e-3, min(4e-3, 7e-3 / len(self.lora_targets)))

    @property
    def effective_alpha(self) -> float:
        """The adapter's scale before it is divided by its rank."""
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * self.lora_r

    @property
    def examples_per_step(self) -> int:
        """Examples behind one optimizer step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def model_folder(self) -> Path:
        """Where the specialist goes."""
        return self.output if self.output is not None else paths.models_dir() / self.branch

    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights, ready for JSON; what was left open as what it comes to."""
        chosen = {
            item.name: _jsonable(getattr(self, item.name)) for item in fields(self) if item.metadata["decides_weights"]
        }
        return chosen | {"lr": self.learning_rate, "lora_alpha": self.effective_alpha}

    def to_json(self) -> dict[str, Any]:
        """Every setting, ready for JSON; ``--config`` reads it back."""
        return {name: _jsonable(value) for name, value in asdict(self).items()}


def settings() -> tuple[Field[Any], ...]:
    """The request's fields, in the order in which ``--help`` shows them."""
    return fields(TrainRequest)


def flag(name: str) -> str:
    """The flag of a setting: ``lora_r`` → ``--lora-r``."""
    return "--" + name.replace("_", "-")


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None) -> dict[str, Any]:
    """The settings that were given, by flag, environment or file, in this order of precedence.

    Args:
        flags: settings by name; ``None`` where a flag was not given.
        environment: variables as ``os.environ``.
        file: YAML or JSON with settings by name, or the ``training_config.json`` of an earlier run.
    """
    given: dict[str, Any] = {}
    if file is not None:
        given |= {name: _convert(name, value, f"{file}: {name}") for name, value in _read_config(file).items()}
    for item in settings():
        variable = ENVIRONMENT_PREFIX + item.name.upper()
        if value := environment.get(variable):
            given[item.name] = _convert(item.name, value, variable)
    given |= {name: _convert(name, value, flag(name)) for name, value in flags.items() if value is not None}
    return given


def _read_config(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(_("No existe {file}.").format(file=file), mend=_("Revisa --config.")) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(
            _("{file} no se puede leer como YAML ni JSON: {error}.").format(file=file, error=error)
        ) from None
    if isinstance(content, dict):
        content = content.get("request", content)
    if not isinstance(content, dict):
        raise RequestError(
            _("{file} contiene {kind}; se esperaban pares «ajuste: valor».").format(
                file=file, kind=type(content).__name__
            )
        )
    names = [item.name for item in settings()]
    by_alias = {
        alias.lstrip("-").replace("-", "_"): item.name for item in settings() for alias in item.metadata["aliases"]
    }
    found = {}
    for key, value in content.items():
        name = by_alias.get(str(key).replace("-", "_"), str(key).replace("-", "_"))
        if name not in names:
            near = difflib.get_close_matches(name, [*names, *by_alias], n=1)
            raise RequestError(
                _("{file}: ajuste desconocido «{key}».").format(file=file, key=key),
                mend=_("¿Quizá «{near}»?").format(near=near[0]) if near else _("Los ajustes son: ") + ", ".join(names),
            )
        found[name] = value
    return found


def _convert(name: str, value: Any, origin: str) -> Any:
    """The value as the field's type, from a flag, a variable's text or a file's value."""
    kind = get_type_hints(TrainRequest)[name]
    optional = get_origin(kind) in (Union, types.UnionType)
    if optional:
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not type(None))
    try:
        return _as(kind, value)
    except (TypeError, ValueError):
        raise RequestError(
            _("{origin} vale «{value}»; se esperaba {kind}.").format(
                origin=origin, value=value, kind=_KIND_NAMES.get(kind, _("una lista de nombres"))
            )
        ) from None


_KIND_NAMES = {
    int: _("un número entero"),
    float: _("un número"),
    bool: _("true o false"),
    str: _("un texto"),
    Path: _("una ruta"),
}
_TRUE_WORDS, _FALSE_WORDS = {"1", "true", "yes", "on", "si", "sí"}, {"0", "false", "no", "off"}


def _as(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        words = value.split(",") if isinstance(value, str) else list(value)
        if not all(isinstance(word, str) for word in words):
            raise TypeError
        return tuple(word.strip() for word in words if word.strip())
    if kind is bool:
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if word not in _TRUE_WORDS | _FALSE_WORDS:
            raise ValueError
        return word in _TRUE_WORDS
    if isinstance(value, bool) or value is None or isinstance(value, dict | list):
        raise TypeError
    if kind is int and isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        return int(value)
    if kind is Path:
        return Path(value).expanduser()
    return kind(value)


def _check_bounds(item: Field[Any], value: Any) -> None:
    if value is None:
        return
    bounds = item.metadata
    if bounds["choices"] and value not in bounds["choices"]:
        expected = _("uno de: ") + ", ".join(bounds["choices"])
    elif isinstance(value, float) and not math.isfinite(value):
        expected = _("un número finito")
    elif bounds["low"] is not None and value < bounds["low"]:
        expected = _("{bound} o más").format(bound=bounds["low"])
    elif bounds["above"] is not None and value <= bounds["above"]:
        expected = _("más de {bound}").format(bound=bounds["above"])
    elif bounds["high"] is not None and value > bounds["high"]:
        expected = _("{bound} como mucho").format(bound=bounds["high"])
    else:
        return
    raise RequestError(
        _("{flag} vale {value}; se esperaba {expected}.").format(flag=flag(item.name), value=value, expected=expected)
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
