"""GRPO: the rewards of a group against each other."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_dpo.losses.advantages import group_advantages
from pyfast_dpo.trainers.online.base import OnlineTrainer
from pyfast_dpo.trainers.online.config import GRPOConfig
from pyfast_dpo.trainers.online.scores import Table


class GRPOTrainer(OnlineTrainer):
    """Group Relative Policy Optimization (Shao et al. 2024) and kin: Dr. GRPO, DAPO, GSPO, CISPO, SAPO, VESPO.

    Args:
        model: a model, or a name or path for `from_pretrained`.
        reward_funcs: one or several of: a function `f(prompts, completions, completion_ids, **columns)` that returns
            a number or None for each, also `async`; a sequence classifier or its name.
        args: a `GRPOConfig`.
        train_dataset, eval_dataset: rows with `prompt`, a string or messages; other columns go to the rewards.
        processing_class: the tokenizer; by default that of the model.
        reward_processing_classes: tokenizers of reward models, one a reward function; by default their own.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: for a model given by name.
        peft_config: makes the model a PEFT model.
        ref_model: the reference, if `beta` > 0; by default the model as it is now, or the base under its adapter.
        engine: what writes the responses (`pyfast_dpo.rollout`); by default the model itself, in this process.

    Metrics, of the responses of a rollout: `reward`, `reward_std`, `rewards/NAME/mean`, `rewards/NAME/std`,
    `frac_reward_zero_std` (of groups that teach nothing), `completions/{mean,min,max}_length`,
    `completions/clipped_ratio`, `completions/{mean,min,max}_terminated_length`; of the trained tokens: `entropy`, `kl`
    (with `beta`), `clip_ratio/{low_mean,low_min,high_mean,high_max,region_mean}`,
    `sampling/sampling_logp_difference/{mean,max}` (nats a token between sampler and trainer), `num_tokens`,
    `tokens_per_second`.
    """

    config_class = GRPOConfig
    args: GRPOConfig
    _tag_names = ("pyfast_dpo", "grpo")
    paper = (
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "https://arxiv.org/abs/2402.03300",
    )

    def _advantages(self, table: Table, group: int) -> Tensor:
        scale = str(self.args.scale_rewards)
        if self.args.multi_objective_aggregation == "sum_then_normalize":
            return group_advantages(table.rewards.view(-1, group), scale=scale).flatten()
        # GDPO: each reward in its group, then the sum over the whole rollout as one group.
        per_function = table.per_function.T.reshape(table.per_function.shape[1], -1, group)
        scaled = group_advantages(per_function).flatten(1).T
        scaled = torch.where(table.per_function.isnan(), torch.nan, scaled)
        return group_advantages(self.reward_functions.weighted(scaled).view(1, -1)).flatten()
