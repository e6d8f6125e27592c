"""The one place that decides how a model is called, makes it ready for that, and makes it as it was again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from pyfast_dpo.layout.attention import takes_shared_prompts, use_shared_prompt_attention
from pyfast_dpo.model.causal_lm import causal_lm_of
from pyfast_dpo.model.linear_layers import use_own_products
from pyfast_dpo.model.one_pass import use_one_pass
from pyfast_dpo.model.projections import take_projections
from pyfast_dpo.model.ways import Agreed, Ways, find_ways


def prepare(
    name: str,
    models: Mapping[str, Any],
    *,
    shared_prompt: bool = True,
    agreed: Agreed | None = None,
) -> PreparedModels:
    """Finds out how models can be called, all in one layout, and returns what makes them so.

    Args:
        name: of who asks, such as the trainer, for warnings and errors.
        models: by the name of their argument; each a causal language model of transformers or a PEFT model around
            one, on its device and not yet wrapped (DDP, FSDP, torch.compile).
        shared_prompt: False for the padded layout anyway.
        agreed: makes one decision of those of all processes; None with one process.

    Raises:
        ValueError: a model that is no causal one, or cannot be called.

    Warns:
        UserWarning: what was not possible, why, and what it costs.

    Example:
        >>> with prepare("score", {"model": model}) as prepared:  # the models are as they were afterwards
        ...     model(**model_inputs(batch), project=lambda p: p.sequence_logps(completion_rows(batch)))
    """
    ways = {}
    for argument, model in models.items():
        who = name if argument == "model" else f"{name}, {argument}"
        ways[argument] = find_ways(who, model, shared_prompt=shared_prompt, agreed=agreed)
        shared_prompt = shared_prompt and ways[argument].shared_prompt
    ways = {argument: way._replace(shared_prompt=shared_prompt) for argument, way in ways.items()}
    return PreparedModels(models, ways)


class PreparedModels:
    """Models that take batches of one layout and the keyword `project` while this is in force, from `apply` to
    `restore`, or in a `with` block; blocks nest. Calls without `project`, and `generate`, answer as ever.

    Keep it in force from a forward pass to the end of its backward pass, which may compute layers again.

    Attributes:
        ways: of every model, by the name of its argument.
        shared_prompt: whether batches are those of shared prompts; else padded ones.
    """

    def __init__(self, models: Mapping[str, Any], ways: Mapping[str, Ways]) -> None:
        self._models = dict(models)
        self.ways = dict(ways)
        self.shared_prompt = all(way.shared_prompt for way in self.ways.values())
        self._undo = ExitStack()
        self._applied, self._blocks = False, 0

    def apply(self) -> None:
        """A second call does nothing."""
        if self._applied and self._in_force():
            return
        self.restore()
        for argument, model in self._models.items():
            undo, inner = self._undo.callback, causal_lm_of(model)
            undo(take_projections(model, own_logits=self.ways[argument].own_logits))
            if self.shared_prompt:
                undo(use_shared_prompt_attention(inner))
            undo(use_own_products(model))
            undo(use_one_pass(model))
        self._applied = True

    def restore(self) -> None:
        """The models as they were; a second call does nothing."""
        self._undo.close()
        self._applied = False

    def _in_force(self) -> bool:
        """Others who prepared the same model may have restored its attention."""
        return not self.shared_prompt or all(
            takes_shared_prompts(causal_lm_of(model)) for model in self._models.values()
        )

    def __enter__(self) -> PreparedModels:
        self._blocks += 1
        self.apply()
        return self

    def __exit__(self, *error: Any) -> None:
        self._blocks -= 1
        if self._blocks == 0:
            self.restore()
