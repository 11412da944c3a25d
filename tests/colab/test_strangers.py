"""A whole session of two real processes, with everything a stranger tries, and then a look at what it left where."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

WORKER = [sys.executable, "-m", "sheily_train", "worker", "--port", "0", "--device", "cpu", "--debug"]
CONNECT = [sys.executable, "-m", "sheily_train", "connect", "--debug"]
WRONG = "a-wrong-token-of-a-stranger-0123456789"
NAMES = (
    *(
        "../x",
        "../../../x",
        "..",
        ".",
        "a/b",
        "/tmp/sheily-x",
        "a\\b",
        "a\0b",
        "x" * 65,
        "x" * 20_000,
        "ñ",
        "%2e%2e%2fx",
    ),
    *("", " ", "a b", "-x", ".lock", "token", "CON", "runs/../../x"),
)
"""Names of runs that would lead elsewhere. Those that are good names after all lead into the folder of runs."""
GOOD_NAMES = {"token", "CON"}
SAMPLE = {"samples": [{"input_data": [0.5] * 1600, "anomaly_label": 0}]}


@dataclass
class Session:
    """What there was before and after."""

    root: Path
    token: str
    before: dict[Path, bytes]
    worker_said: str
    client_said: str
    statuses: dict[str, list[int]]

    @property
    def after(self) -> dict[Path, bytes]:
        return contents(self.root)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder, and what it holds; folders hold nothing."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def asker(port: int, token: str) -> Callable[..., int]:
    """A function that asks the worker for something and gives the status."""

    def ask(method: str, path: str, body: bytes = b"", **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        shown = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, shown | named)
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()

    return ask


def hostile(ask: Callable[..., int]) -> list[int]:
    """Everything that takes a run's name, given each of the hostile ones, as JSON and as a header."""
    statuses = []
    for name in NAMES:
        statuses.append(ask("POST", "/run", json.dumps({"run": name, "seed": 1}).encode()))
        header = re.sub(r"[^\x20-\x7e]", "?", name)
        for method, path in [("GET", "/state"), ("PUT", "/state"), ("GET", "/status"), ("GET", "/run")]:
            statuses.append(ask(method, path, Sheily_Run=header, Sheily_Owner="1", Sheily_Digest="0" * 64))
        statuses.append(ask("POST", "/train_layer2", json.dumps(SAMPLE).encode(), Sheily_Run=header))
    return statuses


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    root = tmp_path_factory.mktemp("strangers")
    for name in ("cwd", "home", "desk", "tmp"):
        (root / name).mkdir()
    places = {
        "HOME": "home",
        "SHEILY_HOME": "desk",
        "TMPDIR": "tmp",
        "XDG_CACHE_HOME": "home",
        "XDG_CONFIG_HOME": "home",
    }
    environment = {**os.environ, **{name: str(root / place) for name, place in places.items()}, "PYTHONUNBUFFERED": "1"}
    environment.pop("SHEILY_WORKER_TOKEN", None)
    before = contents(root)
    process = subprocess.Popen(
        [*WORKER, "--state-dir", str(root / "state")],
        cwd=root / "cwd",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line)
            if "guarda y sale" in line:
                break
        [address] = re.findall(r"^(http://\S+)$", "".join(said), re.MULTILINE)
        url, _sign, token = address.partition("#token=")
        reading = threading.Thread(target=said.extend, args=(process.stdout,))
        reading.start()
        ask = asker(int(url.rpartition(":")[2]), token)

        def connect(where: str, *words: str) -> str:
            own = {name: str(root / "desk") for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR")}
            given = {**environment, **own, "COLAB_SERVER_URL": where}
            done = subprocess.run([*CONNECT, *words], cwd=root / "cwd", env=given, capture_output=True, text=True)
            return f"{done.returncode} {done.stdout}{done.stderr}"

        client_said = connect(
            address,
            *("--muestras", "20", "--lote", "4", "--diagnostico", "--metricas", "--feedback"),
            *("--reporte", str(root / "desk" / "informe.html")),
        )
        client_said += connect(f"{url}#token={WRONG}", "--muestras", "4", "--run", "dos")
        client_said += connect(f"{url}/?token={token}", "--muestras", "4", "--run", "tres")
        statuses = {
            "query": [ask("GET", f"/status?token={token}", Authorization=shown) for shown in ("", f"Bearer {WRONG}")],
            "known": [ask("GET", f"/status?token={token}"), ask("GET", f"/{token}"), ask("BREW", f"/status?{token}")],
            "broken": [
                ask("POST", "/train_layer2", token.encode()),
                ask("POST", "/run", json.dumps({"run": f"{token}/"}).encode()),
            ],
            "hostile": hostile(ask),
        }
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        reading.join()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return Session(root, token, before, "".join(said), client_said, statuses)


def test_the_token_is_in_its_own_file_only(session: Session) -> None:
    """Journal, run log, report, states and all else on the disk hold no token; its file is its owner's alone."""
    files = {path for path, content in session.after.items() if session.token.encode() in content}
    assert files == {session.root / "state" / "token"}
    assert stat.S_IMODE((session.root / "state" / "token").stat().st_mode) == 0o600
    assert [path for path, content in session.after.items() if WRONG.encode() in content] == []
    suffixes = {path.suffix for path in session.after}
    assert {".html", ".json", ".md", ".jsonl", ".safetensors"} <= suffixes  # there was something to look at


def test_the_token_is_on_the_address_lines_only(session: Session) -> None:
    """What the worker says, with --debug and after requests that hold the token, has it in the addresses only."""
    lines = [line.strip() for line in session.worker_said.splitlines() if session.token in line]
    assert all(re.search(rf"http://127\.0\.0\.1:\d+#token={session.token}'?$", line) for line in lines)
    assert len(lines) == 3
    assert WRONG not in session.worker_said
    assert "GET /" not in session.worker_said


def test_the_client_never_says_the_token(session: Session) -> None:
    """A session that went well, one with a wrong token and one with the token in the query, all with --debug."""
    assert session.client_said.startswith("0 ")
    assert "Traceback" in session.client_said
    assert session.token not in session.client_said
    assert WRONG not in session.client_said


def test_a_token_in_the_query_lets_nobody_in(session: Session) -> None:
    """Nor does it harm whoever shows it in its header too."""
    assert session.statuses["query"] == [401, 401]
    assert session.statuses["known"] == [200, 404, 405]
    assert session.statuses["broken"] == [400, 400]


def test_hostile_names_are_refused(session: Session) -> None:
    """No name that leads elsewhere is taken, nor does any of them make the worker fail."""
    assert all(status < 500 for status in session.statuses["hostile"])
    assert session.statuses["hostile"].count(200) == 4 * len(GOOD_NAMES)


def test_nothing_is_written_outside_the_state_folder(session: Session) -> None:
    """After training, snapshots and hostile names the worker's folders are the state folder, and each run's own."""
    state, desk = session.root / "state", session.root / "desk"
    new = session.after.keys() - session.before.keys()
    elsewhere = {path for path in new if state not in (path, *path.parents) and desk not in path.parents}
    assert {path for path in elsewhere if not path.match("tmp/torchinductor_*")} == set()  # PyTorch's own, and empty
    assert {path.name for path in state.iterdir()} <= {"token", ".lock", "runs"}
    assert {path.name for path in (state / "runs").iterdir()} == {"principal", *GOOD_NAMES}
    assert list((state / "runs" / "principal").glob("snapshot-*/state.safetensors"))
