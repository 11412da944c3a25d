from __future__ import annotations

import ast
import json
import os
import re
import shutil
import site
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from click.testing import CliRunner

from sheily_train.colab.batches import BINARY_FORM, batch_to_binary, make_batch
from sheily_train.colab.protocol import Claim, Event, Kind, first_chain, next_chain
from sheily_train.errors import RequestError
from sheily_train.scripts.deployment import build_colab_cell
from sheily_train.scripts.deployment.build_colab_cell import CELL_FILE, NOTEBOOK_FILE, ROOT, build_cell, generate

CELL = (ROOT / CELL_FILE).read_text(encoding="utf-8")

AS_COLAB = """
import asyncio, importlib.util, sys
from pathlib import Path

assert importlib.util.find_spec("sheily_train") is None, "the package must not be there"
cell = compile(Path(sys.argv[1]).read_text(encoding="utf-8"), "<cell>", "exec", dont_inherit=True)
names = {"__name__": "__main__"}

async def notebook():
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        if line == "cell":
            exec(cell, names)
        else:
            exec(line, names)
        print("#done", flush=True)

asyncio.run(notebook())
"""
"""A notebook's kernel: it runs its cells inside a running event loop, in a namespace without ``__file__``."""


class Kernel:
    """The process in which the cell runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, line: str) -> str:
        """Run ``cell``, or another cell of one line; returns what it printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        said: list[str] = []
        for text in self._process.stdout:
            if text == "#done\n":
                return "".join(said)
            said.append(text)
        pytest.fail("the kernel died:\n" + "".join(said))

    def end(self) -> int:
        """Close the notebook; returns the exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(20)


@contextmanager
def kernel(folder: Path, cell: str) -> Iterator[Kernel]:
    (folder / "kernel.py").write_text(AS_COLAB)
    (folder / "cell.txt").write_text(cell, encoding="utf-8")
    # -S: what is installed is found, but no .pth file is read, so that an editable installation does not help the cell.
    hidden = {"SHEILY_WORKER_TOKEN", "NGROK_AUTHTOKEN"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONPATH": os.pathsep.join(site.getsitepackages()), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-S", "kernel.py", "cell.txt"],
        cwd=folder,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with process:
        yield Kernel(process)
        process.kill()


def address_in(said: str) -> tuple[str, str]:
    """URL and token of the address that the worker showed."""
    found = re.search(r"^(http://127\.0\.0\.1:\d+)#token=(\S+)$", said, re.MULTILINE)
    assert found, said
    return found[1], found[2]


def with_constants(cell: str, **values: str) -> str:
    """The cell with other constants at its top, as a person would change them."""
    for name, value in values.items():
        cell, count = re.subn(rf"^{name} = \S+", f"{name} = {value}", cell, flags=re.MULTILINE)
        assert count == 1
    return cell


def send_event(http: httpx2.Client, seq: int, owner: int, chain: str) -> tuple[str, dict[str, Any]]:
    """Send a batch with a number, as sheily's client does; returns the chain after it, and the answer."""
    rows = np.random.default_rng(seq).normal(size=(3, 1600))
    event = Event(seq, Kind.TRAIN, f"2026-01-31T12:00:0{seq}+00:00", BINARY_FORM, batch_to_binary(make_batch(rows)))
    chain = next_chain(chain, event.digest())
    claim = Claim("uno", seq, owner, event.time, event.digest(), chain)
    answer = http.post("/train_layer2", content=event.body, headers={**claim.headers(), "Content-Type": event.form})
    assert answer.status_code == 200, answer.text
    return chain, answer.json()


def test_the_committed_files_are_what_would_be_written() -> None:
    """Byte for byte, whatever the folder and the process."""
    for name, content in generate(ROOT).items():
        assert (ROOT / name).read_bytes() == content.encode(), f"{name}: run the module without --check"
    command = [sys.executable, "-m", build_colab_cell.BUILDER, "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    assert subprocess.run(command, cwd="/", env=environment, capture_output=True).returncode == 0


def test_as_colab_runs_it(tmp_path: Path) -> None:
    """Without the package, beside a running loop: both kinds of client train, and a second run goes on where it was."""
    with kernel(tmp_path, with_constants(CELL, TUNEL='"none"', PUERTO="0")) as colab:
        url, token = address_in(colab.run("cell"))
        colab.run("_ = 42  # as 'for _ in …' in another cell does")
        headers = {"Authorization": f"Bearer {token}"}
        with httpx2.Client(base_url=url, headers=headers, timeout=30) as http:
            sample = {"input_data": [0.5] * 1600, "anomaly_label": 1}
            answer = http.post("/train_layer2", json={"samples": [sample] * 8, "epochs": 1})
            assert (answer.status_code, answer.json()["status"]) == (200, "trained"), answer.text
            owner = http.post("/run", json={"run": "uno", "seed": 7, "owner": 0}).json()["owner"]
            chain, trained = send_event(http, 1, owner, first_chain("uno", 7))
            assert (trained["batch_size"], trained["timestamp"]) == (3, "2026-01-31T12:00:01+00:00")
            assert http.get("/status").json()["estadisticas"]["total_batches"] == 1
            assert http.get("/info").json()["protocol"] == 1
            assert http.get("/status", headers={"Authorization": "Bearer " + "x" * 43}).status_code == 401
        second_url, second_token = address_in(colab.run("cell"))
        assert second_token == token
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(url + "/health")
        with httpx2.Client(base_url=second_url, headers=headers, timeout=30) as http:
            attached = http.post("/run", json={"run": "uno", "seed": 7, "owner": owner}).json()
            assert (attached["last_seq"], attached["chain"]) == (1, chain)
            send_event(http, 2, attached["owner"], chain)
            assert http.get("/status").json()["estadisticas"]["total_batches"] == 2
        colab.run("trabajador.stop()")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(second_url.rpartition(":")[2])))
        assert colab.end() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cell.txt", "kernel.py", "omega21"]


def test_the_notebook_holds_the_guide_and_the_very_cell() -> None:
    """Two cells with ids that stay, and no output."""
    content = json.loads((ROOT / NOTEBOOK_FILE).read_text(encoding="utf-8"))
    guide, code = content["cells"]
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert (guide["cell_type"], guide["id"], code["cell_type"], code["id"]) == (
        "markdown",
        "guia",
        "code",
        "trabajador",
    )
    assert "".join(code["source"]) + "\n" == CELL
    assert code["outputs"] == []


def test_the_cell_is_python_that_people_can_read() -> None:
    """No long lines, no encoded text, nothing that runs text; each module has its heading and every name is defined."""
    assert max(map(len, CELL.splitlines())) <= 200
    tree = ast.parse(CELL)
    assert [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and _looks_encoded(node.value)] == []
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert called.isdisjoint({"exec", "eval", "compile", "__import__"})
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported.isdisjoint({"base64", "zlib", "marshal", "pickle", "codecs"})
    for name in ("errors", "durable", "core/omega/learner", "colab/runs", "colab/worker", "colab/serve"):
        assert f"\n# sheily_train/{name}.py\n" in CELL
    assert "TYPE_CHECKING" not in CELL
    assert not re.search(r"^\s*(from|import) sheily_train", CELL, re.MULTILINE)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--no-cache", "--select", "E9,F"]
    done = subprocess.run([*command, str(ROOT / CELL_FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def _looks_encoded(value: object) -> bool:
    return isinstance(value, str) and any(len(word) > 100 and word.isascii() for word in value.split())


def test_every_definition_of_the_modules_is_in_the_cell() -> None:
    """Each function and class keeps its text, docstring included, but for the translation's name."""
    for module in ("errors", "durable", "core/omega/learner", "colab/protocol", "colab/worker", "colab/serve"):
        source = (ROOT / "sheily_train" / f"{module}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                text = str(ast.get_source_segment(source, node))
                assert re.sub(r"\b_\(", "_es(", text) in CELL, f"{module}: {node.name}"


def test_only_what_the_code_imports_is_installed() -> None:
    """The versions are those of pyproject.toml; torch and numpy are never installed."""
    wanted = re.search(r"^install_missing\(\[\n(.*?)^\]\)", CELL, re.MULTILINE | re.DOTALL)
    assert wanted
    names = re.findall(r'"([a-z0-9-]+)>=[\d.]+"', wanted[1])
    assert names == [
        *("fastapi", "filelock", "h11", "limits", "orjson"),
        *("prometheus-client", "safetensors", "starlette", "uvicorn"),
    ]
    assert set(re.findall(r'"(.+)"', wanted[1])) <= set(re.findall(r'"(.+)"', (ROOT / "pyproject.toml").read_text()))
    assert CELL.index("install_missing([") < CELL.index("\nimport torch\n")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the cell is made of."""
    shutil.copytree(ROOT / "sheily_train", tmp_path / "sheily_train", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def append(*texts: str) -> Callable[[str], str]:
    return lambda source: source + "\n" + "\n".join(texts) + "\n"


@pytest.mark.parametrize(
    ("module", "change", "words"),
    [
        ("colab/turns", append("STATE_PIECE = 1"), r"«STATE_PIECE».*colab\.turns y .*colab\.worker"),
        ("colab/turns", append("def _sha256() -> None: ..."), r"«_sha256».*colab\.protocol y .*colab\.turns"),
        ("colab/turns", append("queue = 1"), r"«queue».*colab\.turns y .*colab\.learner_thread"),
        ("colab/turns", append("trabajador = 1"), r"«trabajador».*principio de la celda y .*colab\.turns"),
        ("colab/turns", append("from shutil import copy as time"), r"«time».*colab\.(turns|security|runs|worker)"),
        ("colab/turns", append("HERE = __file__"), r"colab\.turns .*__file__"),
        ("colab/turns", append("import sheily_train.errors"), r"colab\.turns .*«import»"),
        ("colab/turns", append("from sheily_train.errors import DataError as E"), r"colab\.turns .*otro nombre"),
        (
            "colab/turns",
            append("def late() -> None:", "    from sheily_train.errors import DataError"),
            r"colab\.turns .*dentro de una función",
        ),
        ("colab/serve", append("def late() -> None:", "    import pandas"), r"colab\.serve .*«pandas»"),
        ("colab/serve", append("import pandas"), r"«pandas».*pyproject"),
        ("colab/serve", append("for _ in (): pass"), r"colab\.serve .*«_»"),
        (
            "scripts/deployment/cell_packages",
            append("from sheily_train.errors import DataError"),
            r"va antes que todos",
        ),
        (
            "colab/serve",
            append("from sheily_train.nothing import Nothing"),
            r"sheily_train\.nothing .*no es un archivo",
        ),
    ],
)
def test_what_would_mean_something_else_in_the_cell_is_refused(
    checkout: Path, module: str, change: Callable[[str], str], words: str
) -> None:
    """Names that two modules use, and what a cell cannot do; the message names the modules."""
    path = checkout / "sheily_train" / f"{module}.py"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(RequestError, match=words):
        build_cell(checkout)


def test_imports_for_types_are_gathered_too(checkout: Path) -> None:
    """A block under TYPE_CHECKING vanishes; what it imports from elsewhere stands at the top, once."""
    path = checkout / "sheily_train" / "colab" / "turns.py"
    block = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import limits\n    from sheily_train import runlog\n"
    )
    path.write_text(path.read_text(encoding="utf-8").replace("import asyncio\n", "import asyncio\n" + block))
    cell = build_cell(checkout)
    assert cell.count("\nimport limits\n") == 1
    assert "TYPE_CHECKING" not in cell
    assert "runlog" not in cell


def test_check_tells_what_is_stale(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent or old files leave with 1 and the first differences; the command without --check writes them."""
    monkeypatch.setattr(build_colab_cell, "ROOT", checkout)
    run = CliRunner().invoke
    absent = run(build_colab_cell.main, ["--check"])
    assert absent.exit_code == 1
    assert not (checkout / CELL_FILE).exists()
    assert run(build_colab_cell.main).output.count("Escrito") == 2
    assert run(build_colab_cell.main, ["--check"]).output == ""
    path = checkout / "sheily_train" / "colab" / "turns.py"
    path.write_text(path.read_text(encoding="utf-8").replace("REORDER_WINDOW = 16", "REORDER_WINDOW = 17"))
    stale = run(build_colab_cell.main, ["--check"])
    assert stale.exit_code == 1
    assert "-REORDER_WINDOW = 16\n+REORDER_WINDOW = 17\n" in stale.output
    path.write_text("import sheily_train.errors\n")
    broken = run(build_colab_cell.main, ["--check"])
    assert (broken.exit_code, "Traceback" in broken.output) == (1, False)
