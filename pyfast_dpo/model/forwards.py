"""Modules of a model that compute in a function of ours, until that is undone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def replace_forwards(
    model: nn.Module, choose: Callable[[nn.Module], Callable[..., Any] | None]
) -> Callable[[], None]:
    """Gives every module the `forward` that `choose` names for it; None leaves the module as it is.

    A module whose instance has a `forward` already (ours, or somebody's who moves weights) is left too.

    Returns:
        A function that takes ours away again.
    """
    replaced = []
    for module in model.modules():
        function = None if "forward" in vars(module) else choose(module)
        if function is not None:
            module.forward = partial(
                function, module
            )  # which pickles; a method of a function does not
            replaced.append(module)
    return partial(_give_back, replaced)


def _give_back(modules: list[Any]) -> None:
    for module in modules:
        vars(module).pop("forward", None)
