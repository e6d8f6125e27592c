"""How large the tables are in which a model looks ids and positions up."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# Names of learned absolute positions in transformers: GPT-2's wpe, OPT's embed_positions, GPT's positions_embed,
# RoBERTa's position_embeddings.
_POSITIONS = re.compile(r"(^|[._])(wpe|position_embeddings?|embed_positions|positions_embed)$")


def vocabulary_of(model: Any) -> int:
    """Rows of the embeddings of a `transformers` model: each id below has one."""
    embeddings = model.get_input_embeddings()
    # An adapter on the embeddings shows a weight alone; one that is sharded has no rows here.
    size = getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]
    return int(size or model.config.get_text_config().vocab_size)


def position_table(model: nn.Module) -> int | None:
    """The tokens that a table of learned positions is for, None for a model without one (rotary positions, say,
    go on beyond what the model was trained on)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name):
            # Some tables begin with rows that no token uses: OPT's with 2, RoBERTa's with those up to its padding.
            unused = getattr(module, "offset", 0)
            if module.padding_idx is not None:
                unused = module.padding_idx + 1
            return module.num_embeddings - unused
    return None
