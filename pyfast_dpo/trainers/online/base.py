"""The core of on-policy training: prompts, fresh responses, scores, batches of whole groups, one step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from pyfast_dpo.data import PreparedDataset
from pyfast_dpo.layout.batches import completion_rows, sums, token_counts
from pyfast_dpo.logprobs.fused_policy import FusedPolicyLoss
from pyfast_dpo.losses.policy import policy_normalizer
from pyfast_dpo.losses.policy_table import POLICY_LOSSES
from pyfast_dpo.model.causal_lm import causal_lm_of
from pyfast_dpo.model.projections import Projection
from pyfast_dpo.rewards import RewardFunctions
from pyfast_dpo.rollout import Engine
from pyfast_dpo.trainers.construction import pad_token
from pyfast_dpo.trainers.loaders import Rows
from pyfast_dpo.trainers.metrics import MetricAverages
from pyfast_dpo.trainers.online.batches import ResponseCollator
from pyfast_dpo.trainers.online.completions import CompletionLog
from pyfast_dpo.trainers.online.config import OnlineConfig
from pyfast_dpo.trainers.online.prompts import prompt_loader
from pyfast_dpo.trainers.online.rollouts import Response, Rollout, groups_of, spread
from pyfast_dpo.trainers.online.rounds import RoundTrainer
from pyfast_dpo.trainers.online.writing import Writer

# What a batch is divided by that stands for none: its gradients are 0.
NOTHING = 1e300


class OnlineTrainer(RoundTrainer):
    """Base of the trainers that learn from fresh responses. A method defines what scores become (`_advantages`, or
    `_judge` for those of tokens) and what the loss is (`_loss`).

    A step takes `per_device_train_batch_size * gradient_accumulation_steps` responses a process. Those to one prompt
    stay one row, whatever the micro-batch; responses without a coefficient are not computed. Every sum is divided by
    a number of the whole step, over all micro-batches and processes.

    Attributes:
        engine: what writes the responses.
    """

    config_class: ClassVar[type[OnlineConfig]]
    args: OnlineConfig

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: OnlineConfig | None = None,
        train_dataset: Rows | PreparedDataset | None = None,
        eval_dataset: Rows | PreparedDataset | dict[str, Rows | PreparedDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        ref_model: str | PreTrainedModel | nn.Module | None = None,
        engine: Engine | None = None,
    ) -> None:
        name = type(self).__name__
        args = self._checked_args(args)
        needs_reference = args.beta > 0
        if ref_model is not None and not needs_reference:
            raise ValueError(f"{name}: ref_model is given, but beta is 0, which needs no reference")
        models = self._models(
            model,
            ref_model,
            args,
            processing_class,
            quantization_config,
            peft_config,
            needs_reference=needs_reference,
        )
        args = models.args
        further = self._further_models(models.policy, args)
        text_config = causal_lm_of(models.policy).config.get_text_config()
        self._positions = getattr(text_config, "max_position_embeddings", None)
        self.reward_functions = RewardFunctions(
            reward_funcs, args.reward_weights, reward_processing_classes, name
        )
        super().__init__(
            model=models.policy,
            args=args,
            data_collator=list,
            train_dataset=self._prompts(train_dataset, args, "train"),
            eval_dataset=self._prompts(eval_dataset, args, "eval"),
            processing_class=self.processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._make_ready(models, shared_prompt=True, further=further)
        self._collate = ResponseCollator(
            self._prepared_models.shared_prompt,
            pad_token(cast(Any, self.processing_class), self._tables.vocabulary),
            None if isinstance(args.pad_to_multiple_of, str) else args.pad_to_multiple_of,
        )
        self._writer = Writer(
            name,
            engine,
            self.accelerator.unwrap_model(self._policy),
            args,
            self.accelerator,
            self.compute_loss_context_manager,
        )
        if self._writer.is_own and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"{name}: a sharded model cannot write responses in this process; give an engine that runs elsewhere"
            )
        self.reward_functions.to(args.device)
        self._rollout: Rollout | None = None
        self._extra_columns: dict[str, list[Any]] = {}  # what rewards want shown beside completions
        self._completions = CompletionLog(args.num_completions_to_print, args.log_unique_prompts)

    @property
    def engine(self) -> Engine:
        return self._writer.engine

    # What a method defines ------------------------------------------------------------------------------

    def _further_models(self, policy: nn.Module, args: Any) -> dict[str, nn.Module]:
        """Models beside policy and reference that take the same batches, by the names of their arguments."""
        return {}

    def _loss(self, inputs: dict[str, Any], projection: Projection) -> FusedPolicyLoss:
        """From the projection of a batch; `loss` is the sum over it divided by the step's number."""
        entropy = self.args.entropy_coef
        return projection.policy_loss(
            completion_rows(inputs),
            advantages=inputs["advantages"],
            old_logps=inputs.get("old_logps"),
            reference_logps=None if self.penalty_in_reward else inputs.get("reference_logps"),
            importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
            normalizer=inputs["normalizer"],
            temperature=self.args.temperature,
            entropy_coef=entropy,
            entropy_normalizer=inputs["tokens"] if entropy else None,
            **self.args.loss_options(),
        )

    def _teaches(self, response: Response) -> bool:
        """Whether the response has a coefficient in the loss."""
        everywhere = not self.penalty_in_reward and self.args.beta > 0
        if everywhere or self.args.entropy_coef > 0:
            return response.length > 0
        return response.teaches()

    # A step ---------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        return prompt_loader(type(self).__name__, cast(Any, self.train_dataset), self.args)

    def _count_examples(self, batch: dict[str, Any]) -> int:
        return len(batch.get("responses", ()))

    def _step_batches(self, batches: list[Any]) -> list[dict[str, Any]]:
        """Of numbers of prompts, each list for the next `per_device_train_batch_size` responses of its rollout."""
        args = self.args
        taken: list[Response] = []
        assert args.steps_per_generation is not None
        size, served = args.per_device_train_batch_size, args.steps_per_generation
        for place, numbers in enumerate(batches, start=self._batches_read - len(batches)):
            if place % (served * args.num_iterations) == 0:
                self._send_weights()
                rows = [cast(Any, self.train_dataset)[number] for number in numbers]
                responses = self._roll_out(
                    rows,
                    args.num_generations,
                    "train",
                    args.resample_zero_variance,
                    self._epoch,
                    place,
                )
                self._rollout = Rollout(responses, self.state.global_step)
            assert self._rollout is not None
            start = place % served * size
            for each in self._rollout.responses[start : start + size]:
                if self.state.global_step > self._rollout.step:
                    each.constants.setdefault("old_logps", each.sampled_logps)
                taken.append(each)
        return self._batches_of(taken, len(batches)) if batches else []

    def _batches_of(self, responses: list[Response], count: int) -> list[dict[str, Any]]:
        """Micro-batches of a step: whole groups, without responses that have no coefficient."""
        processes = self.accelerator.num_processes
        numbers = torch.tensor([each.length for each in responses])
        normalizer = policy_normalizer(
            self.args.loss_options()["loss_type"],
            numbers,
            max_completion_length=self.args.max_completion_length,
        )
        totals = torch.stack([normalizer, numbers.sum().double()]).to(self.args.device)
        # The Trainer and DDP divide what the batches of a step add up to by their numbers.
        totals = (self.accelerator.reduce(totals, "sum") / (processes * count)).tolist()
        groups = [[each for each in group if self._teaches(each)] for group in groups_of(responses)]
        parts = spread([group for group in groups if group], count)
        batches = [self._batch_of(part, *totals) for part in parts]
        for i in range(count):
            # Every process must run as many passes, and a step without any moves by its momentum alone.
            if not parts[i] and (processes > 1 or i == count - 1):
                batches[i] = self._batch_of([_shortest(responses)], NOTHING, NOTHING)
        return batches

    def _batch_of(
        self, responses: list[Response], normalizer: float, tokens: float
    ) -> dict[str, Any]:
        if not responses:
            return {"input_ids": torch.empty(1, 0, dtype=torch.int64)}
        return {
            **self._collate(responses),
            "responses": responses,
            "normalizer": normalizer or NOTHING,
            "tokens": tokens or NOTHING,
        }

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        if "responses" not in inputs:
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The share of a batch in the loss of its step, times the number of its batches."""
        mode = "train" if self._policy.training else "eval"
        metrics = self._averages[mode]
        result, balancing = self._project_balanced(
            model, inputs, partial(self._loss, inputs), metrics
        )
        loss = result.loss + balancing
        if mode == "train":
            tokens, _ = token_counts(inputs)
            self._tokens_since_log.append(tokens)
            self._keep_logps(inputs, result.logps)
        self._add_metrics(metrics, inputs, result)
        return (loss, result) if return_outputs else loss

    def _keep_logps(self, inputs: dict[str, Any], logps: Tensor) -> None:
        """What the first pass measures is what later ones are held against: it costs nothing and is the trainer's own."""
        if self.args.num_iterations == 1 or "old_logps" in inputs:
            return
        parts = logps.detach().cpu().split([len(each.ids) for each in inputs["responses"]])
        for each, own in zip(inputs["responses"], parts, strict=True):
            each.constants["old_logps"] = own.clone()

    def _add_metrics(
        self, metrics: MetricAverages, inputs: dict[str, Any], result: FusedPolicyLoss
    ) -> None:
        rows = result.logps.shape[0]
        if result.statistics is not None:
            metrics.add("entropy", result.statistics.entropy.sum(), rows)
        if self.args.beta > 0 and not self.penalty_in_reward:
            metrics.add("kl", result.kl.sum(), rows)
        if "old_logps" not in inputs:
            difference = (result.logps.detach() - inputs["sampled_logps"]).abs()
            metrics.add("sampling/sampling_logp_difference/mean", difference.sum(), rows)
            metrics.add_extreme("sampling/sampling_logp_difference/max", difference.max())
        if "importance_sampling_ratio" in inputs:
            weights = inputs["importance_sampling_ratio"]
            metrics.add("sampling/importance_sampling_ratio/mean", weights.sum(), rows)
            for name, value in (("min", weights.min()), ("max", weights.max())):
                metrics.add_extreme(f"sampling/importance_sampling_ratio/{name}", value)
        loss_type = self.args.loss_options()["loss_type"]
        if loss_type == "cispo":
            metrics.add("cispo_clip_ratio", (result.clipped > 0).sum(), rows)
            return
        if "epsilon" not in POLICY_LOSSES[loss_type].options:
            return
        scored = completion_rows(inputs)
        for name, extreme, where in (
            ("low", "min", result.clipped < 0),
            ("high", "max", result.clipped > 0),
        ):
            metrics.add(f"clip_ratio/{name}_mean", where.sum(), rows)
            of_sequences = sums(where, scored) / scored.counts.clamp(min=1)
            value = of_sequences.amin() if extreme == "min" else of_sequences.amax()
            metrics.add_extreme(f"clip_ratio/{name}_{extreme}", value)
        metrics.add("clip_ratio/region_mean", (result.clipped != 0).sum(), rows)

    # Evaluation, logs, checkpoints ------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Responses to the prompts of a dataset, `num_generations_eval` to each, with the same random numbers every
        time, and the metrics of a rollout of them."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self._prompts(dataset, self.args, metric_key_prefix)
        if isinstance(dataset, Mapping):
            found: dict[str, float] = {}
            for key, rows in dataset.items():
                found.update(self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{key}"))
            return found
        if dataset is None:
            raise ValueError(f"{type(self).__name__}: evaluate() needs an eval_dataset")
        self._clear_metrics("eval")
        started = time.perf_counter()
        was_training = self._policy.training
        self._policy.eval()
        try:
            with self._prepared_models:
                self._evaluate_prompts(dataset)
        finally:
            self._policy.train(was_training)
        logs = {
            f"{metric_key_prefix}_loss": 0.0,
            f"{metric_key_prefix}_runtime": time.perf_counter() - started,
        }
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    @torch.no_grad()
    def _evaluate_prompts(self, dataset: PreparedDataset) -> None:
        args = self.args
        group = args.num_generations_eval or args.num_generations
        size = max(1, args.eval_batch_size * self.accelerator.num_processes // group)
        self._send_weights()
        for start in range(0, len(dataset), size):
            rows = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
            responses = self._roll_out(rows, group, "eval", 0, start)
            (inputs,) = self._batches_of(responses, 1)
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self.model_wrapped, inputs)
            self._averages["eval"].add("loss", loss * inputs["normalizer"], inputs["normalizer"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs and self.args.log_completions and self.is_world_process_zero():
            folder = Path(str(self.args.output_dir), "completions")
            self._completions.write(folder, self.state.global_step)

    def _state_of_run(self) -> dict[str, Any]:
        rollout = None if self._rollout is None else self._rollout.state_dict()
        return {**super()._state_of_run(), "rollout": rollout}

    def _restore_run(self, state: dict[str, Any]) -> None:
        super()._restore_run(state)
        rollout = state["rollout"]
        self._rollout = None if rollout is None else Rollout.from_state(rollout)


def _shortest(responses: Sequence[Response]) -> Response:
    """To be computed in the place of none; where all are empty, a token of the prompt."""
    there = [each for each in responses if each.ids]
    if there:
        return min(there, key=lambda each: len(each.ids))
    prompt = responses[0].prompt_ids
    return Response(
        0, prompt, prompt[-1:], torch.zeros(1), False, True, {"advantages": torch.zeros(1)}
    )
