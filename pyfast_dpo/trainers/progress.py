"""One line a log step, in a table, with a progress bar below it."""

from __future__ import annotations

import statistics
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

COLUMNS = (
    ("loss", "loss"),
    ("margin", "rewards/margins"),
    ("accuracy", "rewards/accuracies"),
    ("kl", "kl"),
    ("logp chosen", "logps/chosen"),
    ("logp rejected", "logps/rejected"),
)


ONLINE_COLUMNS = (
    ("loss", "loss"),
    ("reward", "reward"),
    ("its deviation", "reward_std"),
    ("length", "completions/mean_length"),
    ("cut off", "completions/clipped_ratio"),
    ("entropy", "entropy"),
    ("kl", "kl"),
)


class ProgressTable(TrainerCallback):
    """Prints the main metrics of every log step and keeps the duration of the steps.

    A dash stands for a metric that a step does not have, such as the margin of a KTO batch with only
    desirable rows. All metrics are in the log history.
    """

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self._columns: list[tuple[str, str]] = []
        self._started = 0.0
        self._bar: tqdm | None = None

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps; 0 before the first."""
        return statistics.median(self.step_seconds) if self.step_seconds else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()
        # disable=None: no bar where the output is not a terminal
        disable = None if state.is_world_process_zero else True
        self._bar = tqdm(total=state.max_steps, unit="step", disable=disable, leave=False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = time.perf_counter()
        self.step_seconds.append(
            now - self._started
        )  # what a step reads or writes before it included
        self._started = now
        if self._bar is not None:
            self._bar.update()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()

    on_save = on_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            if not self._columns:
                self._columns = _columns_of(logs)
                header = "".join(f"{title:>15}" for title, _ in self._columns)
                tqdm.write(f"{'step':>6}{header}{'s/step':>9}")
            cells = "".join(
                f"{logs[name]:>15.4f}" if name in logs else f"{'-':>15}"
                for _, name in self._columns
            )
            tqdm.write(f"{state.global_step:>6}{cells}{self.seconds_per_step:>9.2f}")
        elif "eval_loss" in logs:
            tqdm.write(
                f"  eval after step {state.global_step}: "
                + ", ".join(
                    f"{title} {logs[f'eval_{name}']:.4f}"
                    for title, name in (ONLINE_COLUMNS if "eval_reward" in logs else COLUMNS)
                    if f"eval_{name}" in logs
                )
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _columns_of(logs: dict[str, Any]) -> list[tuple[str, str]]:
    """Of a run, by its first log entry."""
    if "reward" in logs:
        return [column for column in ONLINE_COLUMNS if column[1] != "kl" or "kl" in logs]
    absent = "kl" if "rewards/accuracies" in logs else "rewards/accuracies"
    return [column for column in COLUMNS if column[1] != absent]
