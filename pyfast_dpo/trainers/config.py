"""Options of the trainers on preference data, checked at construction."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from pyfast_dpo.losses.table import check_pair_options, couples_batch, loss_names
from pyfast_dpo.losses.weighting import ld_row_weights
from pyfast_dpo.ops.checks import check_beta, check_choice, check_weight
from pyfast_dpo.trainers.flags import documented
from pyfast_dpo.trainers.options import PolicyConfig, check_positive_options, warn_of

KTO_LOSSES = ("kto", "apo_zero_unpaired")
NONE_OR_AT_LEAST_ONE = (
    "max_tokens_per_batch",
    "precompute_ref_batch_size",
    "dataset_num_proc",
)


@documented
@dataclass
class PreferenceConfig(PolicyConfig):
    """What `DPOConfig` and `KTOConfig` share.

    Args:
        beta: > 0, strength of the pull to the reference.
        max_length: the most tokens of prompt + response. Longer responses are cut, rows with longer
            prompts dropped and reported. None for no limit.
        truncation_mode: "keep_start": the end of the response is cut.
        padding_free: what `shared_prompt` does; there is nothing to add to it.
        max_tokens_per_batch: fill batches by this number of computed tokens (each prompt once) instead of
            by `per_device_train_batch_size`; the loss is the mean over the examples of all batches of a step.
        dataset_num_proc: processes that tokenize the data; by default this one alone.
        precompute_ref_log_probs: compute the reference's log-probs once, before training, and keep no
            second model. They are cached by data and weights; a run that was stopped goes on where it was.
        precompute_ref_batch_size: examples at a time, by default `per_device_eval_batch_size`.
        train_sampling_strategy: as in `TrainingArguments`, where "group_by_length" counts the tokens that a
            row brings, prompt once; "batch_rebalance" is refused.
        Others: as in `PolicyConfig`.
    """

    beta: float = 0.1
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    padding_free: bool = False
    max_tokens_per_batch: int | None = None
    dataset_num_proc: int | None = None
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None

    def _check(self) -> None:
        name = type(self).__name__
        check_beta(name, self.beta)
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"{name}: max_length must be None or at least 2 (a prompt and a response token), "
                f"got {self.max_length}"
            )
        check_positive_options(self, NONE_OR_AT_LEAST_ONE, or_none=True)
        super()._check()
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                f"{name}: sync_ref_model changes the reference, which precompute_ref_log_probs computes "
                "only once; choose one"
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                f"{name}: train_sampling_strategy must be 'random', 'sequential' or 'group_by_length', got "
                "'batch_rebalance', which balances padding; max_tokens_per_batch balances tokens"
            )
        if self.padding_free and not self.shared_prompt:
            warn_of(self, "padding_free needs shared_prompt, which is False: batches are padded")
        check_choice(name, "truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
        if self.truncation_mode == "keep_end":
            raise ValueError(
                f"{name}: truncation_mode must be 'keep_start', got 'keep_end', which cuts the prompt of the "
                "longer response shorter than the other's, so that the two no longer answer the same; "
                "shorten prompts in the data"
            )


@documented
@dataclass
class DPOConfig(PreferenceConfig):
    """Options of `DPOTrainer`.

    Args:
        loss_type: one or several of the pair losses of `pyfast_dpo.preference_loss`, such as sigmoid, ipo,
            simpo; kept as a list.
        loss_weights: of several losses, one number each, 1 by default.
        label_smoothing: in [0, 0.5), the assumed share of flipped preferences ("sigmoid" is then cDPO).
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
        f_alpha_divergence_coef: the alpha of "alpha_divergence".
        discopop_tau: > 0, temperature of "discopop".
        simpo_gamma: target margin of "simpo" and "alphapo", in units of the reward.
        alphapo_alpha: shape of the reward of "alphapo"; 0 is "simpo".
        cpo_alpha: weight of the chosen response's "sft" loss in "cpo".
        rpo_alpha: weight of an "sft" loss added to whatever the losses are (RPO).
        ld_alpha: in [0, 1], the weight of a response's tokens beyond the length of the other one
            (`pyfast_dpo.ld_row_weights`); None for 1.
        use_weighting: weigh pairs by the policy's own probability of the responses (WPO,
            `pyfast_dpo.wpo_weights`); costs one more product of the lm_head.
        Others: as in `PreferenceConfig` and `transformers.TrainingArguments`.

    Raises:
        ValueError: an option out of its range, or two that do not go together.
    """

    loss_type: str | list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    alphapo_alpha: float = 0.25
    cpo_alpha: float = 1.0
    rpo_alpha: float = 0.0
    ld_alpha: float | None = None
    use_weighting: bool = False

    def __post_init__(self) -> None:
        check_pair_options("DPOConfig", **self.loss_options())
        if self.ld_alpha is not None:
            ld_row_weights((), self.ld_alpha)  # checks it
        if self.use_weighting and couples_batch(self.loss_type):
            raise ValueError(
                f"DPOConfig: use_weighting weighs pairs, which loss_type {self.loss_type!r} sorts apart"
            )
        self.loss_type = list(loss_names(self.loss_type))
        super().__post_init__()

    def loss_options(self) -> dict[str, Any]:
        """The options of `preference_loss`."""
        names = [f.name for f in fields(DPOConfig) if f.name not in _NOT_OF_THE_LOSS]
        return {name: getattr(self, name) for name in ("beta", *names)}


@documented
@dataclass
class KTOConfig(PreferenceConfig):
    """Options of `KTOTrainer`.

    Args:
        loss_type: "kto" or "apo_zero_unpaired", of `pyfast_dpo.unpaired_loss`.
        desirable_weight: >= 0, of desirable responses in the loss.
        undesirable_weight: >= 0, of undesirable responses in the loss.
        clamp_kl: the KL estimate not below 0, as in the authors' code.
        Others: as in `PreferenceConfig` and `transformers.TrainingArguments`.

    Raises:
        ValueError: an option out of its range.
    """

    loss_type: str = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    clamp_kl: bool = True

    def __post_init__(self) -> None:
        check_choice("KTOConfig", "loss_type", self.loss_type, KTO_LOSSES)
        check_weight("KTOConfig", "desirable_weight", self.desirable_weight)
        check_weight("KTOConfig", "undesirable_weight", self.undesirable_weight)
        super().__post_init__()


_NOT_OF_THE_LOSS = {f.name for f in fields(PreferenceConfig)} | {"ld_alpha", "use_weighting"}
