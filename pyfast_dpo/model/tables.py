"""How large the tables are in which a model looks ids and positions up."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# Names of learned absolute positions in transformers: GPT-2's wpe, OPT's and BART's embed_positions, others.
_POSITIONS = re.compile(r"(^|[._])(wpe|position_embeddings?|embed_positions|pos_emb(ed)?)$")


def vocabulary_of(model: Any) -> int:
    """Rows of the embeddings of a `transformers` model, as they were before any sharding: ids below it have one."""
    embeddings = model.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", None)
    return int(embeddings.weight.shape[0] if size is None else size)


def position_table(model: nn.Module) -> int | None:
    """The tokens that a table of learned positions is for, None for a model without one (rotary positions, say,
    go on beyond what the model was trained on)."""
    config: Any = getattr(model, "config", None)
    known = getattr(config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name):
            # OPT's table has two rows more than it has positions.
            return module.num_embeddings if known is None else min(module.num_embeddings, known)
    return None
