#!/usr/bin/env bash
# Check that all is ready to train on Colab; the same as `sheily doctor`, as: ./verificar_setup_colab.sh [URL]
root="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)"
fail() {
  printf 'Error: %s\n' "$1" >&2
  exit 1
}

python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3 || command -v python)" ||
  fail "no hay Python. Instala Python 3.11 o posterior (python.org, apt install python3, brew install python) y luego: make install"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version 2>&1) ($python) no sirve: hace falta Python 3.11 o posterior. Con otro: make install PYTHON=python3.12"
"$python" -c 'import click' 2>/dev/null ||
  fail "faltan los paquetes de Sheily Train en $python. Instálalos con: make -C '$root' install"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -P -c '
from sheily_train.cli import run
from sheily_train.cli.doctor import doctor

run(doctor, prog="verificar_setup_colab.sh")' "$@"
