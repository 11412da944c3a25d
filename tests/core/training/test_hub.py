"""Models of the hub, which a server on this machine plays."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sheily_train.core.training import bases
from sheily_train.errors import BaseModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import json, sys, time, torch
from sheily_train.core.training import bases, hub
from sheily_train.errors import SheilyError

hub.ANSWER_SECONDS = 2

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
