"""The launchers, started as the pages write it, by real processes in a project root of their own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from sheily_train import paths
from tests.forks import Forks

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the command lines are a POSIX shell's")

LIST = "python3 sheily_train/train_branch.py --list-branches"
TRAINED = {
    "physics": "python3 sheily_train/train_branch.py --branch physics",
    "physics, LoRA": "python3 sheily_train/train_branch.py --branch physics --lora",
    "sports": "python3 sheily_train/train_branch.py --branch sports --lora --epochs 5",
    "medicine": "python3 sheily_train/train_branch.py --branch medicine --epochs 10 --lora",
    "finance": "python3 sheily_train/train_branch.py --branch finance --lora",
    "art": "python3 sheily_train/train_branch.py --branch art --epochs 5",
}
GATED = {
    "programming": r"""python3 sheily_train/train_branch.py \
    --branch programming \
    --model meta-llama/Llama-2-7b-hf \
    --epochs 10 \
    --batch-size 8 \
    --lora \
    --output models/programming_custom""",
    "medicine": r"""python3 sheily_train/train_branch.py \
    --branch medicine \
    --model meta-llama/Llama-2-7b-hf \
    --epochs 10 \
    --batch-size 8 \
    --lora""",
}


def make_root(root: Path, *branches: str) -> Path:
    """A project root with the launchers, and six of our rows to learn and two held out for each branch."""
    root.mkdir()
    (root / "sheily_train").symlink_to(ROOT / "sheily_train")
    for branch in branches:
        for part, name, count in ((paths.TRAINING_DATA, "train", 6), (paths.EVALUATION_DATA, "test", 2)):
            lines = (ROOT / "all-Branches" / branch / part / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            (root / "all-Branches" / branch / part).mkdir(parents=True)
            kept = "\n".join(sorted(lines, key=len)[:count]) + "\n"  # the tiny model has room for short rows
            (root / "all-Branches" / branch / part / f"{name}.jsonl").write_text(kept, encoding="utf-8")
    return root


def shell(line: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Give a line to a shell in a folder, as a person would whose ``python3`` has the packages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHEILY_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {"OMP_NUM_THREADS": "1", **more}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", TRAINED)
def test_a_written_line_trains_its_branch(
    name: str, tmp_path: Path, tiny_llama: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line works as it is written: the branch's model stands where the pages say, with what the line asked."""
    python, script, *arguments = shlex.split(TRAINED[name])
    assert python == "python3"
    branch, _, _ = name.partition(",")
    root = make_root(tmp_path / "root", branch)
    for ours in [variable for variable in os.environ if variable.startswith("SHEILY_")]:
        monkeypatch.delenv(ours)
    short = {"SHEILY_MODEL": str(tiny_llama), "SHEILY_MAX_STEPS": "1"}
    done = forks.start(*arguments, script=script, folder=root, **short)
    out = done.finish()
    assert done.error.read_text() == ""
    folder = root / "var" / "central_models" / branch
    request = json.loads((folder / paths.TRAINING_CONFIG).read_text(encoding="utf-8"))["request"]
    assert request["branch"] == branch
    assert request["lora"] == ("--lora" in arguments) == (folder / paths.ADAPTER_WEIGHTS).is_file()
    assert request["lora"] != (folder / paths.MODEL_WEIGHTS).is_file()
    assert request["epochs"] == float(TRAINED[name].partition("--epochs ")[2].partition(" ")[0] or 3)
    assert list((root / "var" / "central_logs").glob(f"training_{branch}_*.log"))
    assert out.splitlines()[-1] == f'Pregunta: sheily ask {branch} "…"'


@pytest.mark.parametrize("name", GATED)
def test_a_gated_model_without_network_is_one_clear_line(name: str, tmp_path: Path) -> None:
    """Llama 2, without network or token: exit code 4, one line that names both, and nothing is left behind."""
    root = make_root(tmp_path / "root", name)
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    done = shell(GATED[name], root, **nowhere)
    assert done.returncode == 4
    [line] = done.stderr.splitlines()
    assert line.startswith(
        "Error: No se pudo descargar el modelo «meta-llama/Llama-2-7b-hf»: no hay conexión con el Hub."
    )
    assert "HF_TOKEN" in line
    assert "--model smollm2-135m" in line
    assert done.stdout == ""
    assert not list(root.rglob("*.safetensors"))


def test_the_pages_show_these_lines() -> None:
    """sheily_train/README.md has each of the lines, as it is written here."""
    page = (ROOT / "sheily_train" / "README.md").read_text(encoding="utf-8")
    for line in (LIST, *TRAINED.values(), *GATED.values()):
        assert f"\n{line}\n" in page


def test_train_all_goes_on_after_a_bad_branch(tmp_path: Path, tiny_llama: Path) -> None:
    """train_all.sh trains all that can be trained, ends with a table and code 1; mended, with 0, from anywhere."""
    root = make_root(tmp_path / "root", "art", "finance", "physics")
    rows = root / "all-Branches" / "finance" / paths.TRAINING_DATA / "train.jsonl"
    good = rows.read_text(encoding="utf-8")
    rows.write_text(good + '{"instruction": "¿Y esto?"}\n', encoding="utf-8")
    short = {"SHEILY_MODEL": str(tiny_llama), "SHEILY_MAX_STEPS": "1"}

    done = shell("sheily_train/train_all.sh --lora", root, **short)
    assert done.returncode == 1, done.stderr
    assert "train.jsonl:7" in done.stderr
    assert [state(done, name) for name in ("art", "finance", "physics")] == ["entrenada", "falló", "entrenada"]
    assert done.stdout.splitlines()[-1] == "2 de 3 ramas listas."
    models = root / "var" / "central_models"
    assert {folder.name for folder in models.glob("[!.]*")} == {"art", "physics"}

    rows.write_text(good, encoding="utf-8")
    done = shell(f"{root}/sheily_train/train_all.sh --lora", tmp_path, SHEILY_HOME=str(root), **short)
    assert (done.returncode, done.stderr) == (0, "")
    assert [state(done, name) for name in ("art", "finance", "physics")] == ["al día", "entrenada", "al día"]
    assert done.stdout.splitlines()[-1] == "3 de 3 ramas listas."
    assert (models / "finance" / paths.ADAPTER_WEIGHTS).is_file()


def state(done: subprocess.CompletedProcess[str], branch: str) -> str:
    """What the table that ends a run says of a branch."""
    rows = done.stdout.rpartition(" Rama ")[2].splitlines()
    [row] = [row for row in rows if row.split()[:1] == [branch]]
    return "al día" if " al día " in row else row.split()[1]


def copied_launcher(root: Path, packages_of: Path | None = None) -> Path:
    """A root with a copy of the launcher, and with a ``.venv`` that has the packages of another environment."""
    if packages_of is None:
        (root / "sheily_train").mkdir(parents=True)
        shutil.copy(ROOT / "sheily_train" / "train_branch.py", root / "sheily_train")
        return root
    shutil.copytree(ROOT / "sheily_train", root / "sheily_train", ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(root / ".venv", symlinks=True)
    [site] = (root / ".venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages_of}\n", encoding="utf-8")
    return root


def plainly(line: str, folder: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Give a line as a person would whose ``python3`` has no packages at all; one that never ends is an error."""
    venv.create(tmp_path / "plain", symlinks=True)
    environment = {name: os.environ[name] for name in ("HOME", "LANG", "LC_ALL") if name in os.environ}
    environment["PATH"] = f"{tmp_path / 'plain' / 'bin'}:/usr/bin:/bin"
    return subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_a_plain_python_goes_on_with_the_checkouts_own(tmp_path: Path) -> None:
    """A ``python3`` without the packages hands over to .venv, arguments and all, from whatever folder it is started."""
    root = copied_launcher(tmp_path / "checkout", Path(sysconfig.get_path("purelib")))
    shutil.copytree(ROOT / "all-Branches" / "art", root / "all-Branches" / "art")
    for line, folder in ((LIST, root), (f"python3 {root}/sheily_train/train_branch.py --list-branches", tmp_path)):
        done = plainly(line, folder, tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert [row.split()[0] for row in done.stdout.splitlines()] == ["RAMA", "art"]


@pytest.mark.parametrize("environment", ["none", "empty"])
def test_without_packages_the_launcher_says_what_to_do(tmp_path: Path, environment: str) -> None:
    """Without .venv, or with one that lacks the packages, there is one line that names ``make install``."""
    root = copied_launcher(tmp_path / "checkout")
    if environment == "empty":
        venv.create(root / ".venv", symlinks=True)
    done = plainly(LIST, root, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["Error: faltan los paquetes de Sheily Train. Instálalos con: make install"]


def test_list_branches_as_written(tmp_path: Path) -> None:
    """``--list-branches`` shows the branches of the folder it is given in, and loads nothing heavy on the way."""
    root = make_root(tmp_path / "root", "physics", "sports")
    done = shell(LIST.replace("python3", "python3 -X importtime"), root)
    assert [row.split()[:4] for row in done.stdout.splitlines()[1:]] == [
        [name, "2", "6", "2"] for name in ("physics", "sports")
    ]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "peft"}


@pytest.mark.parametrize(
    "start",
    ["from sheily_train.cli import main; main()", "runpy.run_path('sheily_train/train_branch.py', {}, '__main__')"],
)
def test_a_command_looks_for_garbage_seldom(start: str) -> None:
    """What torch and transformers load is not gone through while they load, nor when the process ends."""
    look = "atexit.register(lambda: print(gc.get_threshold()[0] > 10_000, gc.get_freeze_count() > 10_000))"
    code = f"import atexit, gc, runpy, sys\n{look}\nsys.argv[1:] = ['--help']\n{start}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True True"
