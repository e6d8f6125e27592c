"""What a trainer logs: averages since the last log step, read from the device there and only there."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pyfast_dpo.trainers.checkpoints import CheckpointingTrainer
from pyfast_dpo.trainers.metrics import MetricAverages


class LoggingTrainer(CheckpointingTrainer):
    """A `Trainer` whose loss adds to `_averages`, which every log step and evaluation takes out.

    What a subclass or a callback appends to `_metrics["train"][name]`, or "eval", is logged as its mean, as in TRL.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._averages = {"train": MetricAverages(), "eval": MetricAverages()}
        self._metrics: dict[str, defaultdict[str, list[float]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }
        self._tokens_since_log: list[Tensor] = []
        self._log_time: float | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(LogTheRest())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log, which are read from the device here and only here."""
        prefixes = [key.removesuffix("loss") for key in logs if key.endswith("_loss")]
        if "loss" in logs:
            logs.update(self._pop_metrics("train"))
        elif prefixes and prefixes[0] != "train_":  # train_loss is the summary at the end
            metrics = self._pop_metrics("eval")
            logs.update({f"{prefixes[0]}{name}": value for name, value in metrics.items()})
        super().log(logs, start_time)

    def _clear_metrics(self, mode: str) -> None:
        """Forgets what an evaluation that was broken off has left."""
        self._averages[mode].clear()
        self._metrics[mode].clear()

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        metrics = self._averages[mode].pop(
            lambda totals: self.accelerator.reduce(totals, "sum"), self.accelerator.gather
        )
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        appended = self._metrics[mode]
        metrics.update({name: sum(values) / len(values) for name, values in appended.items()})
        appended.clear()
        metrics["num_tokens"] = self._new_tokens() + self._logged_tokens()
        if mode == "train":
            now = time.perf_counter()
            if self._log_time is not None:
                new = metrics["num_tokens"] - self._logged_tokens()
                metrics["tokens_per_second"] = new / (now - self._log_time)
            self._log_time = now
            self._tokens_since_log.clear()
        return metrics

    def _new_tokens(self) -> int:
        if not self._tokens_since_log:
            return 0
        return int(self.accelerator.reduce(torch.stack(self._tokens_since_log).sum(), "sum"))

    def _logged_tokens(self) -> int:
        logged = (e["num_tokens"] for e in reversed(self.state.log_history) if "num_tokens" in e)
        return int(next(logged, 0))

    def _state_of_run(self) -> dict[str, Any]:
        return {
            **super()._state_of_run(),
            "averages": self._averages["train"].state_dict(),
            "metrics": dict(self._metrics["train"]),
            "tokens_since_log": list(self._tokens_since_log),
        }

    def _restore_run(self, state: dict[str, Any]) -> None:
        super()._restore_run(state)
        self._averages["train"].load_state_dict(state["averages"])
        self._metrics["train"].update(state["metrics"])
        self._tokens_since_log = list(state["tokens_since_log"])


class LogTheRest(TrainerCallback):
    """The steps after the last regular log are logged when training stops."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop and args.logging_strategy != "no":
            control.should_log = True

    on_epoch_end = on_step_end  # a callback may have stopped it after the step was logged
