"""What a worker's answers must hold, and what the run log keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sheily_train.colab.protocol import Kind
from sheily_train.colab.screen import printable
from sheily_train.i18n import _

PATHS = {Kind.TRAIN: "/train_layer2", Kind.FEEDBACK: "/feedback_dendritas"}
EXPECTED = {
    PATHS[Kind.TRAIN]: ("loss", "anomaly_prob", "dendrites", "coherence", "batch_size", "timestamp"),
    PATHS[Kind.FEEDBACK]: ("validacion", "timestamp"),
    "/run": ("owner", "last_seq", "chain", "fingerprint", "queue"),
    "/status": ("modelo", "estadisticas"),
    "/info": ("arquitectura", "flujo"),
    "/metricas": ("ultimos_20_losses", "tendencia"),
    "/diagnostico": ("status", "outputs_shapes"),
    "/predict": ("anomaly_prob", "threshold"),
    "/state": ("last_seq", "chain"),
}
"""The fields of each endpoint's answer that the client and its callers rely on."""


def misfit(path: str, content: Mapping[str, Any]) -> str | None:
    """What an answer lacks, for a person; it then comes from some other worker or program."""
    missing = [name for name in EXPECTED.get(path, ()) if name not in content]
    if not missing:
        return None
    return _("A {path} contestó otro trabajador o programa: falta «{missing}»; trae {found}.").format(
        path=path,
        missing="», «".join(missing),
        found=", ".join(f"«{printable(str(name)[:40])}»" for name in list(content)[:12]) or _("nada"),
    )


def event_record(seq: int, kind: Kind, answer: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The run log's record of an event: its name and its fields, which follow from the answer alone."""
    if kind is Kind.FEEDBACK:
        return "feedback", {"seq": seq, "validated": answer["validacion"]}
    return "step", {
        "seq": seq,
        "samples": number_in(answer, "batch_size"),
        "loss": number_in(answer, "loss"),
        "anomaly_prob": number_in(answer, "anomaly_prob"),
        "anomalies": number_in(answer, "anomalias"),
    }


def number_in(answer: Mapping[str, Any], name: str) -> Any:
    """The number that an answer gives under a name; ``None`` for anything else, as a plain v4.0 worker may give."""
    value = answer.get(name)
    return value if isinstance(value, int | float) else None
