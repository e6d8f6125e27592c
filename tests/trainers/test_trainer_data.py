"""What trainers take as data: collators and columns as TRL's, tables, processors, streams read by several."""

from __future__ import annotations

import warnings
from itertools import chain

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from data_rows import assistant, make_tool_tokenizer, tool, user
from tiny_models import Stream, make_model, make_pairs, make_tokenizer
from trainer_runs import config, dpo_trainer, train_log
from transformers import GPT2Config, GPT2LMHeadModel

from pyfast_dpo.data import (
    DataCollatorForPreference,
    DataCollatorForUnpairedPreference,
    prepare_pairs,
)
from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def losses(trainer):
    return [entry["loss"] for entry in train_log(trainer)]


def kto_trainer(tmp_path, tokenizer, rows, collator=None, model=None, **options):
    return KTOTrainer(
        model or make_model(), None, config(KTOConfig, tmp_path, **options), collator,
        train_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip


# Collators -----------------------------------------------------------------------------------------------


class OfTRL:
    """A user's collator with TRL's keys alone: it concatenates lists, and gives no labels."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples):
        for example in examples:
            for name, ids in example.items():
                if name.endswith("_ids"):
                    assert example["prompt_ids"] + ids == [*example["prompt_ids"], *ids]
        batch = self.collator(examples)
        return {name: rows for name, rows in batch.items() if not name.endswith("labels")}


def test_a_collator_of_trl_s_kind_trains_pairs_to_the_same_losses(tmp_path, tokenizer):
    runs = []
    for collator in (DataCollatorForPreference(1), OfTRL(DataCollatorForPreference(1))):
        trainer = DPOTrainer(
            make_model(), None, config(DPOConfig, tmp_path), collator,
            train_dataset=make_pairs(), processing_class=tokenizer,
        )  # fmt: skip
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_a_collator_of_trl_s_kind_trains_unpaired_rows_to_the_same_losses(tmp_path, tokenizer):
    padded = DataCollatorForUnpairedPreference(1, max_length=32)
    runs = [
        losses(kto_trainer(tmp_path, tokenizer, make_pairs(), collator))
        for collator in (padded, OfTRL(padded))
    ]
    assert runs[0] == runs[1]


def test_reference_columns_of_a_batch_are_the_reference(tmp_path, tokenizer):
    class WithReference(OfTRL):
        def __call__(self, examples):
            zeros = torch.zeros(len(examples))
            return {
                **super().__call__(examples), "ref_chosen_logps": zeros + 2, "ref_rejected_logps": zeros,
            }  # fmt: skip

    trainer = DPOTrainer(
        make_model(), None, config(DPOConfig, tmp_path, max_steps=1), WithReference(DataCollatorForPreference(1)),
        train_dataset=make_pairs(), processing_class=tokenizer,
    )  # fmt: skip
    entry = train_log(trainer)[0]
    margin = 0.1 * (entry["logps/chosen"] - 2 - entry["logps/rejected"])
    assert entry["rewards/margins"] == pytest.approx(margin, abs=1e-4)


# Turns that are not the assistant's ------------------------------------------------------------------------

TOOL_ROWS = [
    {
        "prompt": [user(letter)],
        "chosen": [assistant("b c"), tool("d e f"), assistant("g")],
        "rejected": [assistant("h"), user("i"), assistant("k l")],
        "tools": [{"function": {"name": "f"}}],
    }
    for letter in "abcdefgh"
]


@pytest.mark.parametrize("shared_prompt", [True, False])
def test_turns_of_tools_and_users_are_context_and_not_scored(tmp_path, shared_prompt):
    tokenizer = make_tool_tokenizer()
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    trainer = dpo_trainer(
        tmp_path, tokenizer, model, rows=TOOL_ROWS, max_steps=1, shared_prompt=shared_prompt
    )
    example = trainer.train_dataset.examples[0]
    expected = []
    for side, response in (("chosen", "b c <end> . g <end>"), ("rejected", "h <end> . k l <end>")):
        ids = example["prompt_ids"] + example[f"{side}_ids"]
        mask = [0] * len(example["prompt_ids"]) + example[f"{side}_assistant_mask"]
        scored = [t for t, m in zip(ids, mask, strict=True) if m]
        assert tokenizer.decode(scored) == response.replace(". ", "")
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        expected.append(sum(logps[i - 1, ids[i]] for i, m in enumerate(mask) if m))
    batch = trainer.data_collator([example])
    with torch.no_grad():
        _, (logps, _), lengths = trainer._loss(model, batch, trainer._averages["eval"])
    assert lengths.tolist() == [[5, 5]]
    torch.testing.assert_close(logps[0].double(), torch.stack(expected), rtol=0, atol=1e-5)
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(trainer))


# Tables of the model ---------------------------------------------------------------------------------------


def test_a_token_without_an_embedding_is_an_error(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])  # and no model.resize_token_embeddings
    rows = [*make_pairs(5), {"prompt": "a <new>", "chosen": " b", "rejected": " c"}]
    message = r"row 6 has the token id 32, but the embeddings of the model have 32 rows.*resize_token_embeddings"
    for data in (rows, Stream(rows), prepare_pairs(rows, tokenizer)):
        with pytest.raises(ValueError, match=message):
            dpo_trainer(tmp_path, tokenizer, rows=data, num_train_epochs=1, max_steps=8).train()


def test_padding_without_an_embedding_is_padding_by_another_token(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    trainer = dpo_trainer(tmp_path, tokenizer, shared_prompt=False)
    assert trainer.data_collator.pad_token_id == tokenizer.eos_token_id
    assert losses(trainer) == losses(dpo_trainer(tmp_path, make_tokenizer(), shared_prompt=False))


def test_a_reference_with_a_smaller_vocabulary_is_an_error(tmp_path, tokenizer):
    reference = make_model()
    reference.resize_token_embeddings(20)
    with pytest.raises(ValueError, match=r"the embeddings of the reference model have 20 rows"):
        dpo_trainer(tmp_path, tokenizer, ref_model=reference)


def test_a_row_beyond_the_table_of_positions_is_an_error(tmp_path, tokenizer):
    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=32, n_positions=12, n_embd=16, n_layer=1, n_head=2, eos_token_id=1
            )
        )

    rows = [*make_pairs(8), {"prompt": "a b c d e f g h i k", "chosen": " e f g", "rejected": " i"}]
    with pytest.raises(
        ValueError, match=r"row 9 has 14 tokens, .* a table of 12 positions; set max_length to 12"
    ):
        dpo_trainer(tmp_path, tokenizer, gpt2(), rows=rows)
    assert losses(dpo_trainer(tmp_path, tokenizer, gpt2(), rows=rows, max_length=12, max_steps=1))


# What is given as a dataset or a tokenizer -------------------------------------------------------------------


def test_a_dict_of_datasets_to_train_on_is_refused_with_what_to_give(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list(make_pairs())
    splits = datasets.DatasetDict({"train": train, "test": train})
    with pytest.raises(
        TypeError, match=r"got a DatasetDict of \['train', 'test'\]; .*dataset\['train'\]"
    ):
        dpo_trainer(tmp_path, tokenizer, rows=splits)


def test_a_processor_with_text_trains_as_its_tokenizer(tmp_path, tokenizer):
    class Processor:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def save_pretrained(self, *args, **kwargs):
            pass

    assert losses(dpo_trainer(tmp_path, Processor(tokenizer))) == losses(
        dpo_trainer(tmp_path, tokenizer)
    )


def test_the_datasets_of_a_trainer_serve_callbacks_that_log_completions(tmp_path, tokenizer):
    """As TRL's: `trainer.eval_dataset.select(range(n))["prompt"]`."""
    rows = make_pairs(6)
    trainer = dpo_trainer(tmp_path, tokenizer, rows=rows)
    assert trainer.eval_dataset.select(range(2))["prompt"] == [row["prompt"] for row in rows[:2]]
    assert {"prompt", "chosen", "prompt_ids", "chosen_ids"} <= set(
        trainer.train_dataset.column_names
    )
    assert trainer.train_dataset[0]["prompt"] == rows[0]["prompt"]
    assert train_log(trainer)  # the columns that are not ids harm nothing


# Streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_trains_on_every_row_once_an_epoch_and_reports_them(tmp_path, tokenizer, workers):
    datasets = pytest.importorskip("datasets")
    rows = make_pairs(24)
    rows[5] = {**rows[5], "chosen": ""}
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=0, buffer_size=24)
    seen = []

    class Recording(DPOTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs["sequence_tokens"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    options = config(
        DPOConfig, tmp_path, max_steps=12, per_device_train_batch_size=4,
        dataloader_num_workers=workers,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Recording(
            make_model(), None, options, train_dataset=stream, processing_class=tokenizer
        )
        trainer.train()
    first, second = (list(chain.from_iterable(part)) for part in (seen[:6], seen[6:]))
    assert len(first) == len(second) == 23
    assert sorted(first) == sorted(second)
    assert first != second  # epochs shuffle
    report = trainer.data_reports["train"]
    assert (report.total, report.kept) == (24, 23)
    assert [len(numbers) for numbers in report.dropped.values()] == [1]


def test_options_of_the_config_reach_tokenization(tmp_path, monkeypatch):
    from pyfast_dpo.data import prepare

    monkeypatch.setattr(prepare, "ROWS_OF_A_TASK", 2)  # so that 8 rows need more than one process
    tokenizer = make_tool_tokenizer()
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    options = {"chat_template_kwargs": {"enable_thinking": False}, "dataset_num_proc": 2}
    dpo = dpo_trainer(tmp_path, tokenizer, model, rows=TOOL_ROWS, **options)
    kto = kto_trainer(tmp_path, tokenizer, TOOL_ROWS, model=model, **options)
    for trainer in (dpo, kto):
        prompts = [tokenizer.decode(ids) for ids in trainer.train_dataset["prompt_ids"]]
        assert prompts[0] == "<tools> f <quiet> <user> a <end> <assistant>"
        assert len({*prompts}) == 8
