"""What a trainer logs: averages since the last log step, read from the device there and only there."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from pyfast_dpo.trainers.metrics import MetricAverages


class LoggingTrainer(Trainer):
    """A `Trainer` whose loss adds to `_averages`, which every log step and evaluation takes out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._averages = {"train": MetricAverages(), "eval": MetricAverages()}
        self._tokens_since_log: list[Tensor] = []
        self._log_time: float | None = None
        super().__init__(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log, which are read from the device here and only here."""
        prefixes = [key.removesuffix("loss") for key in logs if key.endswith("_loss")]
        if "loss" in logs:
            logs.update(self._pop_metrics("train"))
        elif prefixes and prefixes[0] != "train_":  # train_loss is the summary at the end
            metrics = self._pop_metrics("eval")
            logs.update({f"{prefixes[0]}{name}": value for name, value in metrics.items()})
        super().log(logs, start_time)

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        metrics = self._averages[mode].pop(lambda totals: self.accelerator.reduce(totals, "sum"))
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        tokens = torch.stack(self._tokens_since_log).sum() if self._tokens_since_log else None
        new = 0 if tokens is None else int(self.accelerator.reduce(tokens, "sum"))
        logged = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        metrics["num_tokens"] = new + (logged[-1] if logged else 0)
        if mode == "train":
            now = time.perf_counter()
            if self._log_time is not None:
                metrics["tokens_per_second"] = new / (now - self._log_time)
            self._log_time = now
            self._tokens_since_log.clear()
        return metrics
