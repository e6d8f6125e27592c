"""The embedded engine: a transformers model in this process."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyfast_dpo.model.causal_lm import causal_lm_of, check_causal_lm
from pyfast_dpo.rollout.engine import Completion, Sampling, check_request
from pyfast_dpo.rollout.sampler import Sampler


class TransformersEngine:
    """Responses of a causal language model of transformers, in process.

    Each distinct prompt is computed once, its cache repeated for its group; responses that have ended leave the
    batch; the log-probs of the sampled tokens are kept. The model itself is used, not a copy: what a trainer does
    to its weights is seen by the next call.

    Args:
        model: a causal language model or a PEFT model around one, on its device.
        max_rows: >= 1, responses written at a time; bounds the memory of the cache.
        version: of the weights.

    Raises:
        ValueError: no causal language model, max_rows.
    """

    def __init__(self, model: Any, *, max_rows: int = 64, version: int = 0) -> None:
        if max_rows < 1:
            raise ValueError(f"TransformersEngine: max_rows must be at least 1, got {max_rows}")
        self.max_rows = max_rows
        self.update_weights(model, version)

    def update_weights(self, model: Any, version: int) -> None:
        check_causal_lm("TransformersEngine", model)
        self.model, self.version = model, version
        # Some architectures count positions from the mask alone, or always make all logits.
        self._options = set(inspect.signature(causal_lm_of(model).forward).parameters)

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """n responses to each prompt, in the order of the prompts; equal prompts are computed once.

        Raises:
            TypeError, ValueError: prompts that are no token ids of this model, n, a response that would not fit the
                model's positions.
        """
        name = "TransformersEngine.generate"
        inner = causal_lm_of(self.model)
        checked = check_request(name, prompts, n, inner.get_input_embeddings().weight.shape[0])
        if not checked:
            return []
        longest = max(map(len, checked)) + sampling.max_tokens
        positions = getattr(inner.config, "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ValueError(
                f"{name}: the longest prompt and max_tokens need {longest} positions, the model has {positions}"
            )
        device = inner.get_input_embeddings().weight.device
        sampler = Sampler(sampling, len(checked) * n, device)
        stops = torch.tensor(
            sorted(
                self._stops(inner) if sampling.stop_token_ids is None else sampling.stop_token_ids
            ),
            dtype=torch.int64,
            device=device,
        )
        # Prompts of like length beside each other: less padding.
        order = sorted(range(len(checked)), key=lambda i: len(checked[i]))
        per_batch = max(1, self.max_rows // n)
        results: dict[int, list[Completion]] = {}
        with torch.no_grad(), _evaluating(self.model):
            for first in range(0, len(order), per_batch):
                batch = order[first : first + per_batch]
                written = self._write([checked[i] for i in batch], batch, n, sampler, stops)
                results.update(zip(batch, written, strict=True))
        return [results[i] for i in range(len(checked))]

    def _write(
        self, prompts: list[list[int]], numbers: list[int], n: int, sampler: Sampler, stops: Tensor
    ) -> list[list[Completion]]:
        """Responses to some prompts, whose `numbers` in the whole call say which random numbers are theirs."""
        device = stops.device
        distinct = {tuple(prompt): i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        owner = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)
        logits, cache, mask = self._prefill([list(prompt) for prompt in distinct])
        rows = owner.repeat_interleave(n)
        if cache is None or not hasattr(cache, "batch_select_indices"):
            raise ValueError(
                f"TransformersEngine: {type(causal_lm_of(self.model)).__name__} keeps no cache whose rows can be chosen, "
                f"got {type(cache).__name__}"
            )
        cache.batch_select_indices(rows)
        logits, mask = logits[rows], mask[rows]
        drawn_by = torch.tensor([k * n + j for k in numbers for j in range(n)], device=device)
        alive = torch.arange(len(rows), device=device)
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        ended = [False] * len(rows)
        for step in range(sampler.sampling.max_tokens):
            drawn, logps = sampler.draw(logits, drawn_by[alive], step)
            is_stop = torch.isin(drawn, stops)
            for row, token, logp, stop in zip(
                alive.tolist(), drawn.tolist(), logps.tolist(), is_stop.tolist(), strict=True
            ):
                tokens[row].append(token)
                logprobs[row].append(logp)
                ended[row] = stop
            going = ~is_stop
            if step + 1 == sampler.sampling.max_tokens or not going.any():
                break
            if not going.all():
                kept = going.nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                alive, drawn, mask = alive[kept], drawn[kept], mask[kept]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            logits = self._step(drawn, cache, mask)
        completions = [
            Completion(tokens[row], logprobs[row], "stop" if ended[row] else "length", self.version)
            for row in range(len(rows))
        ]
        return [completions[i * n : (i + 1) * n] for i in range(len(prompts))]

    def _prefill(self, prompts: list[list[int]]) -> tuple[Tensor, Any, Tensor]:
        """(logits `[P, V]` of the next token, cache, mask `[P, L]`), padded on the left."""
        device = causal_lm_of(self.model).get_input_embeddings().weight.device
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        outputs = self._call(ids, mask, None, mask.cumsum(-1).sub(1).clamp(min=0))
        return outputs.logits[:, -1], outputs.past_key_values, mask

    def _step(self, tokens: Tensor, cache: Any, mask: Tensor) -> Tensor:
        positions = mask.sum(-1, keepdim=True) - 1
        return self._call(tokens.unsqueeze(1), mask, cache, positions).logits[:, -1]

    def _call(self, ids: Tensor, mask: Tensor, cache: Any, positions: Tensor) -> Any:
        options = {"position_ids": positions, "logits_to_keep": 1}
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in options.items() if name in self._options},
        )

    def _stops(self, inner: Any) -> set[int]:
        """The model's end-of-sequence tokens, by its generation configuration, else by its own."""
        for config in (getattr(inner, "generation_config", None), inner.config):
            found = getattr(config, "eos_token_id", None)
            if found is not None:
                return {found} if isinstance(found, int) else set(found)
        return set()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout, and, where layers are checkpointed in training, with a cache."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
