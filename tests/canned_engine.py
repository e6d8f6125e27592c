"""An engine whose responses depend on nothing but the prompt, the place in its group and the version of the weights."""

from __future__ import annotations

import random
import string
from dataclasses import replace

import torch

from pyfast_dpo.rollout import Completion

EOS = 1
LETTERS = list(range(5, 31))  # of tiny_models' tokenizer


def response(prompt: list[int], place: int, version: int, most: int = 8) -> list[int]:
    """Of 1 to `most` letters; about half of them end."""
    draw = random.Random(repr((list(prompt), place, version)))
    ids = [draw.choice(LETTERS) for _ in range(draw.randint(1, most - 1))]
    return [*ids, EOS] if draw.random() < 0.5 else ids


class CannedEngine:
    """Says of every token that its log-prob was -1."""

    def __init__(self, write=response) -> None:
        self.version, self._write = 0, write

    def generate(self, prompts, n, sampling):
        return [
            [self._completion(self._write(prompt, place, self.version)) for place in range(n)]
            for prompt in prompts
        ]

    def update_weights(self, model, version):
        self.version = version

    def _completion(self, ids):
        reason = "stop" if ids[-1:] == [EOS] else "length"
        return Completion(ids, [-1.0] * len(ids), reason, self.version)


class TruthfulEngine(CannedEngine):
    """Says the log-probs that the model gives its words."""

    def generate(self, prompts, n, sampling):
        answers = super().generate(prompts, n, sampling)
        return [
            [replace(each, logprobs=self._logprobs(prompt, each.ids)) for each in answer]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def update_weights(self, model, version):
        super().update_weights(model, version)
        self._model = model

    @torch.no_grad()
    def _logprobs(self, prompt, ids):
        logits = self._model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def vowels(completions, **others) -> list[float]:
    """The share of vowels among the words of a text."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [sum(word in "aeiou" for word in t.split()) / max(1, len(t.split())) for t in texts]


def longer(completion_ids, **others) -> list[float]:
    """No reward is the mean of others, where advantages of 0 would hang on the last bit."""
    return [len(ids) ** 0.5 / 3 for ids in completion_ids]


def make_prompts(count: int = 16) -> list[dict[str, object]]:
    """Of unlike lengths, each with a column of its own."""
    letters = string.ascii_lowercase
    return [
        {"prompt": " ".join(letters[i % 20 : i % 20 + 2 + i % 4]), "number": i}
        for i in range(count)
    ]
