"""On-policy steps: one gradient however a step is cut, what is not computed, what repeats and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from canned_engine import EOS, LETTERS, CannedEngine, longer, make_prompts, vowels
from tiny_models import CHAT_TEMPLATE, make_model, make_tokenizer
from trainer_runs import lora, train_log

from pyfast_dpo.rollout import Completion
from pyfast_dpo.trainers import (
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TESTS = Path(__file__).parents[1]
KINDS = [
    pytest.param(GRPOTrainer, GRPOConfig, {"beta": 0.1}, id="GRPO"),
    pytest.param(RLOOTrainer, RLOOConfig, {"beta": 0.1, "num_generations": 4}, id="RLOO"),
    pytest.param(PPOTrainer, PPOConfig, {"num_generations": 4}, id="PPO"),
]


def make_trainer(kind, options_of, folder, rewards=(vowels, longer), rows=None, **options):
    arguments = {
        "engine": CannedEngine(),
        "peft_config": None,
        "model": make_model(),
        "eval_dataset": None,
    }
    arguments.update({name: options.pop(name) for name in [*arguments] if name in options})
    args = options_of(**{
        "output_dir": str(folder), "num_generations": 4, "max_completion_length": 8, "per_device_train_batch_size": 16,
        "learning_rate": 0.3, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 100.0, "max_steps": 3,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "gradient_checkpointing": False, **options,
    })  # fmt: skip
    return kind(
        reward_funcs=list(rewards), args=args, train_dataset=make_prompts() if rows is None else rows,
        processing_class=make_tokenizer(), **arguments,
    )  # fmt: skip


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal_runs(one, other, rel=2e-4):
    for first, second in zip(train_log(one), train_log(other), strict=True):
        for name in first.keys() & {
            "loss",
            "grad_norm",
            "reward",
            "entropy",
            "kl",
            "loss/value_avg",
        }:
            assert second[name] == pytest.approx(first[name], rel=rel, abs=1e-6), name
    for (name, mine), theirs in zip(
        weights_of(one).items(), weights_of(other).values(), strict=True
    ):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5, msg=name)


# One gradient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options_of, options", KINDS)
@pytest.mark.parametrize("shared_prompt", [True, False])
def test_a_step_cut_into_other_batches_is_the_same_step(
    kind, options_of, options, shared_prompt, tmp_path
) -> None:
    """Groups stay whole where a batch is smaller than one; the loss is divided by a number of the whole step."""
    whole = make_trainer(kind, options_of, tmp_path, **options)
    for batch, accumulated in ((8, 2), (2, 8)):
        cut = make_trainer(
            kind, options_of, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
            shared_prompt=shared_prompt, **options,
        )  # fmt: skip
        assert_equal_runs(whole, cut)
        whole = make_trainer(kind, options_of, tmp_path, **options)


RUN = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/trainers"]
import torch
torch.set_num_threads(1)
from test_online import GRPOConfig, GRPOTrainer, make_trainer, train_log

trainer = make_trainer(GRPOTrainer, GRPOConfig, sys.argv[2], **json.loads(sys.argv[3]))
log = train_log(trainer)
if trainer.is_world_process_zero():
    json.dump(log, open(sys.argv[2] + "/log.json", "w"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_take_the_steps_of_one(tmp_path) -> None:
    """Three groups over two processes, so that one group is cut between them, and the other process has more tokens."""
    options = {"num_iterations": 2, "max_steps": 4, "beta": 0.1}
    one = train_log(
        make_trainer(GRPOTrainer, GRPOConfig, tmp_path, per_device_train_batch_size=12, **options)
    )
    (tmp_path / "run.py").write_text(RUN)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "run.py"),
            str(TESTS), str(tmp_path), json.dumps({"per_device_train_batch_size": 6, **options}),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "log.json").read_text())
    for first, second in zip(one, two, strict=True):
        for name in first.keys() - {"tokens_per_second", "epoch"}:
            assert second[name] == pytest.approx(first[name], rel=2e-4, abs=1e-6), name


# What is not computed -----------------------------------------------------------------------------------


def test_groups_without_variance_are_counted_and_cost_no_pass(tmp_path, monkeypatch) -> None:
    """Their advantages are 0: the step is that of the other groups, divided by the tokens of all."""

    def by_prompt(prompts, completion_ids, **others):
        """One reward for every response to the second of two prompts."""
        return [
            float(len(ids)) if len(prompt) % 2 else 1.0
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    rows = [{"prompt": "a b"}, {"prompt": "a bb"}] * 4  # 3 and 4 characters
    passes = []
    trainer = make_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, [by_prompt], rows, max_steps=1, shuffle_dataset=False
    )
    collate = trainer._collate
    monkeypatch.setattr(
        trainer, "_collate", lambda responses: passes.append(responses) or collate(responses)
    )
    (entry,) = train_log(trainer)
    assert entry["frac_reward_zero_std"] == 0.5
    (responses,) = passes
    assert {len(each.prompt_ids) for each in responses} == {2}, "of the first prompt alone"


def test_a_step_without_any_variance_leaves_the_weights_and_goes_on(tmp_path) -> None:
    trainer = make_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, [lambda prompts, **_: [1.0] * len(prompts)]
    )
    before = weights_of(trainer)
    log = train_log(trainer)
    assert [entry["grad_norm"] for entry in log] == [0.0] * 3
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(trainer).items())


def test_groups_without_variance_are_written_again_as_often_as_asked(tmp_path) -> None:
    writings = []

    class Dull(CannedEngine):
        """Says the same four times, but for the third time it is asked."""

        def generate(self, prompts, n, sampling):
            writings.append(len(prompts))
            if len(writings) < 3:
                return [[self._completion([5, EOS])] * n for _ in prompts]
            return super().generate(prompts, n, sampling)

    trainer = make_trainer(
        GRPOTrainer,
        GRPOConfig,
        tmp_path,
        [longer],
        engine=Dull(),
        resample_zero_variance=2,
        max_steps=1,
    )
    (entry,) = train_log(trainer)
    assert writings[:3] == [4, 4, 4] and entry["frac_reward_zero_std"] < 1


def test_truncated_responses_are_left_out_of_the_loss_but_not_of_the_baseline(tmp_path) -> None:
    trainer = make_trainer(
        GRPOTrainer,
        GRPOConfig,
        tmp_path,
        [longer],
        mask_truncated_completions=True,
        loss_type="dapo",
    )
    seen = []
    judge = trainer._judge

    def judged(responses, table, first, group):
        judge(responses, table, first, group)
        seen.extend(responses)

    trainer._judge = judged
    train_log(trainer)
    cut = [each for each in seen if each.truncated]
    assert cut and all(each.length == 0 for each in cut)
    assert any(each.constants["advantages"].abs().sum() > 0 for each in cut), "they are judged"
    assert not any(trainer._teaches(each) for each in cut)


def test_empty_responses_train_nothing_and_end_nothing(tmp_path) -> None:
    def write(prompt, place, version):
        return [] if place % 2 else [LETTERS[place], EOS]

    trainer = make_trainer(GRPOTrainer, GRPOConfig, tmp_path, [longer], engine=CannedEngine(write))
    log = train_log(trainer)
    assert all(entry["grad_norm"] > 0 and entry["completions/min_length"] == 0 for entry in log)
    everything = make_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, [longer], engine=CannedEngine(lambda *_: [])
    )
    assert [entry["grad_norm"] for entry in train_log(everything)] == [0.0] * 3


# The ratio ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_first_pass_has_a_ratio_of_exactly_one_and_sampler_and_trainer_agree(
    temperature, tmp_path
) -> None:
    """With the model itself as the engine; the difference is logged."""
    trainer = make_trainer(
        GRPOTrainer,
        GRPOConfig,
        tmp_path,
        engine=None,
        temperature=temperature,
        generation_kwargs={"stop_token_ids": [EOS]},
    )
    ratios = []
    add = trainer._add_metrics
    trainer._add_metrics = lambda m, i, result: ratios.append(result.ratios) or add(m, i, result)
    for entry in train_log(trainer):
        assert entry["sampling/sampling_logp_difference/max"] < 1e-5
        assert entry["clip_ratio/region_mean"] == 0
    assert all(bool((ratio == 1).all()) for ratio in ratios)


def test_an_engine_of_another_precision_is_corrected(tmp_path) -> None:
    """The canned engine says -1 of every token, the policy about -3.5: ratios far below 1."""
    trainer = make_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_truncate", max_steps=1,
    )  # fmt: skip
    (entry,) = train_log(trainer)
    assert 0.05 < entry["sampling/importance_sampling_ratio/mean"] < 0.2
    assert entry["sampling/importance_sampling_ratio/max"] < 1
    (plain,) = train_log(make_trainer(GRPOTrainer, GRPOConfig, tmp_path, max_steps=1))
    assert entry["grad_norm"] < 0.2 * plain["grad_norm"]


# What repeats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options_of, options", KINDS)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    kind, options_of, options, tmp_path
) -> None:
    """Stopped within a rollout, which is in the checkpoint; the optimizer has momentum."""
    settings = {
        "engine": None, "generation_kwargs": {"stop_token_ids": [EOS]}, "max_steps": 6, "save_strategy": "steps",
        "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2, **options,
        **({"num_ppo_epochs": 2} if kind is PPOTrainer else {"num_iterations": 2}),
    }  # fmt: skip
    whole = make_trainer(kind, options_of, tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(kind, options_of, tmp_path / "again", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, mine), theirs in zip(
        weights_of(whole).items(), weights_of(resumed).values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    last = [[e for e in t.state.log_history if "loss" in e][-1] for t in (whole, resumed)]
    for name in last[0].keys() - {"tokens_per_second"}:
        assert last[0][name] == last[1][name], name


def test_a_saved_policy_is_one_that_everybody_loads_and_the_critic_lies_beside_it(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(PPOTrainer, PPOConfig, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits)
    assert (tmp_path / "saved" / "critic.safetensors").exists()


@pytest.mark.parametrize("kind, options_of, options", KINDS)
def test_an_adapter_learns_and_its_base_is_the_reference(
    kind, options_of, options, tmp_path
) -> None:
    trainer = make_trainer(
        kind, options_of, tmp_path, peft_config=lora(), learning_rate=1.0, **options
    )
    before = weights_of(trainer)
    log = train_log(trainer)
    after = weights_of(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora" in name or "critic" in name for name in moved)
    assert log[0].keys() & {"kl"} and trainer.ref_model is None


def test_evaluation_has_the_same_random_numbers_every_time(tmp_path) -> None:
    trainer = make_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, engine=None, eval_dataset=make_prompts(5), num_generations_eval=2,
        generation_kwargs={"stop_token_ids": [EOS]},
    )  # fmt: skip
    first, second = trainer.evaluate(), trainer.evaluate()
    assert {name for name in first if first[name] != second[name]} == {"eval_runtime"}
    assert {
        "eval_reward",
        "eval_loss",
        "eval_completions/mean_length",
        "eval_entropy",
    } <= first.keys()
    assert trainer.model.training is False  # as it came


def test_an_engine_gets_the_weights_once_an_evaluation(tmp_path) -> None:
    """However many batches of prompts it has: to send them may take seconds."""
    sent = []

    class Engine(CannedEngine):
        def update_weights(self, model, version):
            sent.append(version)
            super().update_weights(model, version)

    trainer = make_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, engine=Engine(), eval_dataset=make_prompts(5),
        per_device_eval_batch_size=4, max_steps=2,
    )  # fmt: skip
    trainer.evaluate()
    trainer.train()
    assert sent == [0, 0, 1]


# Rewards --------------------------------------------------------------------------------------------------


def test_rewards_get_the_columns_of_their_rows_and_may_be_async_or_answer_none(tmp_path) -> None:
    numbers = []

    async def slow(prompts, completions, completion_ids, number, **others):
        numbers.extend(number)
        return [float(n) if n % 2 else None for n in number]

    rows = make_prompts(8)
    trainer = make_trainer(
        GRPOTrainer, GRPOConfig, tmp_path, [slow, vowels], rows, shuffle_dataset=False, max_steps=1
    )
    (entry,) = train_log(trainer)
    assert numbers[:16] == [n for n in range(4) for _ in range(4)]
    assert entry["rewards/slow/mean"] == 2.0  # of 1 and 3; None does not count


def test_messages_are_answered_by_messages(tmp_path) -> None:
    seen = []

    def shape(completions, **others):
        seen.extend(completions)
        return [float(len(c[0]["content"])) for c in completions]

    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in make_prompts()]
    trainer = GRPOTrainer(
        make_model(), shape,
        GRPOConfig(
            str(tmp_path), num_generations=4, max_completion_length=8, per_device_train_batch_size=8, max_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=rows, processing_class=tokenizer, engine=CannedEngine(),
    )  # fmt: skip
    trainer.train()
    assert seen and all(
        c[0]["role"] == "assistant" and "<eos>" not in c[0]["content"] for c in seen
    )


def test_completions_are_logged_as_a_table_and_kept_as_files(tmp_path, capsys) -> None:
    datasets = pytest.importorskip("datasets")
    trainer = make_trainer(
        GRPOTrainer,
        GRPOConfig,
        tmp_path,
        log_completions=True,
        num_completions_to_print=3,
        max_steps=2,
    )
    trainer.train()
    assert "completion" in capsys.readouterr().out
    files = sorted((tmp_path / "completions").glob("*.parquet"))
    assert len(files) == 2
    table = datasets.Dataset.from_parquet(str(files[0]), cache_dir=str(tmp_path / "cache"))
    assert len(table) == 16
    assert {"step", "prompt", "completion", "vowels", "longer", "advantage"} <= set(
        table.column_names
    )


# What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"per_device_train_batch_size": 6}, "must be a multiple of num_generations"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 1.5}, "top_p"),
        ({"loss_type": "cispo", "epsilon_high": 0.2}, "scale every gradient"),
        ({"loss_type": "luspo"}, "level 'sequence'"),
        ({"sapo_temperature_pos": 2.0}, "not an option of loss_type 'dapo'"),
        ({"use_vllm": True}, "HTTPEngine"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
        ({"generation_batch_size": 24}, "multiple of the 16 responses"),
        ({"generation_batch_size": 32, "steps_per_generation": 2}, "say the same"),
        ({"scale_rewards": "prompt"}, "scale_rewards"),
        ({"scale_rewards": None}, "scale_rewards"),
        ({"resample_zero_variance": 0.5}, "a number of tries, got 0.5"),
        ({"generation_kwargs": {"stop_token_ids": "a"}}, "a list of token ids, got 'a'"),
        ({"num_generations": "8"}, "num_generations must be positive, got '8'"),
        ({"reward_weights": [1.0, float("nan")]}, "must be finite, got nan"),
        ({"reward_weights": "ab"}, "one number for each of 2"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_by_name(options, words, tmp_path) -> None:
    with pytest.raises(ValueError, match=words):
        make_trainer(GRPOTrainer, GRPOConfig, tmp_path, **options)


class Faulty(CannedEngine):
    def __init__(self, fault) -> None:
        super().__init__()
        self._fault = fault

    def generate(self, prompts, n, sampling):
        answers = super().generate(prompts, n, sampling)
        first = answers[0][0]
        if self._fault == "fewer":
            return [answer[:-1] for answer in answers]
        answers[0][0] = {
            "version": Completion(first.ids, first.logprobs, "stop", first.version - 1),
            "lengths": Completion(first.ids, first.logprobs[1:], "stop", first.version),
            "nan": Completion(first.ids, [float("nan")] * len(first.ids), "stop", first.version),
            "long": Completion([5] * 9, [-1.0] * 9, "length", first.version),
        }[self._fault]
        return answers


@pytest.mark.parametrize(
    "fault, words",
    [
        ("fewer", "must write 4 responses"),
        ("version", "of the weights of version 0, got version -1"),
        ("lengths", "a log-prob for each"),
        ("nan", "log-probs of at most 0, got nan"),
        ("long", "at most 8 tokens"),
    ],
)
def test_nothing_is_trained_on_what_an_engine_should_not_have_said(fault, words, tmp_path) -> None:
    trainer = make_trainer(GRPOTrainer, GRPOConfig, tmp_path, engine=Faulty(fault))
    before = weights_of(trainer)
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(trainer).items())


def test_prompts_that_leave_no_room_for_a_response_are_left_out_and_counted(tmp_path) -> None:
    rows = [{"prompt": " ".join("a" * 57)}, *make_prompts()]  # 64 positions, 8 for the response
    trainer = make_trainer(GRPOTrainer, GRPOConfig, tmp_path, rows=rows)
    assert len(trainer.train_dataset) == 16
    assert trainer.train_dataset.report.dropped == {"prompt not shorter than max_length 57": [1]}


def test_a_model_without_room_for_a_response_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="room for a prompt in the model's 64 positions, got 64"):
        make_trainer(GRPOTrainer, GRPOConfig, tmp_path, max_completion_length=64)


def test_plain_strings_for_a_tokenizer_of_chats_are_told_about(tmp_path) -> None:
    with pytest.warns(UserWarning, match="get no chat template"):
        GRPOTrainer(
            make_model(), vowels, GRPOConfig(str(tmp_path), use_cpu=True, report_to=[], max_completion_length=8), make_prompts(),
            processing_class=make_tokenizer(CHAT_TEMPLATE),
        )  # fmt: skip


def test_several_datasets_are_told_apart(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"must be one dataset, got a dict of \['a', 'b'\]"):
        make_trainer(
            GRPOTrainer, GRPOConfig, tmp_path, rows={"a": make_prompts(), "b": make_prompts()}
        )


def test_a_column_that_only_some_rows_have_is_none_in_the_others(tmp_path) -> None:
    seen = []

    def reward(completions, hint, **others):
        seen.extend(hint)
        return [0.0] * len(completions)

    rows = [*make_prompts(2), *({**row, "hint": "h"} for row in make_prompts(2))]
    train_log(make_trainer(GRPOTrainer, GRPOConfig, tmp_path, [reward], rows, max_steps=1))
    assert set(seen) == {None, "h"}


def test_too_few_prompts_for_a_rollout_are_refused(tmp_path) -> None:
    trainer = make_trainer(GRPOTrainer, GRPOConfig, tmp_path, rows=make_prompts(3))
    with pytest.raises(ValueError, match=r"must have the prompts of a rollout, 4 .* got 3"):
        trainer.train()
