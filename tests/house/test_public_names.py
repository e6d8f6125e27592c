"""Import paths that users have: each name, from where they import it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

CORE = {
    "pyfast_dpo": (
        "BcoShift CompletionRows FusedLinearLoss FusedPolicyLoss LinearStatistics __version__ build_info fused_dpo_loss "
        "fused_ipo_loss fused_kto_loss fused_linear_dpo_loss fused_linear_ipo_loss fused_linear_kto_loss "
        "fused_linear_loss fused_linear_policy_loss gae group_advantages kto_kl kto_loss ld_row_weights ld_token_weights linear_sequence_logps "
        "linear_token_logps policy_loss policy_normalizer preference_loss reward_loss rloo_advantages sampling_correction sequence_logps token_logps unpaired_loss "
        "value_loss wpo_weights"
    ),
    "pyfast_dpo.numpy": (
        "PPOBuffer PPOResult PairResult PreferencePair RewardResult UnpairedResult compute_sequence_logprob create_preference_batch "
        "dpo_loss ipo_loss kto_loss ppo_loss preference_loss reward_loss unpaired_loss"
    ),
    "pyfast_dpo.distributed": "vocab_parallel_sequence_logps vocab_parallel_token_logps",
}
WITH_TRANSFORMERS = {
    "pyfast_dpo.trainers": "DPOConfig DPOTrainer KTOConfig KTOTrainer",
    "pyfast_dpo.data": (
        "DataCollatorForPreference DataCollatorForUnpairedPreference DataReport PreparedDataset "
        "SharedPromptCollatorForPreference SharedPromptCollatorForUnpairedPreference StreamedDataset "
        "load_rows prepare_pairs prepare_unpaired"
    ),
    "pyfast_dpo.rollout": "Completion Engine HTTPEngine RolloutError Sampling TransformersEngine",
    "pyfast_dpo.integrations.trl": "patch unpatch",
    "pyfast_dpo.integrations.transformers": "patch_causal_lm_loss unpatch_causal_lm_loss",
}


def names(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(module, name) for module, listed in table.items() for name in listed.split()]


@pytest.mark.parametrize("module, name", names(CORE))
def test_core_name(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("module, name", names(WITH_TRANSFORMERS))
def test_name_of_an_extra(module: str, name: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert hasattr(importlib.import_module(module), name)


def test_all_of_the_package_is_what_it_lists() -> None:
    import pyfast_dpo

    assert sorted(pyfast_dpo.__all__) == sorted(CORE["pyfast_dpo"].split())


def test_importing_the_package_needs_torch_and_numpy_alone() -> None:
    code = (
        "import sys, pyfast_dpo, pyfast_dpo.numpy, pyfast_dpo.distributed\n"
        "extra = {'transformers', 'accelerate', 'datasets', 'peft', 'trl', 'matplotlib'} & set(sys.modules)\n"
        "assert not extra, extra"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
