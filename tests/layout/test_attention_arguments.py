"""The registry's attention function on what does not fit, and on rows of nothing."""

from __future__ import annotations

import math

import pytest
import torch

from pyfast_dpo.layout.attention import shared_prompt_attention
from pyfast_dpo.layout.shared_prompt import Group, SharedPromptLayout

LAYOUT = SharedPromptLayout((Group(3, (2,)),))
QUERY, KEY = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
FITS = {"query": QUERY, "key": KEY, "value": KEY}
ROWS = [
    ({"query": None}, TypeError, "query must be a torch.Tensor"),
    ({"query": QUERY[0]}, ValueError, "query must be floating point"),
    ({"key": KEY.long()}, ValueError, "key must be floating point"),
    ({"key": KEY.to_sparse()}, TypeError, "key must be a dense tensor"),
    ({"key": KEY.double()}, TypeError, "key must have the dtype of query"),
    ({"value": KEY.to("meta")}, ValueError, "value must be on the device of query"),
    ({"key": KEY[:, :, :4]}, ValueError, "key must have the tokens and the width of query"),
    ({"key": KEY[..., :4]}, ValueError, "key must have the tokens and the width of query"),
    ({"query": QUERY[:, :3]}, ValueError, "key must have .*heads that divide"),
    ({"key": KEY[:, :0], "value": KEY[:, :0]}, ValueError, "key must have .*heads that divide"),
    ({"value": KEY[:, :1]}, ValueError, "value must have the heads and tokens of key"),
    ({"scaling": math.inf}, ValueError, "scaling must be positive and finite"),
    ({"scaling": "1"}, TypeError, "scaling must be a number"),
    ({"softcap": math.nan}, ValueError, "softcap must be positive and finite"),
    ({"sliding_window": 0}, ValueError, "sliding_window must be a positive int"),
    ({"sliding_window": 2.0}, ValueError, "sliding_window must be a positive int"),
]


@pytest.mark.parametrize("given, error, words", ROWS, ids=[f"{[*r[0]]}-{r[2]}" for r in ROWS])
def test_what_does_not_fit_is_refused_by_name(given, error, words) -> None:
    with pytest.raises(error, match=f"shared_prompt_attention: {words}") as caught:
        shared_prompt_attention(None, attention_mask=None, shared_prompt_layout=LAYOUT, **{**FITS, **given})  # fmt: skip
    assert type(caught.value) is error


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_row_without_tokens_has_an_empty_result(softcap) -> None:
    """Blocks joined to nothing were an error."""
    query, key = QUERY[:, :, :0], KEY[:, :, :0]
    output, _ = shared_prompt_attention(
        None, query, key, key, None, softcap=softcap, shared_prompt_layout=SharedPromptLayout(())
    )
    assert output.shape == (1, 0, 4, 8)
