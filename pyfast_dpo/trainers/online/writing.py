"""Who writes a rollout: the engine, the share of every process, seeds that make a run repeat."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from pyfast_dpo.rollout import Completion, Engine, TransformersEngine, check_completions
from pyfast_dpo.trainers.online.config import OnlineConfig
from pyfast_dpo.trainers.online.rollouts import Response

Share = list[tuple[int, int]]  # (group, how many responses of it)


def share_of(groups: int, size: int, rank: int, world: int) -> tuple[int, Share]:
    """(number of the first response, its groups) of a process: the responses of all groups stand one after the other
    and are cut into as many parts. So a group is cut at most where two processes meet."""
    first, last = (groups * size * end // world for end in (rank, rank + 1))
    share = []
    for group in range(groups):
        count = min(last, (group + 1) * size) - max(first, group * size)
        if count > 0:
            share.append((group, count))
    return first, share


def seed_of(*parts: Any) -> int:
    """The same for the same parts, on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


class Writer:
    """Writes responses with the policy of this very step.

    An engine in this process writes the share of this process. Another one is told the weights by the main process,
    which asks it for the responses of all.

    Args:
        name: of the trainer, for errors.
        engine: None for a `TransformersEngine` around the policy.
        autocast: as the policy is trained.
    """

    def __init__(
        self,
        name: str,
        engine: Engine | None,
        model: Any,
        args: OnlineConfig,
        accelerator: Accelerator,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> None:
        if engine is None:
            engine = TransformersEngine(model, max_rows=args.max_rollout_rows)
        for method in ("generate", "update_weights"):
            if not callable(getattr(engine, method, None)):
                raise TypeError(
                    f"{name}: engine must have the methods generate and update_weights, got {type(engine).__name__}"
                )
        self.engine, self.is_own = engine, isinstance(engine, TransformersEngine)
        self._name, self._args, self._accelerator, self._autocast = (
            name,
            args,
            accelerator,
            autocast,
        )

    def update(self, model: Any, version: int) -> None:
        """From now on the responses are of this policy."""
        self._version = version
        if self.is_own or self._accelerator.is_main_process:
            self.engine.update_weights(model, version)

    def write(self, prompts: Sequence[list[int]], share: Share, *seed: Any) -> list[Response]:
        """The responses of this process's share, groups in order; `prompts` are those of all groups."""
        if self.is_own or self._accelerator.num_processes == 1:
            return self._ask(prompts, share, *seed, self._accelerator.process_index)
        shares: list[Share] = gather_object([share])
        written: list[Any] = [None]
        if self._accelerator.is_main_process:
            sizes: Counter[int] = Counter()
            for each in shares:
                sizes.update(dict(each))
            everything = iter(self._ask(prompts, sorted(sizes.items()), *seed))
            written = [[list(islice(everything, sum(dict(each).values()))) for each in shares]]
        broadcast_object_list(written)
        return written[0][self._accelerator.process_index]

    def _ask(self, prompts: Sequence[list[int]], share: Share, *seed: Any) -> list[Response]:
        responses: list[Response] = []
        for count in sorted({count for _, count in share}):
            groups = [group for group, own in share if own == count]
            asked = [prompts[group] for group in groups]
            sampling = self._args.sampling(seed_of(self._args.seed, *seed, count))
            with self._autocast():
                answers: list[list[Completion]] = self.engine.generate(asked, count, sampling)
            check_completions(self._name, answers, len(asked), count, sampling, self._version)
            for group, prompt, answer in zip(groups, asked, answers, strict=True):
                responses += [Response.of(group, prompt, completion) for completion in answer]
        return sorted(responses, key=lambda each: each.group)
