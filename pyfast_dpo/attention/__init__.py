"""Each prompt once: rows `prompt | response | response`, and attention that keeps the responses apart."""

from pyfast_dpo.attention.layout import (
    Group,
    SharedPromptLayout,
    SharedPromptRow,
    pack_row,
)
from pyfast_dpo.attention.shared_prompt import (
    no_mask,
    shared_prompt_attention,
    use_shared_prompt_attention,
)

__all__ = [
    "Group",
    "SharedPromptLayout",
    "SharedPromptRow",
    "no_mask",
    "pack_row",
    "shared_prompt_attention",
    "use_shared_prompt_attention",
]
