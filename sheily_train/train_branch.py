"""Train one branch or all of them: ``python3 sheily_train/train_branch.py --branch physics --lora``.

The same as ``sheily train``. It may be started by any Python: without the product's packages it goes on with the
checkout's own ``.venv``, where ``make install`` put them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

CHECKOUT = Path(__file__).resolve().parent.parent
OWN_PYTHON = CHECKOUT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def main() -> NoReturn:
    """Run ``sheily train`` with this process's arguments."""
    sys.path[0] = str(CHECKOUT)
    if any(importlib.util.find_spec(name) is None for name in ("click", "torch", "transformers", "peft")):
        if OWN_PYTHON.is_file() and Path(sys.executable) != OWN_PYTHON:
            os.execv(OWN_PYTHON, [str(OWN_PYTHON), __file__, *sys.argv[1:]])  # noqa: S606
        sys.exit("Error: faltan los paquetes de Sheily Train. Instálalos con: make install")
    from sheily_train.cli import main as run_command
    from sheily_train.cli.train import train

    run_command(train, prog="train_branch.py")


if __name__ == "__main__":
    main()
