"""``python -m sheily_train``: the ``sheily`` command without its script."""

from sheily_train.cli import main

main()
