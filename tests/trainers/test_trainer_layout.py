"""Shared prompts in the trainers: the padded layout's losses, and falling back where a model cannot take them."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_models import make_model, make_pairs, make_tokenizer
from trainer_runs import LN2, config, dpo_trainer, lora, train_log
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from pyfast_dpo.losses.pairs import preference_loss
from pyfast_dpo.losses.table import PAIR_LOSS_NAMES, needs_reference
from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from pyfast_dpo.trainers.sampling import TokenBudgetBatches

SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def kto_trainer(tmp_path, tokenizer, model, **options):
    return KTOTrainer(
        model, None, config(KTOConfig, tmp_path, **options), train_dataset=make_pairs(),
        eval_dataset=make_pairs(6), processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize(
    "make, options",
    [
        (dpo_trainer, {}),
        (dpo_trainer, {"loss_type": "ipo"}),
        (dpo_trainer, {"gradient_checkpointing": True}),
        (dpo_trainer, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}),
        (kto_trainer, {}),
        (kto_trainer, {"per_device_train_batch_size": 3}),
    ],
)
def test_shared_prompts_train_as_the_padded_layout_does(tmp_path, tokenizer, make, options):
    logs = []
    for shared in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # no falling back
            trainer = make(
                tmp_path, tokenizer, make_model(), shared_prompt=shared, max_steps=6, **options
            )
        batch = trainer.data_collator(trainer.train_dataset.examples[:2])
        assert ("shared_prompt_layout" in batch) == shared
        logs.append(train_log(trainer))
    for ours, padded in zip(*logs, strict=True):
        assert ours.keys() - {"tokens_per_second"} == padded.keys() - {"tokens_per_second"}
        for name in ours.keys() - {"tokens_per_second", "tokens_per_computed_token"}:
            assert ours[name] == pytest.approx(padded[name], rel=1e-4, abs=1e-5), name
        assert ours["tokens_per_computed_token"] > padded["tokens_per_computed_token"]
    assert logs[0][-1]["loss"] != pytest.approx(logs[0][0]["loss"], rel=1e-3)  # it did move


@pytest.mark.parametrize(
    "make",
    [
        # what each model does to its logits is in its configuration, under a name of its own
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
        lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.25)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    ],
)
def test_heads_that_change_their_logits_give_the_padded_loss(tmp_path, tokenizer, make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # so that a cap or a scale matters
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = dpo_trainer(tmp_path, tokenizer, model, max_steps=1)
    batch = trainer.data_collator(trainer.train_dataset.examples[:4])
    values = trainer._reference_values(batch)
    for row, example in zip(values, trainer.train_dataset.examples, strict=False):
        for value, side in zip(row, ("chosen_ids", "rejected_ids"), strict=True):
            ids = torch.tensor([[*example["prompt_ids"], *example[side]]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(example["prompt_ids"]) - 1 : -1].double()
            targets = torch.as_tensor(example[side]).long()
            truth = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum()
            assert float(value) == pytest.approx(float(truth), abs=1e-4)


def test_unknown_attention_falls_back_and_says_so(tmp_path, tokenizer):
    torch.manual_seed(0)
    model = GptOssForCausalLM(
        GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    )  # fmt: skip
    with pytest.warns(UserWarning, match="falling back to padded batches .*s_aux is not supported"):
        trainer = dpo_trainer(tmp_path, tokenizer, model, max_steps=1, router_aux_loss_coef=0.0)
    assert train_log(trainer)[0]["loss"] == LN2


def test_attention_that_mixes_responses_is_found_and_falls_back(tmp_path, tokenizer, monkeypatch):
    """The check must see a wrong layout, not only an error: here every position follows the row's order."""
    from pyfast_dpo.layout.shared_prompt import SharedPromptLayout

    monkeypatch.setattr(SharedPromptLayout, "positions", lambda self: torch.arange(self.tokens))
    with pytest.warns(
        UserWarning, match="falling back to padded batches .* differ by .* of their norm"
    ):
        trainer = dpo_trainer(tmp_path, tokenizer, make_model(), max_steps=1)
    assert train_log(trainer)[0]["loss"] == LN2


def test_adapter_on_the_head_uses_the_models_own_logits(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="own logits.*lm_head must be a torch.nn.Linear"):
        trainer = dpo_trainer(tmp_path, tokenizer, peft_config=adapter, learning_rate=1e-2)
    log = train_log(trainer)
    assert log[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert log[-1]["loss"] < LN2


def test_shared_prompts_with_an_adapter_and_with_bfloat16(tmp_path, tokenizer):
    logs = []
    for shared in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # no falling back
            trainer = dpo_trainer(
                tmp_path, tokenizer, make_model(), peft_config=lora(), shared_prompt=shared, bf16=True,
                learning_rate=1e-2, max_steps=6,
            )  # fmt: skip
        logs.append(train_log(trainer))
    for ours, padded in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(padded["loss"], abs=5e-3)
    assert logs[0][-1]["loss"] < LN2 - 0.01


def test_a_collator_of_ones_own_makes_padded_batches(tmp_path, tokenizer):
    from pyfast_dpo.data import DataCollatorForPreference

    trainer = DPOTrainer(
        make_model(), None, config(DPOConfig, tmp_path, max_steps=1), DataCollatorForPreference(1),
        make_pairs(), processing_class=tokenizer,
    )  # fmt: skip
    assert train_log(trainer)[0]["loss"] == LN2


# Every loss ----------------------------------------------------------------------------------------------

OPTIONS = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}


def moved(trainer):
    """The policy away from the reference, so that losses are not at their first value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return trainer.data_collator(trainer.train_dataset.examples[:5])


def plain(trainer, batch, model):
    """Token log-probs `[rows, L]`, their mask, and all log-probs, from padded logits."""
    padded = trainer._collators(trainer.args, trainer.processing_class)[1](
        trainer.train_dataset.examples[:5]
    )
    logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    labels = padded["labels"][:, 1:]
    everything = logits[:, :-1].log_softmax(-1)
    tokens = everything.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return tokens * (labels != -100), labels != -100, everything


@pytest.mark.parametrize(
    "loss_type, options",
    [(name, OPTIONS.get(name, {})) for name in PAIR_LOSS_NAMES]
    + [
        (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),  # MPO
        ("sigmoid", {"rpo_alpha": 0.5}),
        ("sigmoid", {"f_divergence_type": "js_divergence"}),
        ("sigmoid", {"ld_alpha": 0.3}),
        ("sigmoid", {"use_weighting": True}),
        (["sigmoid", "sft"], {"use_weighting": True, "ld_alpha": 0.0}),
    ],
    ids=str,
)
def test_every_loss_is_that_of_plain_log_probs(tmp_path, tokenizer, loss_type, options):
    trainer = dpo_trainer(tmp_path, tokenizer, loss_type=loss_type, **options)
    batch = moved(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    tokens, mask, everything = plain(trainer, batch, trainer.model)
    weights = torch.ones_like(tokens)
    if "ld_alpha" in options:
        shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
        beyond = (mask.cumsum(1) > shared.unsqueeze(1)) & mask
        weights = weights.masked_fill(beyond, options["ld_alpha"])
    policy = (tokens * weights).sum(1)
    reference = [None, None]
    if needs_reference(loss_type):
        with torch.no_grad():
            reference = (plain(trainer, batch, trainer.ref_model)[0] * weights).sum(1).chunk(2)
    else:
        assert trainer.ref_model is None
    losses = preference_loss(
        *policy.chunk(2), *reference, chosen_lengths=mask.sum(1).chunk(2)[0],
        rejected_lengths=mask.sum(1).chunk(2)[1], impl="torch", **trainer.args.loss_options(),
    ).losses  # fmt: skip
    if options.get("use_weighting"):
        squares = (2 * everything).logsumexp(-1)
        pair_weights = (((tokens - squares) * mask).sum(1) / mask.sum(1)).exp().detach()
        losses = losses * pair_weights.chunk(2)[0] * pair_weights.chunk(2)[1]
    expected = losses.mean()
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    for name, parameter in trainer.model.named_parameters():
        scale = float(parameter.grad.abs().max()) + 1e-7
        assert float((ours[name] - parameter.grad).abs().max()) / scale < 1e-3, name


def test_unpaired_loss_without_kl_has_no_mismatched_completions(tmp_path, tokenizer):
    losses = []
    for shared in (True, False):
        trainer = kto_trainer(
            tmp_path, tokenizer, make_model(), loss_type="apo_zero_unpaired", shared_prompt=shared
        )
        batch = trainer.data_collator(trainer.train_dataset.examples[:2])
        assert not any(name.startswith("KL_") for name in batch)
        log = train_log(trainer)
        assert "kl" not in log[0]
        losses.append([entry["loss"] for entry in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] == 0.5


# Batches by tokens ---------------------------------------------------------------------------------------


def test_token_budget_holds_and_every_example_comes_once_an_epoch():
    tokens = [5, 9, 1, 7, 30, 2, 2, 2, 8, 4]  # one above the budget
    batches = TokenBudgetBatches(tokens, 12, shuffle=True, seed=3)
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
        assert len(epochs[-1]) == len(batches)
        assert sorted(i for batch in epochs[-1] for i in batch) == list(range(10))
        assert all(sum(tokens[i] for i in batch) <= 12 or batch == [4] for batch in epochs[-1])
    assert epochs[0] != epochs[1]
    assert len(TokenBudgetBatches(tokens, 12, shuffle=False, multiple_of=4)) % 4 == 0


def test_training_by_a_token_budget(tmp_path, tokenizer):
    trainer = dpo_trainer(
        tmp_path, tokenizer, make_model(), max_tokens_per_batch=40, max_steps=-1, num_train_epochs=2
    )
    seen = []
    collate = trainer.data_collator

    def spy(examples):
        batch = collate(examples)
        seen.append((len(examples), batch["input_ids"].numel()))
        return batch

    trainer.data_collator = spy
    log = train_log(trainer)
    assert log[0]["loss"] == LN2
    assert sum(count for count, _ in seen) == 2 * 16
    assert all(tokens <= 40 for _, tokens in seen)
    assert len({count for count, _ in seen}) > 1  # batches of different numbers of pairs
    assert trainer.evaluate()["eval_loss"] < LN2


def test_pairs_of_like_length_are_batched_together_when_asked_for(tmp_path, tokenizer):
    # 48 rows: the sampler sorts lots of 8 batches.
    lengths = [n for i in range(24) for n in (i + 1, 48 - i)]
    rows = [{"prompt": "a", "chosen": " b" * n, "rejected": " c"} for n in lengths]

    def spread(strategy: str) -> float:
        trainer = dpo_trainer(
            tmp_path, tokenizer, make_model(), rows=rows, per_device_train_batch_size=2, max_steps=-1,
            num_train_epochs=1, train_sampling_strategy=strategy, max_length=64,
        )  # fmt: skip
        seen = []
        collate = trainer.data_collator

        def spy(examples):
            lengths = [len(example["chosen_ids"]) for example in examples]
            seen.append((max(lengths) - min(lengths), lengths))
            return collate(examples)

        trainer.data_collator = spy
        trainer.train()
        assert sorted(n for _, lengths in seen for n in lengths) == sorted(
            len(example["chosen_ids"]) for example in trainer.train_dataset.examples
        )
        return sum(difference for difference, _ in seen) / len(seen)

    assert spread("group_by_length") < 5 < 20 < spread("sequential")


def test_prompts_shared_by_several_pairs_are_computed_once(tmp_path, tokenizer):
    rows = [
        {"prompt": "a b c d e f", "chosen": f" {x}", "rejected": " z"} for x in ("g", "h", "i", "j")
    ]
    rows.append({"prompt": "k", "chosen": " l", "rejected": " m"})
    trainer = dpo_trainer(tmp_path, tokenizer, make_model(), rows=rows)
    batch = trainer.data_collator(trainer.train_dataset.examples[:4])
    # a prompt of 6 tokens, and g, h, i, j, z with the end of the sequence after each
    assert batch["input_ids"].numel() == 6 + 5 * 2
    one_by_one = [
        trainer._reference_values(trainer.data_collator([example]))
        for example in trainer.train_dataset.examples[:4]
    ]
    together = trainer._reference_values(batch)
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-5, atol=1e-5)
