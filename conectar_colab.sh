#!/usr/bin/env bash
# Train at a worker, as: ./conectar_colab.sh https://….trycloudflare.com/#token=… --muestras 1000
# The same as `sheily connect`, with the checkout's own .venv, from any folder; ./conectar_colab.sh --help lists all.
checkout="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)"
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"
have_packages='import sys; from importlib.util import find_spec as f; sys.exit(not (f("click") and f("httpx2")))'
for python in "$checkout/.venv/bin/python" "$checkout/.venv/Scripts/python.exe" python3; do
  "$python" -Pc "$have_packages" 2>/dev/null && exec "$python" -Pm sheily_train connect "$@"
done
echo "Error: faltan los paquetes de Sheily Train. Instálalos con: make -C '$checkout' install" >&2
exit 1
