"""How rewards are asked for: functions, coroutines and classifiers with TRL's signature, their answers checked."""

from __future__ import annotations

import asyncio
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyfast_dpo.ops.checks import describe
from pyfast_dpo.rewards.classifiers import RewardClassifier

RewardFunction = Callable[..., Any]


class RewardFunctions:
    """One or several rewards of a response.

    Args:
        functions: one or a list of
            - a function `f(prompts, completions, completion_ids, **columns)` that returns a number, or None where it
              does not apply, for each of N responses; prompts and completions are strings, or lists of messages.
              Everything is given by keyword: also the columns of the data, and what the caller adds (`trainer_state`,
              `log_extra`, `log_metric`), so it must take `**kwargs`;
            - a coroutine function of the same kind; several are awaited together;
            - a sequence classifier with one label (`AutoModelForSequenceClassification`), or its name: its logit.
        weights: one number a function, 1 by default.
        processing_classes: tokenizers of classifiers, one entry a function, None for others and for their own.
        name: of who asks, for errors.

    Attributes:
        names: of the functions, for metrics.

    Raises:
        TypeError, ValueError: no function; something that is none; weights of another number.
    """

    def __init__(
        self,
        functions: Any,
        weights: Sequence[float] | None = None,
        processing_classes: Any = None,
        name: str = "GRPOTrainer",
    ) -> None:
        given = list(functions) if isinstance(functions, list | tuple) else [functions]
        if functions is None or not given:
            raise ValueError(
                f"{name}: reward_funcs must be a function or a list of them, got {functions!r}"
            )
        classes = (
            processing_classes
            if isinstance(processing_classes, list)
            else [processing_classes] * len(given)
        )
        if len(classes) != len(given):
            raise ValueError(
                f"{name}: reward_processing_classes must have one entry for each of {len(given)} reward functions, got "
                f"{len(classes)}"
            )
        self._name = name
        self._functions: list[RewardFunction] = []
        for function, processing_class in zip(given, classes, strict=True):
            if isinstance(function, str | nn.Module):
                function = RewardClassifier(function, processing_class, name)
            elif not callable(function):
                raise TypeError(
                    f"{name}: a reward function must be callable, a classifier or its name, got {describe(function)}"
                )
            self._functions.append(function)
        self.names = [_name_of(function) for function in self._functions]
        if weights is not None and len(weights) != len(given):
            raise ValueError(
                f"{name}: reward_weights must have one number for each of {len(given)} reward functions, got {weights}"
            )
        self.weights = torch.tensor([1.0] * len(given) if weights is None else list(weights))
        self._told = False

    def to(self, device: Any) -> RewardFunctions:
        """Moves classifiers to a device."""
        for function in self._functions:
            if isinstance(function, RewardClassifier):
                function.to(device)
        return self

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        **extras: Any,
    ) -> Tensor:
        """`[N, F]` float32, NaN where a function answered None.

        Raises:
            ValueError, TypeError: another number of rewards than responses; NaN, infinity or no number as a reward.

        Warns:
            UserWarning: once, a response for which every function answered None.
        """
        arguments = {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": list(completion_ids),
            **columns,
            **extras,
        }
        answers: list[Any] = [function(**arguments) for function in self._functions]
        waiting = [i for i, answer in enumerate(answers) if inspect.isawaitable(answer)]
        if waiting:
            for i, answer in zip(waiting, _awaited([answers[i] for i in waiting]), strict=True):
                answers[i] = answer
        checked = [
            self._checked(name, answer, len(completions))
            for name, answer in zip(self.names, answers, strict=True)
        ]
        rewards = torch.tensor(checked, dtype=torch.float32).T.reshape(len(completions), -1)
        nowhere = rewards.isnan().all(1)
        if nowhere.any() and not self._told:
            self._told = True
            warnings.warn(
                f"{self._name}: {int(nowhere.sum())} of {len(completions)} responses got no reward (every function answered "
                "None); they are not trained on",
                stacklevel=2,
            )
        return rewards

    def weighted(self, rewards: Tensor) -> Tensor:
        """`[N]` from `[N, F]`: the weighted sum of the rewards that there are; NaN where there is none."""
        sums = (rewards * self.weights.to(rewards)).nansum(-1)
        return sums.masked_fill(rewards.isnan().all(-1), torch.nan)

    def _checked(self, function: str, answer: Any, count: int) -> list[float]:
        values = answer.tolist() if isinstance(answer, Tensor) else answer
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            got = f"{len(values)} values" if isinstance(values, Sequence) else type(answer).__name__
            raise ValueError(
                f"{self._name}: reward function {function!r} must return a list of {count} rewards, one a response, got {got}"
            )
        checked = []
        for number, value in enumerate(values):
            if value is None:
                checked.append(math.nan)
                continue
            try:
                checked.append(float(value))
            except (TypeError, ValueError):
                raise TypeError(
                    f"{self._name}: reward function {function!r} must return numbers or None, got {value!r} for response "
                    f"{number}"
                ) from None
            if not math.isfinite(checked[-1]):
                raise ValueError(
                    f"{self._name}: reward function {function!r} must return finite numbers, got {value!r} for response "
                    f"{number}; None says that there is no reward"
                )
        return checked


def _name_of(function: Any) -> str:
    return str(
        getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__)
    )


def _awaited(coroutines: list[Any]) -> list[Any]:
    """Their results, all awaited together, also where an event loop runs in this thread."""

    async def together() -> list[Any]:
        return list(await asyncio.gather(*coroutines))

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(together())
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:  # a notebook's loop is not ours to block
        return pool.submit(asyncio.run, together()).result()
