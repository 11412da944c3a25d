from __future__ import annotations

import http.server
import importlib
import os
import platform
import shutil
import socket
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sheily_train.colab.serve import BackgroundWorker
from sheily_train.scripts.deployment import cell_start
from sheily_train.scripts.deployment.cell_start import start_in_cell
from tests.colab.test_tunnels import CLOUDFLARED, NGROK, put_on_path, started

PYNGROK = "pyngrok>=7.3"


@pytest.fixture
def cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., BackgroundWorker]]:
    """Starts workers as the cell does, on a machine without tunnels or tokens, and stops them."""
    for name in ("NGROK_AUTHTOKEN", "SHEILY_WORKER_TOKEN"):
        monkeypatch.setenv(name, "")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(cell_start, "CLOUDFLARED_URL", "http://127.0.0.1:9/cloudflared-{machine}")
    workers: list[BackgroundWorker] = []

    def start(tunnel: str, port: int = 0) -> BackgroundWorker:
        workers.append(start_in_cell(tunnel, port, str(tmp_path / "omega21"), PYNGROK))
        return workers[-1]

    yield start
    for worker in workers:
        worker.stop()


def test_a_cloudflared_that_is_there_is_used(
    cell: Callable[..., BackgroundWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is downloaded for it."""
    note = put_on_path("cloudflared", CLOUDFLARED, tmp_path / "bin", monkeypatch)
    worker = cell("auto")
    assert worker.address.startswith("https://four-dashed-words-1.trycloudflare.com#token=")
    worker.stop()
    assert started(note) == []


@pytest.mark.skipif(platform.system() != "Linux", reason="fetched for Linux only")
@pytest.mark.parametrize("wanted", ["auto", "cloudflared"])
def test_a_cloudflared_that_is_not_there_is_fetched(
    cell: Callable[..., BackgroundWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    """Once: it stays in the state folder, for the next start of the cell."""
    put_on_path("cloudflared", CLOUDFLARED, tmp_path / "site", monkeypatch)
    shutil.move(tmp_path / "site" / "cloudflared", tmp_path / "site" / "cloudflared-linux-any")
    asked: list[str] = []

    class Site(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=tmp_path / "site")  # type: ignore[arg-type]

        def log_message(self, *arguments: object) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{site.server_port}/cloudflared-linux-any"
        monkeypatch.setattr(cell_start, "CLOUDFLARED_URL", url)
        first = cell(wanted)
        first.stop()
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        second = cell(wanted)
        site.shutdown()
    assert "trycloudflare.com" in second.address
    assert second.address.partition("#")[2] == first.address.partition("#")[2]
    assert asked == ["/cloudflared-linux-any"]
    assert os.access(tmp_path / "omega21" / "bin" / "cloudflared", os.X_OK)


@pytest.mark.parametrize("wanted", ["auto", "ngrok"])
def test_else_ngrok_with_a_token_of_the_environment_or_of_colabs_secrets(
    cell: Callable[..., BackgroundWorker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    """Colab's secrets are a module that exists there only; here one stands in for it."""
    conf = pytest.importorskip("pyngrok.conf")
    monkeypatch.setattr(conf, "DEFAULT_NGROK_CONFIG_PATH", str(tmp_path / "ngrok" / "ngrok.yml"))
    put_on_path("ngrok", NGROK, tmp_path / "bin", monkeypatch)
    if wanted == "ngrok":
        monkeypatch.setenv("NGROK_AUTHTOKEN", "good-token")
    else:
        secrets = types.ModuleType("google.colab.userdata")
        secrets.get = {"NGROK_AUTHTOKEN": "good-token"}.__getitem__  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        monkeypatch.setitem(sys.modules, "google.colab.userdata", secrets)
    worker = cell(wanted)
    assert ".ngrok-free.app#token=" in worker.address
    worker.stop()
    program = importlib.import_module("pyngrok.process")._current_processes.pop(str(tmp_path / "bin" / "ngrok"))
    program.proc.stdout.close()  # pyngrok leaves that to the end of the process


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("auto", r"falta NGROK_AUTHTOKEN\..*dashboard\.ngrok\.com.*none en TUNEL"),
        ("cloudflared", r"(?s)No se encontró el programa cloudflared.*--tunnel es TUNEL"),
        ("ngrok", r"(?s)falta la variable NGROK_AUTHTOKEN.*--tunnel es TUNEL"),
        ("localtunnel", r"TUNEL es «localtunnel».*principio de la celda"),
    ],
)
def test_without_a_tunnel_it_says_what_to_do(cell: Callable[..., BackgroundWorker], wanted: str, words: str) -> None:
    """No trace in the notebook, but a way out in the cell's own words; and nothing is left that runs."""
    with pytest.raises(SystemExit, match=words):
        cell(wanted)
    cell("none").stop()


def test_a_port_that_is_taken_names_the_constant(cell: Callable[..., BackgroundWorker]) -> None:
    """The worker speaks of its flag; the cell says which of its constants that is."""
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit, match=r"(?s)puerto.*PUERTO"):
        cell("none", other.getsockname()[1])


def test_ngroks_package_is_installed_when_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before: here it cannot be had, and only who asks for ngrok is told."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="no pudo instalar sheily-no-ngrok>=1"):
        start_in_cell("ngrok", 0, str(tmp_path), "sheily-no-ngrok>=1")
    start_in_cell("none", 0, str(tmp_path), "sheily-no-ngrok>=1").stop()
