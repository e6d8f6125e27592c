"""How prompts and their responses lie in one row of tokens: `prompt | response | response | prompt | ...`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Group(NamedTuple):
    """A prompt and the responses to it, which follow it in the row. Lengths in tokens."""

    prompt: int
    responses: tuple[int, ...]

    def blocks(self) -> list[int]:
        """Tokens of the prompt with its first response, then of every other response."""
        return [self.prompt + sum(self.responses[:1]), *self.responses[1:]]


class Sequences(NamedTuple):
    """A row for attention that takes sequences of any lengths: a block is a sequence of queries, and its keys
    are the block, for another response the prompt before it again. T tokens, K keys, N sequences."""

    keys: Tensor  # [K] int64: the position of each key in the row
    query_ends: Tensor  # [N + 1] int32: tokens before each sequence
    key_ends: Tensor  # [N + 1] int32: keys before each sequence
    max_queries: int
    max_keys: int
    first_places: Tensor  # [T] int64: where among the keys each position stands first
    # (places among the keys, positions in the row) of the other times; no position twice in one of them
    repeats: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, eq=False)
class SharedPromptLayout:
    """What attention must know of a row: its groups, in order; numbers on the host.

    Every response sees its prompt and itself, causally; nothing else. With `positions`, where every
    response counts on from the end of its prompt, a model computes for each token what it would compute
    for the separate sequence prompt + response.
    """

    groups: tuple[Group, ...]
    _masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    _sequences: dict[torch.device, Sequences] = field(default_factory=dict, init=False, repr=False)
    _blocks: list[Tensor] = field(default_factory=list, init=False, repr=False)

    @property
    def tokens(self) -> int:
        return sum(group.prompt + sum(group.responses) for group in self.groups)

    def positions(self) -> Tensor:
        """`[tokens]` int64."""
        parts = []
        for group in self.groups:
            parts.append(torch.arange(group.prompt))
            parts += [torch.arange(group.prompt, group.prompt + n) for n in group.responses]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def mask(
        self,
        queries: int,
        keys: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """`[queries, keys]`: 0 where a query sees a key, else -inf; the queries are the last of the keys.

        Every layer asks for those of the same few blocks, in the forward pass and again when it is
        recomputed, so they are kept as long as the batch.
        """
        key = (queries, keys, window, dtype, device)
        if key not in self._masks:
            place = torch.arange(keys, device=device)
            ahead = place - place[keys - queries :].unsqueeze(1)
            hidden = ahead > 0
            if window is not None:
                hidden |= ahead <= -window
            zeros = torch.zeros(queries, keys, dtype=dtype, device=device)
            self._masks[key] = zeros.masked_fill(hidden, -torch.inf)
        return self._masks[key]

    def blocks(self) -> Tensor:
        """`[B, 4]` int64 on the CPU, of every block that is not empty: its first token, its tokens, the first
        token of the prompt that it sees beside itself, and that prompt's tokens. Kept, like the masks."""
        if not self._blocks:
            rows = [row for _, *row in _blocks_of(self.groups)]
            self._blocks.append(torch.tensor(rows, dtype=torch.int64).view(-1, 4))
        return self._blocks[0]

    def sequences(self, device: torch.device) -> Sequences:
        """Kept as long as the batch, like the masks: every layer asks for the same."""
        if device not in self._sequences:
            self._sequences[device] = _sequences_of(self.groups, device)
        return self._sequences[device]


def _blocks_of(groups: Sequence[Group]) -> Iterator[tuple[int, int, int, int, int]]:
    """Of every block that is not empty: its number in its group, its first token, its tokens, the first token
    of the prompt that it sees beside itself, that prompt's tokens."""
    start = 0
    for group in groups:
        prompt = start
        for number, size in enumerate(group.blocks()):
            if size > 0:
                yield number, start, size, prompt, group.prompt if number > 0 else 0
            start += size


def _sequences_of(groups: Sequence[Group], device: torch.device) -> Sequences:
    keys: list[np.ndarray] = []
    first_places: list[np.ndarray] = []
    repeats: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # by response after the first
    queries, key_counts = [0], [0]
    place = 0  # of the next key
    for number, start, size, prompt, prompt_tokens in _blocks_of(groups):
        own, before = np.arange(start, start + size), np.arange(prompt, prompt + prompt_tokens)
        own_place = place + prompt_tokens
        if prompt_tokens:
            repeats.setdefault(number, []).append((np.arange(place, own_place), before))
        keys += [before, own]
        first_places.append(np.arange(own_place, own_place + size))
        queries.append(size)
        key_counts.append(prompt_tokens + size)
        place = own_place + size

    def joined(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *arrays])).to(device)

    def ends(sizes: list[int]) -> Tensor:
        return torch.from_numpy(np.cumsum(sizes, dtype=np.int32)).to(device)

    return Sequences(
        joined(keys),
        ends(queries),
        ends(key_counts),
        max(queries),
        max(key_counts),
        joined(first_places),
        tuple(
            (joined([places for places, _ in pairs]), joined([own for _, own in pairs]))
            for _, pairs in sorted(repeats.items())
        ),
    )


@dataclass(frozen=True, eq=False)
class SharedPromptRow:
    """Sequences packed into a row, and where their scored tokens are."""

    layout: SharedPromptLayout
    tokens: Tensor  # [T] int64
    index: Tensor  # [R] int64: the position whose hidden state scores each scored token
    targets: Tensor  # [R] int64: the scored tokens, one sequence after the other
    lengths: tuple[int, ...]  # scored tokens of every sequence
    sequences: tuple[tuple[slice, slice], ...]  # prompt and response of every sequence

    def uses(self, first: int, last: int) -> Tensor:
        """`[T]` float32: of how many of the sequences [first, last) every token is."""
        counts = np.zeros(len(self.tokens), dtype=np.float32)
        for parts in self.sequences[first:last]:
            for part in parts:
                counts[part] += 1
        return torch.from_numpy(counts)


def pack_row(
    prompts: Sequence[Any], responses: Sequence[Any], masks: Sequence[Any] | None = None
) -> SharedPromptRow:
    """Packs sequences prompt + response into one row, each different prompt once, each response to it once.

    Args:
        prompts, responses: token ids of S sequences, one-dimensional arrays or lists of ints.
        masks: for each response which of its tokens are scored (1 or True), or None for all of them.

    Returns:
        The row. The token after a prompt is scored by the prompt's last position, once for every response,
        so `index` repeats that position. A response to an empty prompt has nothing that scores its first
        token, as in the padded layout.
    """
    groups: dict[bytes, tuple[Any, dict[bytes, Any]]] = {}  # by prompt; its responses, by response
    keys = []
    for prompt, response in zip(prompts, responses, strict=True):
        prompt, response = (np.asarray(ids, dtype=np.int64) for ids in (prompt, response))
        key = prompt.tobytes(), response.tobytes()
        groups.setdefault(key[0], (prompt, {}))[1].setdefault(key[1], response)
        keys.append(key)

    start = 0
    pieces, shapes = [], []
    places: dict[tuple[bytes, bytes], tuple[np.ndarray, np.ndarray]] = {}
    parts: dict[tuple[bytes, bytes], tuple[slice, slice]] = {}
    for prompt_key, (prompt, answers) in groups.items():
        pieces.append(prompt)
        prompt_end = start + len(prompt)
        begin = prompt_end
        for response_key, response in answers.items():
            pieces.append(response)
            index = np.arange(begin - 1, begin + len(response) - 1)
            if len(index):
                index[0] = prompt_end - 1
            first = 0 if len(prompt) else 1
            places[prompt_key, response_key] = index[first:], response[first:]
            own = slice(begin, begin + len(response))
            parts[prompt_key, response_key] = slice(start, prompt_end), own
            begin += len(response)
        shapes.append(Group(len(prompt), tuple(len(r) for r in answers.values())))
        start = begin

    scored = [places[key] for key in keys]
    for i, mask in enumerate(masks or ()):
        if mask is not None:
            index, targets = scored[i]
            kept = np.asarray(mask, dtype=bool)[len(mask) - len(index) :]
            scored[i] = index[kept], targets[kept]

    def joined(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *arrays]))

    return SharedPromptRow(
        SharedPromptLayout(tuple(shapes)),
        joined(pieces),
        joined([index for index, _ in scored]),
        joined([targets for _, targets in scored]),
        tuple(len(index) for index, _ in scored),
        tuple(parts[key] for key in keys),
    )
