"""Options of PPO: names of TRL's trainer, which is no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyfast_dpo.losses.policy_table import check_policy_options
from pyfast_dpo.ops.checks import check_choice, check_finite, check_number, check_weight
from pyfast_dpo.trainers.flags import documented
from pyfast_dpo.trainers.online.config import OnlineConfig
from pyfast_dpo.trainers.options import check_positive_options

KL_ESTIMATORS = ("k1", "k3")


@documented
@dataclass
class PPOConfig(OnlineConfig):
    """Options of `PPOTrainer`.

    Args:
        num_generations: responses to each prompt; the critic is the baseline, so one is enough.
        num_ppo_epochs: how often a rollout is trained on (`num_iterations`).
        num_mini_batches: optimizer steps of each time; a rollout has as many times
            `per_device_train_batch_size * gradient_accumulation_steps` responses a process.
        kl_coef: weight of the KL penalty in the rewards of the tokens (`beta`); with `target_kl` its first value.
        kl_estimator: "k1": log-prob - reference's; "k3": e^-k1 - 1 + k1, which is never negative.
        target_kl: None, or the KL of a response that the weight is adapted to (Ziegler et al. 2019, section 2.2).
        kl_horizon: responses after which an error of 20 % has changed the weight by about 20 %.
        cliprange: how far a ratio may leave 1 (`epsilon`).
        vf_coef: weight of the critic's loss.
        cliprange_value: how far a value may leave what it was at the rollout.
        gamma: in [0, 1], discount of a token.
        lam: in [0, 1], of generalized advantage estimation.
        whiten_rewards: rewards of the tokens divided by their deviation over the rollout.
        missing_eos_penalty: taken from the score of a response that did not end.
        Others: as in `OnlineConfig` and `transformers.TrainingArguments`.

    Raises:
        ValueError: an option out of its range, or two that do not go together.
    """

    learning_rate: float = 3e-6
    num_generations: int = 1
    temperature: float = 0.7
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    target_kl: float | None = None
    kl_horizon: int = 10_000
    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None

    def __post_init__(self) -> None:
        # One number under two names: PPO's, and that of the other on-policy trainers.
        for own, shared, default in (
            ("num_ppo_epochs", "num_iterations", 1),
            ("kl_coef", "beta", 0.0),
            ("cliprange", "epsilon", 0.2),
        ):
            if getattr(self, shared) not in (default, getattr(self, own)):
                raise ValueError(
                    f"PPOConfig: {shared} is called {own} here, got {shared}={getattr(self, shared)} and "
                    f"{own}={getattr(self, own)}"
                )
            setattr(self, shared, getattr(self, own))
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = self.gradient_accumulation_steps * self.num_mini_batches
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        name = type(self).__name__
        check_positive_options(self, ("num_ppo_epochs", "num_mini_batches", "kl_horizon"))
        check_choice(name, "kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        for option in ("vf_coef", "cliprange_value"):
            check_weight(name, option, getattr(self, option))
        for option in ("gamma", "lam"):
            value = getattr(self, option)
            check_finite(name, option, value)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: {option} must be in [0, 1], got {value}")
        for option in ("target_kl", "missing_eos_penalty"):
            if getattr(self, option) is not None:
                check_number(name, option, getattr(self, option))
        if self.target_kl is not None and (self.target_kl <= 0 or self.kl_coef == 0):
            raise ValueError(
                f"{name}: target_kl must be positive, with a kl_coef to adapt, got {self.target_kl} and kl_coef "
                f"{self.kl_coef}"
            )
        check_policy_options(
            name, "ppo", "token", epsilon=self.epsilon, epsilon_high=self.epsilon_high
        )

    def loss_options(self) -> dict[str, Any]:
        """The penalty is in the rewards."""
        return {
            "loss_type": "ppo",
            "level": "token",
            "epsilon": self.epsilon,
            "epsilon_high": self.epsilon_high,
        }
