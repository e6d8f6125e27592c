"""Signs that a run does something else than it seems to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FALL_IN_NATS = 1.0  # of the mean chosen response below the reference: less is noise of the batch


def chosen_falling(history: Sequence[dict[str, Any]], beta: float) -> str | None:
    """A warning if chosen responses became less likely while the margin grew, else None.

    Preference losses see only the margin: it also grows when both log-probs fall and the rejected one
    falls faster, and then the model moves its probability to answers that nobody has rated.

    Args:
        history: `trainer.state.log_history`; the last quarter of its training entries counts.
        beta: of the loss; rewards are beta times the log-ratio to the reference.
    """
    logged = [entry for entry in history if "loss" in entry and "rewards/margins" in entry]
    last = logged[-max(1, len(logged) // 4) :]
    if not last:
        return None
    margin = sum(entry["rewards/margins"] for entry in last) / len(last)
    change = sum(entry["rewards/chosen"] for entry in last) / len(last) / beta
    if margin <= 0 or change > -FALL_IN_NATS:
        return None
    return (
        f"the margin grew to {margin:.2f}, but the chosen responses became less likely: their log-prob is "
        f"{-change:.1f} nats below the reference. A lower learning rate or a larger beta holds them."
    )
