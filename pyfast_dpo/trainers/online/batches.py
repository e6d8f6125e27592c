"""From responses to a batch: rows of shared prompts, or padded ones, and what the loss takes beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyfast_dpo.layout.padded_collators import pad_rows
from pyfast_dpo.layout.shared_prompt import pack_row
from pyfast_dpo.layout.shared_prompt_collators import row_batch, scored_rows
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.trainers.online.rollouts import Response


@dataclass
class ResponseCollator:
    """Batches of S responses, R tokens in all.

    Args:
        shared_prompt: each prompt of the batch once and no padding; else one padded row a response.
        pad_token_id, pad_to_multiple_of: of padded rows.

    Returns (from a call with responses): what a model takes in either layout; `completion_rows`, the tokens of every
        response in order; every constant that all responses have, one after the other: `[R]` of tokens, `[S]` of
        responses.
        Equal responses to a prompt stand once in a row, and are scored each.
    """

    shared_prompt: bool
    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, responses: Sequence[Response]) -> dict[str, Any]:
        prompts = [each.prompt_ids for each in responses]
        completions = [each.ids for each in responses]
        batch: dict[str, Any]
        if self.shared_prompt:
            row = pack_row(prompts, completions)
            batch = {
                **row_batch(row, len(responses)),
                "completion_rows": scored_rows(row, 0, len(responses)),
                "sequence_tokens": torch.tensor(
                    [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
                ),
            }
        else:
            all_scored = [None] * len(responses)
            padding = self.pad_token_id, self.pad_to_multiple_of
            batch = {**pad_rows(prompts, completions, all_scored, *padding)}
            batch["completion_rows"] = CompletionRows.from_labels(batch["labels"], shift=True)
        batch["sampled_logps"] = torch.cat([each.sampled_logps for each in responses])
        names = set.intersection(*(set(each.constants) for each in responses))
        for name in sorted(names):
            batch[name] = torch.cat([each.constants[name] for each in responses])
        return batch
