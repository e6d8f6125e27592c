"""What happens between steps: the reference follows, and signs of a bad run are told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from pyfast_dpo.evaluation.displacement import chosen_falling
from pyfast_dpo.model.allocator import use_arena


class SyncReferenceModel(TrainerCallback):
    """TR-DPO (Gorbatovski et al. 2024, eq. 4): every `steps` steps reference = a policy + (1 - a) reference."""

    def __init__(self, policy: nn.Module, reference: nn.Module, mixup: float, steps: int) -> None:
        self._pair = policy, reference
        self._mixup, self._steps = mixup, steps

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._steps == 0:
            for new, old in zip(*(module.parameters() for module in self._pair), strict=True):
                old.lerp_(new.to(old.dtype), self._mixup)


class LikelihoodDisplacement(TrainerCallback):
    """Warns once when the margin grows while the chosen responses become less likely."""

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._told = False

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._told or not state.is_world_process_zero or len(state.log_history) < 4:
            return
        warning = chosen_falling(state.log_history, self._beta)
        if warning is not None:
            self._told = True
            warnings.warn(f"step {state.global_step}: {warning}", stacklevel=2)


class KeepFreedMemory(TrainerCallback):
    """Training on the CPU keeps the memory of one step for the next."""

    def __init__(self) -> None:
        self._end: Callable[[], None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._end is None and args.device.type == "cpu":
            self._end = use_arena()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._end is not None:
            self._end()
            self._end = None
