"""TRL's GRPO and RLOO on the same responses: losses, metrics and weights, step by step."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl
from canned_engine import CannedEngine, TruthfulEngine, longer, make_prompts, response, vowels
from tiny_models import make_model, make_tokenizer

from pyfast_dpo import trainers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

STEPS = 5
METRICS = (
    "loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std", "rewards/vowels/mean", "rewards/longer/std",
    "completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio",
    "completions/mean_terminated_length", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean",
    "clip_ratio/low_min", "clip_ratio/high_max", "clip_ratio/region_mean",
)  # fmt: skip


def run(library, kind, tmp_path, **options):
    """(log entries, final weights) of a script that differs in its import alone, but for what plays the responses."""
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = getattr(library, f"{kind}Config")(
        output_dir=str(tmp_path / library.__name__), max_steps=STEPS, logging_steps=1, learning_rate=0.5, optim="sgd",
        lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
        gradient_checkpointing=False, shuffle_dataset=False, max_completion_length=8, num_generations=4,
        per_device_train_batch_size=8, max_grad_norm=100.0, **options,
    )  # fmt: skip

    def rollout_func(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        completions = [
            response(each, i % 4, trainer.state.global_step) for i, each in enumerate(ids)
        ]
        return {
            "prompt_ids": ids,
            "completion_ids": completions,
            "logprobs": [[-1.0] * len(each) for each in completions],
        }

    player = {"engine": TruthfulEngine() if kind == "RLOO" else CannedEngine()}
    if library is trl:
        player = {"rollout_func": rollout_func} if kind == "GRPO" else {}
    trainer = getattr(library, f"{kind}Trainer")(
        model=str(folder),
        reward_funcs=[vowels, longer],
        args=config,
        train_dataset=datasets.Dataset.from_list(make_prompts()),
        **player,
    )
    if library is trl and kind == "RLOO":  # which takes no rollout_func
        trainer._generate_single_turn = lambda ids, *_: [
            response(each, i % 4, trainer.state.global_step) for i, each in enumerate(ids)
        ]
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return entries, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(kind, tmp_path, metrics, **options) -> None:
    ours, our_weights = run(trainers, kind, tmp_path, **options)
    theirs, their_weights = run(trl, kind, tmp_path, **options)
    assert len(ours) == len(theirs) == STEPS
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert mine.keys() & set(metrics) == other.keys() & set(
            metrics
        )  # rollout metrics, where there was one
        for name in mine.keys() & set(metrics):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (
                f"step {step}: {name}"
            )
    start = dict(make_model().named_parameters())
    for name, weight in their_weights.items():
        moved = (weight - start[name]).abs().max()
        apart = (our_weights[name] - weight).abs().max()
        assert apart <= 1e-4 * moved + 1e-7, (
            f"{name}: {float(apart):.2g} apart, moved {float(moved):.2g}"
        )


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo"},
        {"loss_type": "bnpo"},
        {"loss_type": "dr_grpo"},
        {"loss_type": "sapo"},
        {"loss_type": "vespo"},
        {
            "loss_type": "cispo",
            "epsilon_high": 5.0,
        },  # TRL's default of 0.2 scales the gradient by 0.2
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},  # GSPO
        {"loss_type": "dapo", "beta": 0.3},
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
        {"loss_type": "dapo", "scale_rewards": "batch"},
        {"loss_type": "dapo", "scale_rewards": False, "delta": 1.5},
        {"loss_type": "dapo", "multi_objective_aggregation": "normalize_then_sum"},
        {"loss_type": "dapo", "reward_weights": [1.0, 0.25], "temperature": 0.7},
        {"loss_type": "dapo", "entropy_coef": 0.05},
    ],
    ids=str,
)
def test_grpo_is_trl_s_with_two_passes_over_every_rollout(options, tmp_path) -> None:
    metrics = METRICS
    if options.get("importance_sampling_level") == "sequence":  # TRL counts sequences, not tokens
        metrics = tuple(name for name in METRICS if not name.startswith("clip_ratio"))
    if options.get("use_bias_correction_kl") is False:  # TRL's metric has the correction, too
        metrics = (*metrics, "kl")
    assert_same("GRPO", tmp_path, metrics, num_iterations=2, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.3},
        {"normalize_advantages": True, "num_iterations": 2},
    ],
    ids=str,
)
def test_rloo_is_trl_s(options, tmp_path) -> None:
    metrics = tuple(name for name in METRICS if not name.startswith("clip_ratio"))
    assert_same("RLOO", tmp_path, metrics, **options)
