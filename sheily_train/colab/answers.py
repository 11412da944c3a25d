"""What a worker's answers must hold, what the run log keeps of them, and what they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sheily_train.colab.protocol import Kind
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
        found=", ".join(f"«{str(name)[:40]}»" for name in list(content)[:12]) or _("nada"),
    )


def event_record(seq: int, kind: Kind, answer: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The run log's record of an event: its name and its fields, which follow from the answer alone."""
    if kind is Kind.FEEDBACK:
        return "feedback", {"seq": seq, "validated": answer["validacion"]}
    return "step", {
        "seq": seq,
        "samples": answer["batch_size"],
        "loss": answer["loss"],
        "anomaly_prob": answer["anomaly_prob"],
        "anomalies": answer.get("anomalias"),
    }


@dataclass
class Totals:
    """What a client's events add up to."""

    batches: int = 0
    vectors: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    loss_sum: float = 0.0
    probability_sum: float = 0.0
    anomalies: int = 0
    feedback: int = 0
    validated: int = 0
    retries: int = 0

    def add(self, event: str, fields: Mapping[str, Any]) -> None:
        """Count a record."""
        if event == "retry":
            self.retries += 1
        elif event == "feedback":
            self.feedback += 1
            self.validated += bool(fields["validated"])
        elif event == "step":
            self.batches += 1
            self.vectors += fields["samples"]
            self.last_loss = fields["loss"]
            self.first_loss = self.last_loss if self.batches == 1 else self.first_loss
            self.loss_sum += fields["loss"]
            self.probability_sum += fields["anomaly_prob"] * fields["samples"]
            self.anomalies += fields["anomalies"] or 0

    def text(self) -> str:
        """The summary that a person reads."""
        if not self.batches:
            return _("Aún no se ha entrenado ningún lote.")
        lines = [
            _("✅ Entrenamiento completado"),
            _("   Loss: {last:.6f} (primera {first:.6f}, media {mean:.6f})").format(
                last=self.last_loss, first=self.first_loss, mean=self.loss_sum / self.batches
            ),
            _("   Anomalía: {share:.2%} de media; {count} vectores marcados").format(
                share=self.probability_sum / self.vectors, count=self.anomalies
            ),
            _("   Lotes: {batches} ({vectors} vectores)").format(batches=self.batches, vectors=self.vectors),
        ]
        if self.feedback:
            lines.append(
                _("   Feedback: {validated} de {count} con éxito ({share:.0%})").format(
                    validated=self.validated, count=self.feedback, share=self.validated / self.feedback
                )
            )
        if self.retries:
            lines.append(_("   Reintentos: {count}").format(count=self.retries))
        return "\n".join(lines)
