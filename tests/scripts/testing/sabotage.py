"""Defects that a worker process can be given; the campaign has to find each of them."""

from __future__ import annotations

from typing import Any

from sheily_train.colab.protocol import Claim, Ledger
from sheily_train.core.omega.learner import Learner


def no_duplicate_check() -> None:
    """What was applied is applied again when it is sent again."""
    judge = Ledger.judge

    def judge_without_memory(ledger: Ledger, claim: Claim) -> bytes | None:
        return judge(ledger, claim) if claim.seq > ledger.last_seq else None

    Ledger.judge = judge_without_memory  # type: ignore[method-assign]


def a_moment_is_not_loaded() -> None:
    """A state that is loaded lacks a little of the optimizer's memory."""
    load = Learner.load

    def load_most(learner: Learner, state: dict[str, Any]) -> None:
        own = learner.state()
        load(learner, {name: own[name] if name.endswith("decoder.bias.exp_avg") else state[name] for name in state})

    Learner.load = load_most  # type: ignore[method-assign]
