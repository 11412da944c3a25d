"""What a run's batches and feedback add up to, counted from their records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sheily_train.colab.amounts import vectors_text
from sheily_train.i18n import _, ngettext
from sheily_train.runlog import Record


@dataclass
class Tally:
    """The numbers of the events that were told; one that is told twice counts once.

    Where the run went back, or an event is told otherwise, what had been told from there on counts no more.
    """

    batches: int = 0
    vectors: int = 0
    loss_first: float | None = None
    loss: float | None = None
    anomalies: int = 0
    feedback: int = 0
    validated: int = 0
    retries: int = 0
    _loss_sum: float = 0.0
    _losses: int = 0
    _probability: float = 0.0
    _told: dict[int, Record] = field(default_factory=dict)

    @property
    def anomaly_prob(self) -> float | None:
        """The mean probability of an anomaly, over all vectors."""
        return self._probability / self.vectors if self.vectors else None

    def add(self, record: Record) -> None:
        """Count a record."""
        event = record["event"]
        if event == "retry":
            self.retries += 1
        elif event == "rebase":
            self._go_back(record["seq"])
        elif event in {"step", "feedback"}:
            told = self._told.get(record["seq"])
            if told == record:
                return
            if told is not None:
                self._go_back(record["seq"] - 1)
            self._told[record["seq"]] = record
            self._add_step(record) if event == "step" else self._add_feedback(record)

    def _go_back(self, seq: int) -> None:
        kept = Tally(retries=self.retries)
        for number, record in self._told.items():
            if number <= seq:
                kept.add(record)
        vars(self).update(vars(kept))

    def _add_step(self, record: Record) -> None:
        samples = record.get("samples") or 0
        self.batches += 1
        self.vectors += samples
        self._probability += samples * (record.get("anomaly_prob") or 0.0)
        self.anomalies += record.get("anomalies") or 0
        if (loss := record.get("loss")) is not None:
            self.loss = loss
            self.loss_first = loss if self.loss_first is None else self.loss_first
            self._loss_sum += loss
            self._losses += 1

    def _add_feedback(self, record: Record) -> None:
        self.feedback += 1
        self.validated += bool(record["validated"])

    def numbers(self) -> dict[str, Any]:
        """The counted numbers by name."""
        counted = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return counted | {"anomaly_prob": self.anomaly_prob}

    def text(self) -> str:
        """The summary that a person reads."""
        if not self.batches:
            return _("Aún no se ha entrenado ningún lote.")
        lines = [
            _("✅ Entrenamiento completado"),
            ngettext(
                "   Anomalía: {share:.2%} de media; {count} vector marcado",
                "   Anomalía: {share:.2%} de media; {count} vectores marcados",
                self.anomalies,
            ).format(share=self.anomaly_prob, count=self.anomalies),
            _("   Lotes: {batches} ({vectors})").format(batches=self.batches, vectors=vectors_text(self.vectors)),
        ]
        if self._losses:
            told = _("   Loss: {last:.6f} (primera {first:.6f}, media {mean:.6f})")
            mean = self._loss_sum / self._losses
            lines.insert(1, told.format(last=self.loss, first=self.loss_first, mean=mean))
        if self.feedback:
            lines.append(
                _("   Feedback: {validated} de {count} con éxito ({share:.0%})").format(
                    validated=self.validated, count=self.feedback, share=self.validated / self.feedback
                )
            )
        if self.retries:
            lines.append(_("   Reintentos: {count}").format(count=self.retries))
        return "\n".join(lines)
