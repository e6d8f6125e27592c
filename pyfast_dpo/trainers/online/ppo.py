"""PPO: a critic expects the return of every token, and its errors are the advantages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyfast_dpo.layout.batches import completion_rows
from pyfast_dpo.logprobs.fused_policy import FusedPolicyLoss
from pyfast_dpo.losses.advantages import gae
from pyfast_dpo.losses.value import value_loss
from pyfast_dpo.model.projections import Projection
from pyfast_dpo.trainers.construction import causal_lm
from pyfast_dpo.trainers.online.base import OnlineTrainer
from pyfast_dpo.trainers.online.critic import (
    FILE,
    NAME,
    add_critic,
    check_has_states,
    load_critic,
    save_critic,
    without_critic,
)
from pyfast_dpo.trainers.online.ppo_config import PPOConfig
from pyfast_dpo.trainers.online.rollouts import Response
from pyfast_dpo.trainers.online.scores import Table


class PPOTrainer(OnlineTrainer):
    """Proximal Policy Optimization (Schulman et al. 2017) as for language models (Ziegler et al. 2019): the KL
    penalty in the reward of every token, the score in that of the last, advantages by GAE, a clipped critic.

    Args: as in `GRPOTrainer`, with a `PPOConfig`, and
        value_model: a causal language model, or its name, whose hidden states the critic reads and trains; None: those
            of the policy, which costs no second pass.

    Saved models hold the policy; `critic.safetensors` beside it holds the critic.

    Metrics: as in `GRPOTrainer`, and `objective/kl` (of a response), `objective/kl_coef`, `objective/scores`,
    `objective/rlhf_reward` (scores less penalties), `loss/policy_avg`, `loss/value_avg`, `policy/approxkl_avg` (half the
    mean square of the log-ratios), `value/mean`, `value/explained_variance`.
    """

    config_class = PPOConfig
    args: PPOConfig
    penalty_in_reward = True
    _tag_names = ("pyfast_dpo", "ppo")
    paper = ("Proximal Policy Optimization Algorithms", "https://arxiv.org/abs/1707.06347")

    def __init__(
        self,
        *args: Any,
        value_model: str | PreTrainedModel | nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._value_model = value_model
        super().__init__(*args, **kwargs)
        self.kl_coef = self.args.kl_coef

    def _further_models(self, policy: nn.Module, args: Any) -> dict[str, nn.Module]:
        name, model = type(self).__name__, self._value_model
        if model is not None:
            model = causal_lm(name, model, args.loading_options(), None)
        self.critic = add_critic(name, policy, model)
        return {} if model is None else {"value_model": model}

    # A rollout ------------------------------------------------------------------------------------------

    def _measure(self, responses: list[Response]) -> None:
        super()._measure(responses)
        was_training = self._policy.training
        self._policy.eval()
        self._measure_by(
            self.model_wrapped, responses, "old_values", lambda inputs, p: self._values(inputs, p)
        )
        self._policy.train(was_training)

    def _values(self, inputs: dict[str, Any], projection: Projection) -> Tensor:
        if self.critic.model is None:
            check_has_states(type(self).__name__, projection)
        return self.critic(inputs, projection)

    def _judge(self, responses: list[Response], table: Table, first: int, group: int) -> None:
        """Advantages and returns of every token."""
        there = [each for each in responses if each.ids]
        scores = table.rewards.nan_to_num(nan=0.0)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * table.truncated
        own = scores[first : first + len(responses)][[bool(each.ids) for each in responses]]
        lengths = torch.tensor([len(each.ids) for each in there])
        mask = torch.arange(int(lengths.max()) if there else 0) < lengths.unsqueeze(1)
        rewards, values = torch.zeros(mask.shape), torch.zeros(mask.shape)
        penalties = [self._penalties(each) for each in there]
        if there:
            rewards[mask] = -torch.cat(penalties)
            values[mask] = torch.cat([each.constants["old_values"] for each in there])
            rewards[torch.arange(len(there)), lengths - 1] += own
        if self.args.whiten_rewards:
            rewards = rewards / self._moments(rewards[mask])[1]
        found = gae(rewards, values, gamma=self.args.gamma, lam=self.args.lam, mask=mask)
        mean, deviation = self._moments(found.advantages[mask])
        whitened = (found.advantages - mean) / deviation
        for i, each in enumerate(there):
            each.constants["advantages"] = whitened[i, : lengths[i]].clone()
            each.constants["returns"] = found.returns[i, : lengths[i]].clone()
        for each in responses:
            each.constants.setdefault("advantages", torch.zeros(0))
        self._report(table, scores, found.returns[mask], values[mask])
        self._adapt(table)

    def _penalties(self, response: Response) -> Tensor:
        """Of every token, `[T]`."""
        if self.args.beta == 0:
            return torch.zeros(len(response.ids))
        difference = response.sampled_logps - response.constants["reference_logps"]
        if self.args.kl_estimator == "k3":
            difference = torch.expm1(-difference) + difference
        return self.kl_coef * difference

    def _moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, and deviation (n - 1), over the tokens of all processes."""

        def total(*sums: Tensor) -> Tensor:
            return self.accelerator.reduce(torch.stack(sums).to(self.args.device), "sum").cpu()

        wide = values.double()
        count, sum_ = total(torch.tensor(float(len(values)), dtype=torch.float64), wide.sum())
        mean = sum_ / count.clamp(min=1)
        (squares,) = total((wide - mean).square().sum())
        return mean.float(), (squares / (count - 1).clamp(min=1) + 1e-8).sqrt().float()

    def _report(self, table: Table, scores: Tensor, returns: Tensor, values: Tensor) -> None:
        metrics = self._metrics["train" if self._policy.training else "eval"]
        kl = table.kl.mean()
        metrics["objective/kl"].append(float(kl))
        metrics["objective/kl_coef"].append(self.kl_coef)
        metrics["objective/scores"].append(float(scores.mean()))
        metrics["objective/rlhf_reward"].append(float(scores.mean() - self.kl_coef * kl))
        metrics["value/mean"].append(float(values.mean()) if len(values) else 0.0)
        if len(returns) > 1 and returns.var() > 0:
            explained = 1 - (returns - values).var() / returns.var()
            metrics["value/explained_variance"].append(float(explained))

    def _adapt(self, table: Table) -> None:
        """Ziegler et al. 2019, section 2.2."""
        if self.args.target_kl is None or not self._policy.training:
            return
        error = min(max(float(table.kl.mean()) / self.args.target_kl - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * len(table.rewards) / self.args.kl_horizon

    # A step ---------------------------------------------------------------------------------------------

    def _teaches(self, response: Response) -> bool:
        return response.length > 0  # at least the critic

    def _loss(self, inputs: dict[str, Any], projection: Projection) -> FusedPolicyLoss:
        result = super()._loss(inputs, projection)
        values = self._values(inputs, projection)
        of_critic = value_loss(
            values,
            inputs["old_values"],
            inputs["returns"],
            normalizer=inputs["tokens"],
            cliprange_value=self.args.cliprange_value,
        )
        metrics = self._averages["train" if self._policy.training else "eval"]
        rows = len(completion_rows(inputs).index)
        metrics.add("loss/policy_avg", result.loss * inputs["normalizer"], rows)
        metrics.add("loss/value_avg", of_critic * inputs["tokens"], rows)
        metrics.add("policy/approxkl_avg", result.ratios.log().square().sum() / 2, rows)
        return result._replace(loss=result.loss + self.args.vf_coef * of_critic)

    # Checkpoints ----------------------------------------------------------------------------------------

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        model: Any = self.accelerator.unwrap_model(self._policy)
        critic = getattr(model, NAME)
        delattr(model, NAME)  # a checkpoint of the policy is one that everybody can load
        try:
            super()._save(output_dir, None if state_dict is None else without_critic(state_dict))
        finally:
            model.add_module(NAME, critic)
        if self.args.should_save:
            save_critic(critic, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        policy: Any = self.accelerator.unwrap_model(self._policy)
        critic = getattr(policy, NAME)
        delattr(policy, NAME)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        finally:
            policy.add_module(NAME, critic)
        if not Path(resume_from_checkpoint, FILE).exists():
            raise ValueError(
                f"PPOTrainer: the checkpoint {resume_from_checkpoint} has no {FILE}; it is another trainer's"
            )
        load_critic(critic, Path(resume_from_checkpoint))

    def _state_of_run(self) -> dict[str, Any]:
        return {**super()._state_of_run(), "kl_coef": self.kl_coef}

    def _restore_run(self, state: dict[str, Any]) -> None:
        super()._restore_run(state)
        self.kl_coef = state["kl_coef"]
