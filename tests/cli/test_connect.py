"""``sheily connect`` and ``./conectar_colab.sh`` as a person types them, at a real worker."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sheily_train import cli, runlog
from sheily_train.cli.connect import connect
from sheily_train.cli.doctor import doctor
from sheily_train.cli.worker import worker as worker_command
from tests.colab.test_connect import TOKEN, Worker

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "conectar_colab.sh"
SEED_LINES = (
    "./conectar_colab.sh https://tu-url.ngrok-free.app",
    "./conectar_colab.sh <URL> --muestras 100 --diagnostico",
    "./conectar_colab.sh <URL> --muestras 5000 --tipo temporal --anomalias 20",
    "./conectar_colab.sh <URL> --muestras 10000 --tipo neuronal --metricas",
    "./conectar_colab.sh https://tu-url.ngrok-free.app \\\n  --muestras 1000 \\\n  --tipo neuronal \\\n  --metricas",
    "./conectar_colab.sh $COLAB_URL --muestras 500",
    "./conectar_colab.sh https://tu-url",
    "./conectar_colab.sh https://tu-url.ngrok-free.app --diagnostico",
)
Run = Callable[..., tuple[int, str, str]]

posix = pytest.mark.skipif(os.name == "nt", reason="signals, terminals and shells of POSIX")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker that answers, 10 ms a batch."""
    worker = Worker(tmp_path_factory.mktemp("worker"), seconds=0.01)
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root of the test's own, which is the current folder; no address from elsewhere."""
    monkeypatch.setenv("SHEILY_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("COLAB_SERVER_URL", "SHEILY_TOKEN", "COLAB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A run of the test's own, as the worker has others already."""
    return "r" + re.sub(r"\W", "", request.node.name)[-50:] + str(random.randrange(10**6))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], worker: Worker, name: str) -> Run:
    """Runs ``sheily connect`` in this process; ``URL`` is the worker's address. Gives exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        given = [line(worker) if word == "URL" else word for word in words]
        with pytest.raises(SystemExit) as end:
            cli.run(connect, [*given, *(() if "--run" in given else ("--run", name))], prog="sheily connect")
        out, error = capsys.readouterr()
        return int(end.value.code or 0), out, error

    return run


def line(worker: Worker) -> str:
    """The line that the worker would print."""
    return f"{worker.address.url}/#token={TOKEN}"


def steps(home: Path, name: str) -> dict[int, runlog.Record]:
    return {record["seq"]: record for record in runlog.read(home / "var/central_logs" / f"omega_{name}.jsonl", "step")}


def test_training_tells_what_it_does_and_ends_with_the_summary_of_the_guide(run: Run, home: Path, name: str) -> None:
    """Worker, session, summary, log, report; the token is not among it."""
    code, out, error = run("URL", "--muestras", "20", "--lote", "4", "--reporte", "informe.html")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("Conectado a http://127.0.0.1:")
    assert lines[1] == "Sesión 1: 20 vectores (simple) en 5 lotes de 4, pasadas: 1"
    summary = lines.index("✅ Entrenamiento completado")
    assert re.fullmatch(r"   Loss: \d\.\d{6}   \(al principio: \d\.\d{6}\)", lines[summary + 1])
    assert re.fullmatch(r"   Anomalía: \d+\.\d\d%", lines[summary + 2])
    assert lines[-2] == f"   Registro: {home}/var/central_logs/omega_{name}.jsonl"
    assert lines[-1] == "   Informe: informe.html, informe.json, informe.md"
    assert (home / "informe.md").is_file()
    assert TOKEN not in out


def test_quiet_prints_nothing_and_json_only_json(run: Run) -> None:
    """--quiet is silent on success; --json gives one document a session."""
    few = ("URL", "--muestras", "8", "--lote", "4")
    assert run(*few, "--quiet") == (0, "", "")
    code, out, error = run(*few, "--json", "--metricas")
    assert (code, error) == (0, "")
    [document] = out.splitlines()
    found = json.loads(document)
    assert (found["session"], found["vectors"], found["report"]) == (2, 8, [])
    assert found["metrics"]["ultimos_20_losses"]
    assert Path(found["log"]).is_file()


def test_what_waits_can_be_discarded(run: Run) -> None:
    """It asks nothing, tells how many events there were, and trains nothing."""
    assert run("URL", "--muestras", "8", "--lote", "4", "--quiet")[0] == 0
    code, out, err = run("URL", "--descartar")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("Eventos quitados del diario de «")
    assert out.splitlines()[-1].endswith("»: 0")
    code, out, err = run("URL", "--descartar", "--json")
    assert (code, json.loads(out)["discarded"], err) == (0, 0, "")


def test_presets_and_files(run: Run, home: Path) -> None:
    """A flag beats the preset; a long series in a CSV is cut into windows, with labels by name."""
    code, out, error = run("URL", "--preset", "prueba_rapida", "--muestras", "12", "--no-diagnostico")
    assert (code, error) == (0, "")
    assert "12 vectores (simple) en 1 lote de 32" in out
    assert "Diagnóstico" not in out
    rows = [f"{value:.3f},{int(value > 0.99)}" for value in np.sin(np.arange(4800) / 50)]
    (home / "serie.csv").write_text("valor,mala\n" + "\n".join(rows) + "\n", encoding="utf-8")
    code, out, error = run("URL", "--datos", "serie.csv", "--paso", "800", "--etiquetas", "mala", "--lote", "2")
    assert (code, error) == (0, "")
    assert "5 vectores (serie.csv) en 3 lotes de 2" in out


def test_the_address_comes_from_the_environment_or_the_folder(
    run: Run, worker: Worker, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COLAB_SERVER_URL, then .env; --token goes with an address that has none."""
    few = ("--muestras", "4", "--quiet")
    assert run(*few)[0] == 2
    (home / ".env").write_text(f"COLAB_SERVER_URL={worker.address.url}\nCOLAB_TOKEN={TOKEN}\n", encoding="utf-8")
    assert run(*few) == (0, "", "")
    monkeypatch.setenv("COLAB_SERVER_URL", line(worker))
    (home / ".env").write_text("COLAB_SERVER_URL=https://no.invalid\n", encoding="utf-8")
    assert run(*few) == (0, "", "")
    assert run(worker.address.url, "--token", TOKEN, *few) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "COLAB_SERVER_URL"),
        (("https://tu-url.ngrok-free.app",), 2, "dirección del ejemplo"),
        (("URL", "--muestras", "0"), 2, "--muestras vale 0"),
        (("URL", "--muestras", "mil"), 2, "'mil' no es un número válido"),
        (("URL", "--tipo", "lineal"), 2, "'lineal' no es uno de"),
        (("URL", "--preset", "rapida"), 2, "'rapida' no es uno de"),
        (("URL", "--cada", "siempre"), 2, "1h, 30m o 45s"),
        (("URL", "--reporte", "informe.pdf"), 2, "informe.pdf"),
        (("URL", "--run", "worker"), 2, "--run"),
        (("URL", "--continuar"), 2, "ninguna sesión"),
        (("URL", "--datos", "no.csv"), 2, "no.csv"),
        (("URL", "--loet", "3"), 2, "No existe la opción '--loet'"),
        (("URL", "otra"), 2, "Sobra un argumento (otra)"),
    ],
)
def test_mistakes_get_one_clear_line(run: Run, words: tuple[str, ...], code: int, said: str) -> None:
    """In Spanish, with what was expected, and without a traceback."""
    found, _out, error = run(*words)
    assert found == code, error
    assert said in error
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("Error: ")


def test_help_loads_nothing_heavy() -> None:
    """Neither numpy nor the network libraries are needed to read what the flags mean."""
    code = (
        "import sys\nfrom sheily_train.cli import run\nfrom sheily_train.cli.connect import connect\n"
        "try:\n    run(connect, ['--help'])\n"
        "finally:\n    print(sorted({'numpy', 'httpx2', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--continuar" in done.stdout


def log_of(home: Path, name: str) -> str:
    log = home / "var" / "central_logs" / f"omega_{name}.jsonl"
    return log.read_text(encoding="utf-8") if log.exists() else ""


def given(worker: Worker, words: str, **more: str) -> tuple[list[str], dict[str, str]]:
    """The launcher's command and environment for a process of its own; ``URL`` is the worker's address."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more}
    return [str(LAUNCHER), *(line(worker) if word == "URL" else word for word in words.split())], environment


@posix
def test_a_killed_session_goes_on_to_the_same_end(worker: Worker, home: Path, name: str) -> None:
    """kill -9 at random moments, the same command each time; in the end, the steps of a run that nobody disturbed."""
    words = "URL --muestras 500 --lote 4 --tipo temporal --feedback --quiet --run "
    command, environment = given(worker, words + name)
    kills = 0
    for _time in range(12):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        time.sleep(random.uniform(0.6, 1.3))
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        if process.wait() == 0 or '"event": "done"' in log_of(home, name):  # the session ended before the kill
            break
    else:
        subprocess.run(command, env=environment, check=True)
    assert kills
    command, environment = given(worker, words + f"{name}calm")
    subprocess.run(command, env=environment, check=True)
    calm = steps(home, f"{name}calm")
    assert len(calm) == 125
    assert steps(home, name) == calm


@posix
def test_ctrl_c_ends_with_130_and_a_line_on_how_to_go_on(worker: Worker, name: str) -> None:
    """And what that line says works."""
    command, environment = given(worker, f"URL --muestras 1200 --lote 4 --run {name}")
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "Sesión 1" in line)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _out, error = process.communicate(timeout=20)
    assert process.returncode == 130
    [said] = error.splitlines()
    assert said.startswith("Error: Interrumpido")
    told = said.partition(" con: ")[2]
    assert told == f"--continuar --run {name}"
    command, environment = given(worker, f"URL {told}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"Sigue la sesión 1: \d+ de 300 lotes", done.stdout)
    assert "Vectores: 1200 en 300 lotes\n" in done.stdout


@posix
def test_on_a_terminal_a_bar_moves(worker: Worker, name: str) -> None:
    """With loss, anomaly share, rate, retries and queue; the summary stays below it."""
    command, environment = given(worker, f"URL --muestras 200 --lote 4 --run {name}", TERM="xterm", COLUMNS="140")
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:
                break
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"sesión 1 .*/50 pérdida \d.* · anomalía .* % · \d+ vectores/s · reintentos 0 · en cola \d", text)
    assert "✅ Entrenamiento completado" in text


@posix
@pytest.mark.parametrize("written", SEED_LINES)
def test_the_lines_of_the_guide_work_as_they_are_written(written: str, worker: Worker, home: Path) -> None:
    """With the worker's address in the place of theirs, by a shell in the checkout."""
    line_now = re.sub(r"https://tu-url[\w.-]*|<URL>", f"'{line(worker)}'", written) + f" --run g{os.urandom(4).hex()}"
    environment = given(worker, "", COLAB_URL=line(worker))[1]
    done = subprocess.run(["bash", "-c", line_now], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    count = re.search(r"--muestras (\d+)", written)
    assert f"Sesión 1: {count[1] if count else 500} vectores" in done.stdout
    assert ("Diagnóstico correcto" in done.stdout) == ("--diagnostico" in written)
    assert ("Métricas del trabajador" in done.stdout) == ("--metricas" in written)
    assert "✅ Entrenamiento completado" in done.stdout


@posix
def test_the_guides_placeholder_is_explained_by_the_launcher(tmp_path: Path) -> None:
    """A line copied as it stands; the launcher reached by a link from another folder."""
    (tmp_path / "conecta").symlink_to(LAUNCHER)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["./conecta", "https://tu-url.ngrok-free.app"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: «https://tu-url.ngrok-free.app» es la dirección del ejemplo.")


@posix
def test_the_launcher_without_packages_says_what_to_do(tmp_path: Path) -> None:
    """In a checkout without .venv, with a python3 that has nothing."""
    (tmp_path / "conectar_colab.sh").write_bytes(LAUNCHER.read_bytes())
    venv.create(tmp_path / "plain", symlinks=True)
    done = subprocess.run(
        ["bash", "conectar_colab.sh", "https://a.app"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}/plain/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: faltan los paquetes")
    assert f"make -C '{tmp_path}' install" in done.stderr
    assert os.access(LAUNCHER, os.X_OK)


def test_the_desks_tasks_are_commands_that_exist() -> None:
    """Each task's program is there, and its words are understood."""
    content = json.loads((ROOT / ".vscode" / "tasks.json").read_text(encoding="utf-8"))
    programs = {"./conectar_colab.sh": connect, "./verificar_setup_colab.sh": doctor}
    labels = set()
    for task in content["tasks"]:
        labels.add(task["label"])
        words = [word.replace("${input:url}", "") for word in task["args"]]
        if task["command"] in programs:
            assert (ROOT / task["command"]).is_file()
            command = programs[task["command"]]
            command.make_context(command.name, words)
        elif task["command"] == ".venv/bin/sheily":
            assert words.pop(0) == "worker"
            worker_command.make_context("worker", words)
        else:
            assert (task["command"], words) == ("make", ["test"])
    assert len(labels) == len(content["tasks"]) == 5
    assert {entry["id"] for entry in content["inputs"]} == {"url"}
