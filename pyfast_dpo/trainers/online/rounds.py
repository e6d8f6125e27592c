"""A round of on-policy training: the policy's responses to prompts, their scores, what the loss needs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from pyfast_dpo.data import PreparedDataset, prepare_prompts
from pyfast_dpo.data.tables import check_tables
from pyfast_dpo.layout.batches import completion_rows
from pyfast_dpo.losses.correction import sampling_correction
from pyfast_dpo.model.projections import Projection
from pyfast_dpo.rewards import RewardFunctions
from pyfast_dpo.trainers.online.batches import ResponseCollator
from pyfast_dpo.trainers.online.completions import CompletionLog
from pyfast_dpo.trainers.online.config import OnlineConfig
from pyfast_dpo.trainers.online.rollouts import Response
from pyfast_dpo.trainers.online.scores import Table, metrics_of, score, without_variance
from pyfast_dpo.trainers.online.writing import Writer, share_of
from pyfast_dpo.trainers.policy import PolicyTrainer


class RoundTrainer(PolicyTrainer):
    """A trainer that writes and judges responses; `OnlineTrainer` makes steps of them."""

    args: OnlineConfig
    penalty_in_reward: ClassVar[bool] = False  # the KL penalty, instead of a term of the loss
    reward_functions: RewardFunctions
    _positions: int | None  # that the model was made for, prompt and response together
    _writer: Writer
    _collate: ResponseCollator
    _completions: CompletionLog
    _extra_columns: dict[str, list[Any]]  # what rewards want shown beside completions

    def _judge(self, responses: list[Response], table: Table, first: int, group: int) -> None:
        """Sets the constant `advantages` of responses, which are the ones from `first` on in the table."""
        own = self._advantages(table, group)[first : first + len(responses)]
        for each, advantage in zip(responses, own, strict=True):
            each.constants["advantages"] = advantage.view(1).clone()

    def _advantages(self, table: Table, group: int) -> Tensor:
        """`[N]`, one for each response of the table."""
        raise NotImplementedError

    def _prompts(self, dataset: Any, args: OnlineConfig, name: str) -> Any:
        """The dataset as prompts; what is prepared already, or nothing, stays as it is."""
        if dataset is None or isinstance(dataset, PreparedDataset):
            return dataset
        if isinstance(dataset, Mapping) and name == "train":
            raise TypeError(
                f"{type(self).__name__}: train_dataset must be one dataset, got a {type(dataset).__name__} of "
                f"{list(dataset)}; give one of them"
            )
        if isinstance(dataset, Mapping):
            return {key: self._prompts(rows, args, key) for key, rows in dataset.items()}
        positions = self._positions
        if positions is not None and positions <= args.max_completion_length:
            raise ValueError(
                f"{type(self).__name__}: max_completion_length must leave room for a prompt in the model's {positions} "
                f"positions, got {args.max_completion_length}"
            )
        prepared = prepare_prompts(
            dataset,
            self.processing_class,
            max_length=None if positions is None else positions - args.max_completion_length + 1,
            name=name,
            chat_template_kwargs=args.template_options(),
        )
        check_tables(prepared, self._tables)
        if args.process_index == 0:
            print(prepared.report)
        return prepared

    def _send_weights(self) -> None:
        self._writer.update(self.accelerator.unwrap_model(self._policy), self.state.global_step)

    @torch.no_grad()
    def _roll_out(
        self, rows: list[dict[str, Any]], group: int, mode: str, tries: int, *seed: Any
    ) -> list[Response]:
        """Judged responses of this process to the prompts of all, `group` to each; the engine has the weights.

        Args:
            tries: how often groups without variance are written again.
            seed: what makes this rollout another than the others.
        """
        prompts = [row["prompt_ids"] for row in rows]
        first, share = share_of(
            len(rows), group, self.accelerator.process_index, self.accelerator.num_processes
        )
        responses = self._writer.write(prompts, share, mode, *seed)
        texts, rewards = self._score(rows, responses, mode)
        for attempt in range(1, tries + 1):
            flat = without_variance(self._table(responses, rewards).rewards.view(-1, group))
            again = [(number, count) for number, count in share if flat[number]]
            if not flat.any():
                break
            fresh = self._writer.write(prompts, again, mode, *seed, attempt)
            new_texts, new_rewards = self._score(rows, fresh, mode)
            places = [i for i, each in enumerate(responses) if flat[each.group]]
            for k, i in enumerate(places):
                responses[i], texts[i] = fresh[k], new_texts[k]
            rewards[places] = new_rewards
        for each in responses:
            each.scored = not (self.args.mask_truncated_completions and each.truncated)
        self._measure([each for each in responses if each.ids])
        table = self._table(responses, rewards)
        self._judge(responses, table, first, group)
        for name, value in metrics_of(table, self.reward_functions.names, group).items():
            self._metrics[mode][name].append(value)
        if self.penalty_in_reward and self.args.beta > 0:
            tokens = table.lengths.sum().clamp(min=1)
            self._metrics[mode]["kl"].append(float(table.kl.sum() / tokens))
        if self.args.log_completions:
            self._note_completions(rows, responses, texts, table)
        return responses

    def _score(
        self, rows: list[dict[str, Any]], responses: list[Response], mode: str
    ) -> tuple[list[Any], Tensor]:
        extras = {
            "trainer_state": self.state,
            "log_extra": self._extra_columns.__setitem__,
            "log_metric": lambda name, value: self._metrics[mode][name].append(float(value)),
        }
        return score(self.reward_functions, rows, responses, self.processing_class, extras)

    def _table(self, responses: list[Response], rewards: Tensor) -> Table:
        """Of all processes."""
        own = [
            (
                reward,
                sum((each.sampled_logps - each.constants["reference_logps"]).tolist())
                if "reference_logps" in each.constants
                else 0.0,
                len(each.ids),
                each.truncated,
            )
            for each, reward in zip(responses, rewards.tolist(), strict=True)
        ]
        everything = gather_object(own) if self.accelerator.num_processes > 1 else own
        per_function, kl, lengths, truncated = zip(*everything, strict=True)
        values = torch.tensor(per_function, dtype=torch.float32)
        return Table(
            values,
            self.reward_functions.weighted(values),
            torch.tensor(kl),
            torch.tensor(lengths),
            torch.tensor(truncated),
        )

    def _measure(self, responses: list[Response]) -> None:
        """The reference's log-probs, where there is one; the policy's own, where the engine's do not stand for them."""
        if self.args.beta > 0:
            with self._reference() as model:
                self._measure_by(model, responses, "reference_logps")
        if not self._needs_own_logps():
            return
        was_training = self._policy.training
        self._policy.eval()
        self._measure_by(self.model_wrapped, responses, "old_logps")
        self._policy.train(was_training)
        if self.args.vllm_importance_sampling_correction:
            for each in responses:
                each.constants["importance_sampling_ratio"] = sampling_correction(
                    each.constants["old_logps"],
                    each.sampled_logps,
                    mode=self.args.vllm_importance_sampling_mode,
                    clip_max=self.args.vllm_importance_sampling_clip_max,
                    counts=torch.tensor([len(each.ids)]),
                )

    def _needs_own_logps(self) -> bool:
        """What was sampled in another precision serves only in the step right after it, whose ratio is 1 anyway."""
        args = self.args
        if args.vllm_importance_sampling_correction:
            return True
        precise = self._writer.is_own and not (args.bf16 or args.fp16)
        assert args.steps_per_generation is not None
        return args.steps_per_generation > args.gradient_accumulation_steps and not precise

    def _measure_by(
        self,
        model: nn.Module,
        responses: list[Response],
        name: str,
        measure: Callable[[dict[str, Any], Projection], Tensor] | None = None,
    ) -> None:
        """Sets a constant of responses, `[R]` of the tokens of a batch: by default their log-probs."""
        args = self.args
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        for start in range(0, len(responses), size):
            part = responses[start : start + size]
            inputs = self._prepare_inputs(self._collate(part))
            with self.compute_loss_context_manager():
                values = self._project(model, inputs, partial(measure or self._token_logps, inputs))
            for each, own in zip(
                part, values.float().cpu().split([len(each.ids) for each in part]), strict=True
            ):
                each.constants[name] = own.clone()

    def _token_logps(self, inputs: dict[str, Any], projection: Projection) -> Tensor:
        return projection.token_logps(completion_rows(inputs), self.args.temperature)

    def _note_completions(
        self, rows: list[dict[str, Any]], responses: list[Response], texts: list[Any], table: Table
    ) -> None:
        own = [
            (rows[each.group]["prompt"], text, float(each.constants["advantages"].float().mean()))
            for each, text in zip(responses, texts, strict=True)
        ]
        everything = gather_object(own) if self.accelerator.num_processes > 1 else own
        prompts, completions, advantages = zip(*everything, strict=True)
        names = self.reward_functions.names
        columns = dict(zip(names, table.per_function.T.tolist(), strict=True))
        extra = {k: v for k, v in self._extra_columns.items() if len(v) == len(prompts)}
        self._completions.add(
            self.state.global_step,
            prompts,
            completions,
            {**columns, **extra, "advantage": advantages},
        )
        self._extra_columns.clear()
