"""Preference data: reading, checking, tokenizing and batching."""

from pyfast_dpo.data.loading import load_rows
from pyfast_dpo.data.prepare import prepare_pairs, prepare_unpaired
from pyfast_dpo.data.prepared import PreparedDataset
from pyfast_dpo.data.prompts import prepare_prompts
from pyfast_dpo.data.report import DataReport
from pyfast_dpo.data.streams import StreamedDataset
from pyfast_dpo.layout.padded_collators import (
    DataCollatorForPreference,
    DataCollatorForUnpairedPreference,
)
from pyfast_dpo.layout.shared_prompt_collators import (
    SharedPromptCollatorForPreference,
    SharedPromptCollatorForUnpairedPreference,
)

__all__ = [
    "DataCollatorForPreference",
    "DataCollatorForUnpairedPreference",
    "DataReport",
    "PreparedDataset",
    "SharedPromptCollatorForPreference",
    "SharedPromptCollatorForUnpairedPreference",
    "StreamedDataset",
    "load_rows",
    "prepare_pairs",
    "prepare_prompts",
    "prepare_unpaired",
]
