"""Options of the on-policy trainers: TRL's names, checked at construction."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pyfast_dpo.losses.advantages import SCALES
from pyfast_dpo.losses.correction import MODES
from pyfast_dpo.losses.policy_table import POLICY_LOSSES, check_policy_options
from pyfast_dpo.ops.checks import check_choice, check_number, check_weight
from pyfast_dpo.rollout import Sampling
from pyfast_dpo.trainers.flags import documented
from pyfast_dpo.trainers.options import PolicyConfig, check_positive_options, warn_of

ENGINES = "give the trainer an engine, such as engine=pyfast_dpo.rollout.HTTPEngine(...)"
# Options of TRL that would change a result and are not here: (the value that means "not", what works instead).
REFUSED: dict[str, tuple[Any, str]] = {
    "use_vllm": (False, ENGINES),
    "use_transformers_continuous_batching": (False, ENGINES),
    "repetition_penalty": (1.0, "it changes the distribution, so that its log-probs are not the policy's"),
    "auto_find_batch_size": (False, "lower per_device_train_batch_size; groups must stay whole"),
    "top_entropy_quantile": (1.0, "all tokens are trained"),
    "use_adaptive_entropy": (False, "a callback may set args.entropy_coef"),
    "off_policy_mask_threshold": (None, "vllm_importance_sampling_mode masks sequences"),
    "vllm_importance_sampling_clip_min": (None, "ratios are bounded above"),
    "max_tool_calling_iterations": (None, "an engine of your own may call tools"),
    "log_completions_hub_repo": (None, "completions are in files under output_dir"),
}  # fmt: skip
# Options of TRL that change no result here.
WITHOUT_MEANING = (
    "cache_implementation", "cast_lm_head_to_fp32", "ds3_gather_for_generation", "log_multimodal",
    "transformers_continuous_batching_config", "vllm_mode", "vllm_server_base_url", "vllm_server_host",
    "vllm_server_port",
)  # fmt: skip


@documented
@dataclass
class OnlineConfig(PolicyConfig):
    """What the options of the on-policy trainers share.

    A rollout is the responses that are written at a time: `generation_batch_size` of them over all processes, each
    prompt `num_generations` times. It serves `steps_per_generation` batches of `per_device_train_batch_size`
    responses a process, `num_iterations` times over.

    Args:
        num_generations: responses to each prompt, a group.
        num_generations_eval: the same in evaluation; by default as in training.
        max_completion_length: the most tokens of a response.
        generation_batch_size: responses of a rollout, over all processes; or
        steps_per_generation: its batches; by default `gradient_accumulation_steps`, a rollout for every step.
        num_iterations: how often a rollout is trained on.
        shuffle_dataset: prompts in a new order every epoch, else in that of the data.
        temperature: > 0, of the sampler and of the loss.
        top_p: the likeliest tokens that hold this share; 1: all. Below 1 the ratios are of the whole distribution,
            so their mean is below 1.
        top_k: that many of the likeliest tokens; 0: all.
        min_p: tokens with at least this share of the likeliest one's probability.
        generation_kwargs: `{"stop_token_ids": [...]}` ends responses with other tokens than the model's.
        beta: >= 0, weight of the KL penalty against the reference; 0: no reference.
        epsilon: how far a ratio may fall below 1.
        epsilon_high: how far above; None: as far.
        entropy_coef: >= 0, weight of a bonus on the mean entropy of the tokens.
        reward_weights: one number a reward function, 1 by default.
        mask_truncated_completions: responses that were cut at `max_completion_length` are not trained on; their
            rewards count in their group.
        resample_zero_variance: groups whose rewards are all equal teach nothing; they are written again at most so
            many times.
        max_rollout_rows: responses that the engine in this process writes at a time.
        vllm_importance_sampling_correction: weigh tokens by the ratio of the trainer's probability to the engine's,
            for engines of another precision; costs one pass more.
        vllm_importance_sampling_mode: "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask".
        vllm_importance_sampling_clip_max: the largest ratio.
        log_completions: print a table of responses at every log step, and keep all in `completions/*.parquet`.
        num_completions_to_print: the most in the table; None: 10.
        log_unique_prompts: each prompt once in the table.
        Others: as in `PolicyConfig`; TRL's options of vLLM have no meaning here, those of another result are refused.
    """

    _VALID_DICT_FIELDS = [*PolicyConfig._VALID_DICT_FIELDS, "generation_kwargs"]  # noqa: RUF012

    remove_unused_columns: bool = False
    num_generations: int = 8
    num_generations_eval: int | None = None
    max_completion_length: int = 512
    generation_batch_size: int | None = None
    steps_per_generation: int | None = None
    num_iterations: int = 1
    shuffle_dataset: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    generation_kwargs: dict[str, Any] | str | None = None
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    entropy_coef: float = 0.0
    reward_weights: list[float] | None = None
    mask_truncated_completions: bool = False
    resample_zero_variance: int = 0
    max_rollout_rows: int = 64
    vllm_importance_sampling_correction: bool = False
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_max: float = 3.0
    log_completions: bool = False
    num_completions_to_print: int | None = None
    log_unique_prompts: bool = False
    use_vllm: bool = False
    use_transformers_continuous_batching: bool = False
    repetition_penalty: float = 1.0
    top_entropy_quantile: float = 1.0
    use_adaptive_entropy: bool = False
    off_policy_mask_threshold: float | None = None
    vllm_importance_sampling_clip_min: float | None = None
    max_tool_calling_iterations: int | None = None
    log_completions_hub_repo: str | None = None
    cache_implementation: str | None = None
    cast_lm_head_to_fp32: bool = False
    ds3_gather_for_generation: bool = True
    log_multimodal: bool = True
    transformers_continuous_batching_config: dict[str, Any] | str | None = None
    vllm_mode: str = "colocate"
    vllm_server_base_url: str | None = None
    vllm_server_host: str = "0.0.0.0"
    vllm_server_port: int = 8000

    def __post_init__(self) -> None:
        super().__post_init__()
        self._size_rollouts()
        self.sampling()  # checks its options

    def sampling(self, seed: int | None = None) -> Sampling:
        """How responses are drawn."""
        given = self._dict("generation_kwargs")
        unknown = sorted(given.keys() - {"stop_token_ids"})
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: generation_kwargs takes stop_token_ids alone, got {unknown}; temperature, "
                "top_p, top_k and min_p are options of their own"
            )
        stops = given.get("stop_token_ids")
        if stops is not None and not (
            isinstance(stops, list | tuple) and all(isinstance(token, int) for token in stops)
        ):
            raise ValueError(
                f"{type(self).__name__}: stop_token_ids of generation_kwargs must be a list of token ids, got {stops!r}"
            )
        return Sampling(
            self.max_completion_length,
            self.temperature,
            self.top_p,
            self.top_k,
            self.min_p or 0.0,
            None if stops is None else tuple(stops),
            seed,
        )

    def loss_options(self) -> dict[str, Any]:
        """The options of `policy_loss` beside the tensors."""
        raise NotImplementedError

    @property
    def groups_per_rollout(self) -> int:
        """Prompts of a rollout, over all processes."""
        assert self.generation_batch_size is not None
        return self.generation_batch_size // self.num_generations

    def _check(self) -> None:
        name = type(self).__name__
        super()._check()
        for option, (neutral, instead) in REFUSED.items():
            if getattr(self, option) != neutral:
                raise ValueError(
                    f"{name}: {option} must be {neutral!r}, got {getattr(self, option)!r}: {instead}"
                )
        for f in fields(self):
            if f.name in WITHOUT_MEANING and getattr(self, f.name) != f.default:
                warn_of(self, f"{f.name} has no meaning here")
        check_positive_options(
            self, ("num_generations", "max_completion_length", "num_iterations", "max_rollout_rows")
        )
        optional = ("num_generations_eval", "generation_batch_size", "steps_per_generation")
        check_positive_options(self, (*optional, "num_completions_to_print"), or_none=True)
        check_weight(name, "beta", self.beta)
        check_weight(name, "entropy_coef", self.entropy_coef)
        tries = self.resample_zero_variance
        if not isinstance(tries, int) or tries < 0:
            raise ValueError(
                f"{name}: resample_zero_variance must be a number of tries, got {tries!r}"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"{name}: temperature must be positive (the loss divides logits by it), got {self.temperature}"
            )
        check_choice(
            name, "vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, MODES
        )
        check_number(
            name, "vllm_importance_sampling_clip_max", self.vllm_importance_sampling_clip_max
        )

    def _size_rollouts(self) -> None:
        name = type(self).__name__
        batch = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError(
                f"{name}: generation_batch_size and steps_per_generation say the same; give one of them"
            )
        if self.generation_batch_size is None:
            self.steps_per_generation = (
                self.steps_per_generation or self.gradient_accumulation_steps
            )
            self.generation_batch_size = batch * self.steps_per_generation
        elif self.generation_batch_size % batch:
            raise ValueError(
                f"{name}: generation_batch_size must be a multiple of the {batch} responses of a batch over all "
                f"processes, got {self.generation_batch_size}"
            )
        else:
            self.steps_per_generation = self.generation_batch_size // batch
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"{name}: a rollout of {self.generation_batch_size} responses (per_device_train_batch_size x processes x "
                f"steps_per_generation) must be a multiple of num_generations, got {self.num_generations}"
            )


_CLIPPED = ("epsilon", "epsilon_high", "delta")
_OF_ONE_LOSS = (
    "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
)  # fmt: skip


@documented
@dataclass
class GRPOConfig(OnlineConfig):
    """Options of `GRPOTrainer`.

    Args:
        loss_type: of `pyfast_dpo.policy_loss`: "grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo", "vespo",
            "reinforce", "ppo". For "cispo" `epsilon_high` is the largest ratio itself, 5 by default.
        importance_sampling_level: "token", or "sequence" (GSPO).
        delta: the largest ratio where the advantage is negative; None: none.
        scale_rewards: "group" (or True), "batch", "none" (or False): what advantages are divided by.
        multi_objective_aggregation: "sum_then_normalize", or "normalize_then_sum" (GDPO): several rewards are scaled
            in their groups before they are added up, and the sum over the batch after it.
        use_bias_correction_kl: the KL penalty times the ratio (DeepSeek-V3.2).
        sapo_temperature_pos, sapo_temperature_neg: of "sapo".
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of "vespo".
        Others: as in `OnlineConfig` and `transformers.TrainingArguments`.

    Raises:
        ValueError: an option out of its range, or two that do not go together.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    delta: float | None = None
    scale_rewards: str = "group"  # or a bool, as TRL takes
    multi_objective_aggregation: str = "sum_then_normalize"
    use_bias_correction_kl: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        words = {"true": "group", "false": "none"}
        self.scale_rewards = words.get(str(self.scale_rewards).lower(), self.scale_rewards)
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        name = type(self).__name__
        check_choice(name, "scale_rewards", self.scale_rewards, SCALES)
        aggregations = ("sum_then_normalize", "normalize_then_sum")
        check_choice(
            name, "multi_objective_aggregation", self.multi_objective_aggregation, aggregations
        )
        if self.num_generations < 2:
            raise ValueError(
                f"{name}: num_generations must be at least 2, since an advantage compares with the rest of the group, "
                f"got {self.num_generations}"
            )
        options = self.loss_options()
        check_policy_options(name, options.pop("loss_type"), options.pop("level"), **options)

    def loss_options(self) -> dict[str, Any]:
        """The options of `policy_loss` that this loss takes; one of another loss must be at its default."""
        check_choice(type(self).__name__, "loss_type", self.loss_type, tuple(POLICY_LOSSES))
        spec = POLICY_LOSSES[self.loss_type]
        options = {
            name: getattr(self, name) for name in (*_CLIPPED, *_OF_ONE_LOSS) if name in spec.options
        }
        for f in fields(GRPOConfig):
            if f.name in (*_OF_ONE_LOSS, "delta") and f.name not in spec.options:
                if getattr(self, f.name) != f.default:
                    raise ValueError(
                        f"{type(self).__name__}: {f.name} is not an option of loss_type {self.loss_type!r}, got "
                        f"{getattr(self, f.name)}"
                    )
        return {
            "loss_type": self.loss_type,
            "level": self.importance_sampling_level,
            "beta": self.beta,
            "use_bias_correction_kl": self.use_bias_correction_kl and self.beta > 0,
            **options,
        }


@documented
@dataclass
class RLOOConfig(OnlineConfig):
    """Options of `RLOOTrainer`.

    Args:
        num_generations: responses to each prompt; the others' mean reward is the baseline of each.
        beta: >= 0, the weight of KL(policy || reference) in the reward.
        normalize_advantages: to mean 0 and deviation 1 over the rollout.
        reward_clip_range: (least, most) of a reward; None: as it is.
        Others: as in `OnlineConfig` and `transformers.TrainingArguments`.

    Raises:
        ValueError: an option out of its range.
    """

    num_generations: int = 2
    beta: float = 0.05
    normalize_advantages: bool = False
    reward_clip_range: list[float] | None = None

    def _check(self) -> None:
        super()._check()
        name = type(self).__name__
        if self.num_generations < 2:
            raise ValueError(
                f"{name}: num_generations must be at least 2, the baseline being the others' rewards, got "
                f"{self.num_generations}"
            )
        given = self.reward_clip_range
        if given is not None and (
            not isinstance(given, list | tuple) or len(given) != 2 or not given[0] < given[1]
        ):
            raise ValueError(f"{name}: reward_clip_range must be (least, most), got {given}")
        check_policy_options(
            name, "rloo", "sequence", epsilon=self.epsilon, epsilon_high=self.epsilon_high
        )

    def loss_options(self) -> dict[str, Any]:
        """The penalty is in the reward."""
        return {
            "loss_type": "rloo",
            "level": "sequence",
            "epsilon": self.epsilon,
            "epsilon_high": self.epsilon_high,
        }
