"""Which layout and which head a model can take, found by trying them on a few tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_dpo.layout.attention import observed_windows, use_shared_prompt_attention
from pyfast_dpo.layout.batches import completion_rows, model_inputs
from pyfast_dpo.layout.padded_collators import DataCollatorForPreference
from pyfast_dpo.layout.shared_prompt_collators import SharedPromptCollatorForPreference
from pyfast_dpo.logprobs.head import Head
from pyfast_dpo.model.causal_lm import causal_lm_of, head_of
from pyfast_dpo.model.projections import take_projections

PROMPT_TOKENS, RESPONSE_TOKENS = 48, 24  # of the check, which costs a fraction of a step
REACH = 256  # the check is made longer than a window up to this; longer ones are seen in the calls alone
LARGE = 100.0  # a logit that a soft-cap bends

# What two right ways of calling a model may differ by. The layouts, by the norm of the difference of their hidden
# states over the norm: float32 layouts differ by 1e-6. The heads, by the largest difference of logits over the
# largest logit: rounding of half types.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF_TOLERANCE = 0.05


class Ways(NamedTuple):
    """How a model is called."""

    shared_prompt: bool  # each prompt once, no padding; else one padded row a sequence
    own_logits: bool  # the whole logits matrix; else completion rows through the lm_head's weight


def find_ways(
    name: str, model: Any, *, shared_prompt: bool = True, agreed: Agreed | None = None
) -> Ways:
    """The fastest way of calling a model that gives the log-probs of the padded layout with the model's own logits.
    The model is left as it was.

    Args:
        name: of who asks, for warnings and errors.
        model: on its device; a PEFT model or a causal language model. On the meta device nothing is tried.
        shared_prompt: False for the padded layout anyway.
        agreed: makes one decision of those of all processes.

    Raises:
        ValueError: a token changes what the model computes for tokens before it, or it cannot be called.

    Warns:
        UserWarning: what was not possible, why, and what it costs.
    """
    agreed = agreed or bool
    inner = causal_lm_of(model)
    trial = Trial(model)
    was_training = model.training
    model.eval()
    try:
        trial.check_causal(name)
        reason = _reason(trial.against_head)
        own_logits = not agreed(reason is None)
        if own_logits:
            warnings.warn(
                f"{name}: the log-probs come from the model's own logits, which costs the memory of a logits "
                f"matrix, since its lm_head cannot be used by itself ({reason or 'on another process'})",
                stacklevel=4,
            )
        if not shared_prompt:
            return Ways(False, own_logits)
        reason = _reason(lambda: trial.against_shared_prompt(own_logits))
        shared_prompt = agreed(reason is None)
        if not shared_prompt:
            warnings.warn(
                f"{name}: falling back to padded batches that repeat the prompt, since "
                f"{type(inner).__name__} does not take shared prompts ({reason or 'on another process'})",
                stacklevel=4,
            )
        return Ways(shared_prompt, own_logits)
    finally:
        model.train(was_training)


def check_head(name: str, model: Any) -> None:
    """Raises ValueError where the lm_head by itself, and what the configuration says, do not give the model's
    logits."""
    was_training = model.training
    model.eval()
    try:
        reason = _reason(Trial(model).against_head)
    finally:
        model.train(was_training)
    if reason is not None:
        raise ValueError(f"{name}: {reason}; nothing was changed")


Agreed = Callable[[bool], bool]


def _reason(check: Callable[[], str | None]) -> str | None:
    """Why not. Whatever a model of somebody else's raises, the other way remains."""
    try:
        return check()
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Trial:
    """A model in evaluation mode, tried on two made-up pairs under two prompts."""

    def __init__(self, model: Any) -> None:
        self._model, self._inner = model, causal_lm_of(model)
        parameter = next(self._inner.parameters())
        self._device, dtype = parameter.device, self._inner.dtype
        self._measured = self._device.type != "meta" and parameter.numel() > 0
        narrow = self._device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        self._tolerance = HALF_TOLERANCE if narrow else TOLERANCES.get(dtype, HALF_TOLERANCE)
        self._config = self._inner.config.get_text_config()

    def check_causal(self, name: str) -> None:
        """Raises where a later token changes the states of those before it."""
        if not self._measured:
            return
        tokens = self._tokens(12).repeat(2, 1)
        tokens[1, -1] = tokens[1, 0]
        kind = type(self._inner).__name__
        try:
            with torch.no_grad():
                outputs = self._model(
                    input_ids=tokens, use_cache=False, attention_mask=torch.ones_like(tokens)
                )
            first, second = outputs.logits[:, :-1].double()
        except Exception as error:
            raise ValueError(
                f"{name}: {kind} cannot be called with input_ids and attention_mask as a causal language model "
                f"({type(error).__name__}: {error})"
            ) from error
        difference = float((first - second).norm() / first.norm())
        if difference > self._tolerance:  # not if it is NaN, which the losses will show
            raise ValueError(
                f"{name}: {kind} is no causal language model: its logits change by {difference:.2g} of their "
                "norm where a later token changes, so they have seen the answer"
            )

    @torch.no_grad()
    def against_head(self) -> str | None:
        head = head_of(self._inner)
        if not self._measured:
            return None
        self._states(False, own_logits=False)  # the lm_head runs once, and gets hidden states
        for largest in (None, LARGE):
            states, truth = self._logits(head, largest)
            logits = functional.linear(states, head.weight, head.bias).double() * head.logit_scale
            if head.softcap is not None:
                logits = head.softcap * torch.tanh(logits / head.softcap)
            difference = float((logits - truth).abs().max() / truth.abs().max())
            if not difference <= self._tolerance:
                return (
                    f"{type(self._inner).__name__} does more to its logits than its configuration tells: those of "
                    f"its lm_head's weight differ by {difference:.2g} of the largest"
                )
        return None

    def against_shared_prompt(self, own_logits: bool) -> str | None:
        undo = use_shared_prompt_attention(self._inner)
        try:
            if not self._measured:
                return None
            with observed_windows() as windows:
                truth = self._states(False, own_logits)
            for of_mask, of_attention in windows.mismatches:
                return f"its mask applies a window of {of_mask} positions, and its attention is told of {of_attention}"
            result = self._states(True, own_logits)
        finally:
            undo()
        difference = float((result - truth).norm() / truth.norm())
        if difference <= self._tolerance:
            return None
        return f"its hidden states differ by {difference:.2g} of their norm from those of the padded layout"

    def _logits(self, head: Head, largest: float | None) -> tuple[Tensor, Tensor]:
        """(some states that the lm_head gets, the model's logits of them); the states are scaled so that the head
        makes its largest logit of that size."""
        seen: list[Tensor] = []

        def few(layer: Any, args: Any) -> Any:
            states = args[0][:1, -8:]
            if largest is not None:
                logits = functional.linear(states, head.weight, head.bias)
                states = states * (largest / logits.abs().max().clamp(min=1e-6))
            seen.append(states)
            return (states, *args[1:])

        layer = self._inner.get_output_embeddings()
        handle = layer.register_forward_pre_hook(few)
        try:
            tokens = self._tokens(12).unsqueeze(0)
            outputs = self._model(input_ids=tokens, use_cache=False)
        finally:
            handle.remove()
        return seen[-1], outputs.logits.double()

    @torch.no_grad()
    def _states(self, shared_prompt: bool, own_logits: bool) -> Tensor:
        """Hidden states or logits of the scored rows."""
        collate: Any = (
            SharedPromptCollatorForPreference() if shared_prompt else DataCollatorForPreference(0)
        )
        batch = {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in collate(self._pairs()).items()
        }
        rows = completion_rows(batch)
        with _undone(take_projections(self._model, own_logits=own_logits)):
            states = self._model(**model_inputs(batch), project=lambda p: p.states(rows))
        return states.double()

    def _pairs(self) -> list[Mapping[str, Any]]:
        windows = [
            value
            for name, value in vars(self._config).items()
            if ("window" in name or "chunk" in name) and type(value) is int and value <= REACH
        ]
        limit = getattr(self._config, "max_position_embeddings", None) or 2 * REACH
        response = min(RESPONSE_TOKENS, limit // 3)
        prompt = max(min(max(PROMPT_TOKENS, *windows, 0), limit - response), 1)
        tokens = self._tokens(2 * (prompt + 2 * response)).tolist()
        return [
            {
                "prompt_ids": tokens[: prompt // (1 + i)],
                "chosen_ids": tokens[prompt : prompt + response],
                "rejected_ids": tokens[-response + 5 * i :],
            }
            for i in range(2)
        ]

    def _tokens(self, count: int) -> Tensor:
        vocabulary = self._inner.get_input_embeddings().weight.shape[0]
        return (torch.arange(count, device=self._device) * 7 + 3) % vocabulary


@contextmanager
def _undone(undo: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    finally:
        undo()
