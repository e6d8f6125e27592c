"""The curves of a training run as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfast_dpo.ops.extras import require

History = Sequence[dict[str, Any]]
CHOSEN, REJECTED, NEUTRAL = "#2a7f62", "#c8553d", "#33506e"


def plot_curves(history: Sequence[dict[str, Any]], path: str | Path, *, title: str) -> Path:
    """Draws loss, rewards, accuracy (for KTO the KL estimate) and log-probs over the steps; of on-policy runs reward,
    length, entropy, and KL or loss.

    Args:
        history: `trainer.state.log_history`; evaluations are drawn as points.
        path: of the PNG.
        title: above the panels.

    Raises:
        ValueError: no training step in the history.
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", "plotting curves")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [entry for entry in history if "loss" in entry]
    evals = [entry for entry in history if "eval_loss" in entry]
    if not train:
        raise ValueError("plot_curves: history must hold at least one training step, got none")

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    panels = figure.subplots(2, 2).flat
    (_draw_online if "reward" in train[0] else _draw_preferences)(panels, train, evals)
    figure.savefig(path, dpi=120)
    return Path(path)


def _draw_online(panels: Any, train: History, evals: History) -> None:
    reward, length, entropy, last = panels
    _panel(reward, "reward of a response", train, evals, [("reward", "reward", CHOSEN)])
    low, high = (
        [(e["step"], e["reward"] + sign * e["reward_std"]) for e in train if "reward" in e]
        for sign in (-1, 1)
    )
    steps = [step for step, _ in low]
    reward.fill_between(steps, [v for _, v in low], [v for _, v in high], color=CHOSEN, alpha=0.12)
    _panel(
        length,
        "tokens of a response",
        train,
        evals,
        [("mean", "completions/mean_length", NEUTRAL)],
    )
    _panel(entropy, "entropy of a token, in nats", train, evals, [("entropy", "entropy", NEUTRAL)])
    if any("kl" in entry for entry in train):
        _panel(last, "KL to the reference, in nats", train, evals, [("kl", "kl", REJECTED)])
    else:
        _panel(last, "loss", train, evals, [("loss", "loss", NEUTRAL)])


def _draw_preferences(panels: Any, train: History, evals: History) -> None:
    loss, rewards, agreement, logps = panels
    _panel(loss, "loss", train, evals, [("loss", "loss", NEUTRAL)])
    if abs(train[0]["loss"] - math.log(2)) < 1e-6:
        loss.axhline(math.log(2), color="0.6", linestyle=":", linewidth=1)
        loss.annotate(
            "ln 2: policy = reference",
            (1, math.log(2)),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            fontsize=8,
            color="0.4",
            ha="right",
        )
    _panel(
        rewards,
        "rewards: beta · (log-prob − reference)",
        train,
        evals,
        [
            ("margin", "rewards/margins", NEUTRAL),
            ("chosen", "rewards/chosen", CHOSEN),
            ("rejected", "rewards/rejected", REJECTED),
        ],
    )
    rewards.axhline(0, color="0.6", linestyle=":", linewidth=1)
    if "rewards/accuracies" in train[0]:
        series = [("reward accuracy", "rewards/accuracies", NEUTRAL)]
        _panel(agreement, "share of pairs with chosen above rejected", train, evals, series)
        agreement.set_ylim(-0.03, 1.03)
    else:
        _panel(agreement, "KL estimate, in nats", train, evals, [("kl", "kl", NEUTRAL)])
    _panel(
        logps,
        "log-prob of a response, in nats",
        train,
        evals,
        [("chosen", "logps/chosen", CHOSEN), ("rejected", "logps/rejected", REJECTED)],
    )


def _panel(
    axes: Any,
    title: str,
    train: Sequence[dict[str, Any]],
    evals: Sequence[dict[str, Any]],
    series: Sequence[tuple[str, str, str]],
) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    for label, name, color in series:
        steps = [entry["step"] for entry in train if name in entry]
        values = [entry[name] for entry in train if name in entry]
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
        axes.plot(steps, _smooth(values), color=color, linewidth=2, label=label)
        points = [
            (entry["step"], entry[f"eval_{name}"]) for entry in evals if f"eval_{name}" in entry
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), "o", color=color, markersize=5, label=f"{label}, eval"
            )
    if len(axes.get_lines()) > 2:  # more than the two lines of one series
        axes.legend(fontsize=8, frameon=False)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window of a tenth of the run around each step: batches differ, and hide the trend."""
    reach = len(values) // 20
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
