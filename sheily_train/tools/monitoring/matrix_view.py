"""A matrix of specialists and branches as a picture, and as a table for a spreadsheet."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from sheily_train import durable
from sheily_train.i18n import _

if TYPE_CHECKING:
    from sheily_train.core.training.matrix import Matrix


def write_table(file: Path, matrix: Matrix) -> None:
    """CSV: a row per branch, a column for its base and one per specialist; losses in nats per answer token."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow([_("rama"), _("base"), *matrix.names])
    for branch in matrix.names:
        losses = [matrix.base[branch], *(matrix.loss[name][branch] for name in matrix.names)]
        rows.writerow([branch, *(f"{loss:.4f}" for loss in losses)])
    durable.write_bytes(file, text.getvalue().encode())


def write_picture(file: Path, matrix: Matrix) -> None:
    """PNG: rows are held-out sets, columns specialists, colours the loss beside the base's; a dot marks the best."""
    from matplotlib.figure import Figure

    names = matrix.names
    change = [[100 * matrix.change(branch, name) for name in names] for branch in names]  # per cent
    side = 3.2 + 0.21 * len(names)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained", dpi=110)
    axes = figure.subplots()
    image = axes.imshow(change, cmap="viridis")
    axes.scatter([names.index(matrix.best(branch)) for branch in names], range(len(names)), s=14, c="white", ec="black")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(_("especialista"))
    axes.set_ylabel(_("ejemplos reservados de"))
    axes.set_title(
        _("El especialista de la rama es el mejor en {best} de {count} (punto: el mejor)").format(
            best=matrix.own_best, count=len(names)
        ),
        fontsize=9,
    )
    figure.colorbar(image, label=_("pérdida frente a la base, en %"), shrink=0.7)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    durable.write_bytes(file, drawn.getvalue())
