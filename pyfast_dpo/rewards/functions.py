"""How rewards are asked for: functions, coroutines and classifiers with TRL's signature, their answers checked."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_dpo.ops.checks import check_finite, describe
from pyfast_dpo.rewards.classifiers import RewardClassifier

RewardFunction = Callable[..., Any]


class RewardFunctions:
    """One or several rewards of a response.

    Args:
        functions: one or a list of
            - a function `f(prompts, completions, completion_ids, **columns)` that returns a number, or None where it
              does not apply, for each of N responses; prompts and completions are strings, or lists of messages.
              Everything is given by keyword: also the columns of the data (but for those of these three names), and
              what the caller adds (`trainer_state`, `log_extra`, `log_metric`), so it must take `**kwargs`;
            - a coroutine function of the same kind; several are awaited together;
            - a sequence classifier with one label (`AutoModelForSequenceClassification`), or its name: its logit.
        weights: one number a function, 1 by default.
        processing_classes: tokenizers of classifiers, one entry a function, None for others and for their own.
        name: of who asks, for errors.

    Attributes:
        names: of the functions, for metrics; the second of two that are called the same ends in _2.

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
        self.names = _distinct([_name_of(function) for function in self._functions])
        if weights is not None and (
            not isinstance(weights, list | tuple) or len(weights) != len(given)
        ):
            raise ValueError(
                f"{name}: reward_weights must have one number for each of {len(given)} reward functions, got {weights!r}"
            )
        for number, weight in enumerate(weights or ()):
            check_finite(name, f"reward_weights[{number}]", weight)
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
            ValueError, TypeError: another number of rewards than responses; NaN, infinity or no number as a reward; a
                function that cannot be called with these columns.

        Warns:
            UserWarning: once, a response for which every function answered None.
        """
        arguments = {
            **columns,
            **extras,
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": list(completion_ids),
        }
        for function_name, function in zip(self.names, self._functions, strict=True):
            self._check_call(function_name, function, arguments)
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

    def _check_call(self, name: str, function: RewardFunction, arguments: dict[str, Any]) -> None:
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            raise TypeError(
                f"{self._name}: reward function {name!r} must take {', '.join(arguments)} by keyword, or **kwargs for what "
                f"it does not need: {error}"
            ) from None
        except ValueError:  # a function in C that does not say what it takes
            pass

    def _checked(self, function: str, answer: Any, count: int) -> list[float]:
        values = answer.tolist() if isinstance(answer, Tensor | np.ndarray) else answer
        is_list = isinstance(values, Sequence) and not isinstance(values, str)
        if not is_list or len(values) != count:
            got = f"{len(values)} values" if is_list else describe(answer)
            raise ValueError(
                f"{self._name}: reward function {function!r} must return a list of {count} rewards, one a response, got {got}"
            )
        checked = []
        for number, value in enumerate(values):
            if value is None:
                checked.append(math.nan)
                continue
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            what = (
                f"what reward function {function!r} returns for response {number} (None: no reward)"
            )
            check_finite(self._name, what, value)
            checked.append(float(value))
        return checked


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(
        getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__)
    )


def _distinct(names: list[str]) -> list[str]:
    return [
        name if (before := names[:i].count(name)) == 0 else f"{name}_{before + 1}"
        for i, name in enumerate(names)
    ]


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
