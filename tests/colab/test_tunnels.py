from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sheily_train.colab.tunnels import Tunnel, open_tunnel
from sheily_train.errors import MissingExtraError, RequestError, SheilyError

CLOUDFLARED = """
import os, sys, time
from pathlib import Path
def say(text):
    print("2026-01-02T03:04:05Z INF " + text, file=sys.stderr, flush=True)
note = Path(os.environ["FAKE_NOTE"])
with note.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + f" pid={os.getpid()}\\n")
mode = os.environ.get("FAKE_MODE", "")
say("Requesting new quick Tunnel on trycloudflare.com...")
if mode == "fail":
    print('failed to request quick Tunnel: Post "https://api.trycloudflare.com/tunnel": no such host', file=sys.stderr)
    sys.exit(1)
if mode == "mute":
    time.sleep(60)
say("+" + "-" * 92 + "+")
say("|  Your quick Tunnel has been created! Visit it at (it may take some time to be reachable):  |")
starts = len(note.read_text().splitlines())
say(f"|  https://four-dashed-words-{starts}.trycloudflare.com                                         |")
say("+" + "-" * 92 + "+")
if mode == "chatty":
    for _ in range(1000):
        say("x" * 1000)
    note.with_suffix(".all-said").touch()
time.sleep(60)
"""

NGROK = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if sys.argv[1] != "start":
    sys.exit(0)
if "good-token" not in sys.argv:
    print('t=2026-01-02T03:04:05 lvl=eror msg="failed to auth" err="authtoken bad-token is not valid: ERR_NGROK_105"',
          flush=True)
    sys.exit(1)
class Api(BaseHTTPRequestHandler):
    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.answer({"endpoints": []})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        port = asked["upstream"]["url"].rpartition(":")[2]
        self.answer({"name": asked["name"], "url": f"https://port-{port}.ngrok-free.app", "uri": "/x"}, 201)
    def log_message(self, *args):
        pass
server = HTTPServer(("127.0.0.1", 0), Api)
for words in (f'msg="starting web service" obj=web addr=127.0.0.1:{server.server_port}',
              'msg="tunnel session started" obj=tunnels.session', 'msg="client session established" obj=csess'):
    print("t=2026-01-02T03:04:05 lvl=info " + words, flush=True)
server.serve_forever()
"""


def put_on_path(name: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that behaves as the real one does towards whoever starts it; returns the file where it notes starts."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!{sys.executable} -S\n{source}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    note = folder / f"{name}.note"
    monkeypatch.setenv("FAKE_NOTE", str(note))
    return note


def started(note: Path) -> list[psutil.Process]:
    """The programs that were started and still run."""
    pids = [int(line.rpartition("pid=")[2]) for line in note.read_text().splitlines()]
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def wait_for(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return once something holds; fail when it never does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)


@pytest.fixture
def cloudflared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    note = put_on_path("cloudflared", CLOUDFLARED, tmp_path / "bin", monkeypatch)
    yield note
    for process in started(note) if note.exists() else []:
        process.kill()


def test_cloudflared_gives_its_address_and_ends_with_the_tunnel(cloudflared: Path) -> None:
    """The address is read from what the program says, and close leaves no program behind."""
    deaths: list[str] = []
    tunnel = open_tunnel("cloudflared", 8123, on_death=lambda: deaths.append("died"))
    assert tunnel.url == "https://four-dashed-words-1.trycloudflare.com"
    assert "tunnel --no-autoupdate --url http://127.0.0.1:8123" in cloudflared.read_text()
    assert len(started(cloudflared)) == 1
    tunnel.close()
    tunnel.close()
    assert started(cloudflared) == []
    time.sleep(0.1)
    assert deaths == []


def test_a_tunnel_that_dies_is_noticed(cloudflared: Path) -> None:
    """Whoever opened it is told, once."""
    died = threading.Event()
    tunnel = open_tunnel("cloudflared", 8123, on_death=died.set)
    started(cloudflared)[0].kill()
    assert died.wait(5)
    tunnel.close()


def test_a_chatty_tunnel_is_not_stopped_by_a_full_pipe(cloudflared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says after the address is read too, as long as it lives."""
    monkeypatch.setenv("FAKE_MODE", "chatty")
    tunnel = open_tunnel("cloudflared", 8123)
    wait_for(cloudflared.with_suffix(".all-said").exists)
    tunnel.close()


@pytest.mark.parametrize(("mode", "words"), [("fail", "no such host"), ("mute", "Requesting new quick Tunnel")])
def test_no_address_is_an_error_with_the_programs_last_words(
    cloudflared: Path, monkeypatch: pytest.MonkeyPatch, mode: str, words: str
) -> None:
    """A program that ends or stays mute is given up in time and ended; its API's own address is no tunnel."""
    monkeypatch.setenv("FAKE_MODE", mode)
    begun = time.monotonic()
    with pytest.raises(SheilyError, match=words) as caught:
        open_tunnel("cloudflared", 8123, seconds=2)
    assert caught.value.mend
    assert time.monotonic() - begun < 6
    assert started(cloudflared) == []


def test_ctrl_c_while_waiting_leaves_no_program(cloudflared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption ends the program too."""
    monkeypatch.setenv("FAKE_MODE", "mute")
    threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        open_tunnel("cloudflared", 8123)
    assert started(cloudflared) == []


def test_without_the_program_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ways out: install it, ngrok, ssh -L."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match="cloudflared") as caught:
        open_tunnel("cloudflared", 8123)
    assert "ngrok" in caught.value.mend
    assert "ssh -L 8123:127.0.0.1:8123" in caught.value.mend


def test_a_program_that_cannot_be_started_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for another kind of machine, or half downloaded."""
    put_on_path("cloudflared", "", tmp_path, monkeypatch)
    (tmp_path / "cloudflared").write_bytes(b"\x7fELF\x00")
    with pytest.raises(SheilyError, match=f"{tmp_path / 'cloudflared'} no se pudo arrancar"):
        open_tunnel("cloudflared", 8000)


def test_none_is_the_loopback_address() -> None:
    """Nothing is started."""
    tunnel = open_tunnel("none", 8123)
    assert tunnel.url == "http://127.0.0.1:8123"
    tunnel.close()


def test_an_address_has_no_slash_at_its_end() -> None:
    """What is joined to it begins with one."""
    assert Tunnel("https://x.example/").url == "https://x.example"


@pytest.fixture
def ngrok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The real pyngrok before a program that speaks as ngrok does."""
    conf = pytest.importorskip("pyngrok.conf")
    monkeypatch.setattr(conf, "DEFAULT_NGROK_CONFIG_PATH", str(tmp_path / "ngrok" / "ngrok.yml"))
    put_on_path("ngrok", NGROK, tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("NGROK_AUTHTOKEN", "good-token")
    return str(tmp_path / "bin" / "ngrok")


def test_ngrok_gives_its_address_and_ends_with_the_tunnel(ngrok: str) -> None:
    """Opened through pyngrok, watched and closed as the other."""
    from pyngrok import process

    died = threading.Event()
    tunnel = open_tunnel("ngrok", 8123, on_death=died.set)
    assert tunnel.url == "https://port-8123.ngrok-free.app"
    assert process.is_process_running(ngrok)
    tunnel.close()
    assert not process.is_process_running(ngrok)
    assert not died.is_set()


def test_an_ngrok_that_dies_is_noticed(ngrok: str) -> None:
    """Whoever opened it is told."""
    from pyngrok import process

    died = threading.Event()
    tunnel = open_tunnel("ngrok", 8123, on_death=died.set)
    process._current_processes[ngrok].proc.kill()
    assert died.wait(5)
    tunnel.close()


def test_ngrok_without_a_right_authtoken(ngrok: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent: what to set. Wrong: ngrok's own reason, without the token in it."""
    monkeypatch.setenv("NGROK_AUTHTOKEN", "bad-token")
    with pytest.raises(SheilyError, match="ERR_NGROK_105") as caught:
        open_tunnel("ngrok", 8123)
    assert "bad-token" not in str(caught.value)
    monkeypatch.delenv("NGROK_AUTHTOKEN")
    with pytest.raises(RequestError, match="NGROK_AUTHTOKEN"):
        open_tunnel("ngrok", 8123)


def test_ngrok_without_pyngrok(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message holds the install line."""
    monkeypatch.setitem(sys.modules, "pyngrok", None)
    with pytest.raises(MissingExtraError, match=r"sheily-train\[ngrok\]"):
        open_tunnel("ngrok", 8123)
