"""Each prompt once: rows `prompt | response | response`, and attention that keeps the responses apart."""

from pyfast_dpo.layout.attention import (
    no_mask,
    shared_prompt_attention,
    use_shared_prompt_attention,
)
from pyfast_dpo.layout.shared_prompt import Group, SharedPromptLayout, SharedPromptRow, pack_row

__all__ = [
    "Group",
    "SharedPromptLayout",
    "SharedPromptRow",
    "no_mask",
    "pack_row",
    "shared_prompt_attention",
    "use_shared_prompt_attention",
]
