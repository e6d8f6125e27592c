"""Who computes log-probs of labels from logits, and the inputs they are measured on."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Prepare, Work
from torch import Tensor

from pyfast_dpo import token_logps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRL = "TRL selective_log_softmax"


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    vocab: int
    dtype: str

    def __str__(self) -> str:
        return f"[{self.rows}, {self.vocab}] {self.dtype}"

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * DTYPES[self.dtype].itemsize


# --- contenders: logits [N, V] and labels [N] -> log-probs [N] ------------------------------------


def ours(logits: Tensor, labels: Tensor) -> Tensor:
    return token_logps(logits, labels, inplace_backward=True)


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def float_log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return log_softmax_gather(logits.float(), labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits, labels, reduction="none")


def float_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.float(), labels)


def trl_selective_log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """As TRL's DPO trainer calls it, [B, T, V]: one pair. Faster than [N, V], where it loops over N."""
    selective_log_softmax = importlib.import_module("trl.trainer.utils").selective_log_softmax
    pair = logits.unflatten(0, (2, -1)), labels.unflatten(0, (2, -1))
    return selective_log_softmax(*pair).flatten()


@dataclasses.dataclass(frozen=True)
class Peer:
    function: Callable[[Tensor, Tensor], Tensor]
    targets: dict[str, float | None]  # dtype -> speed-up to reach; only these dtypes are measured
    color: str


PEERS = {
    "log_softmax + gather": Peer(log_softmax_gather, {"float32": 12, "bfloat16": 25}, "#4878a8"),
    "float() log_softmax + gather": Peer(float_log_softmax_gather, {"bfloat16": 25}, "#8fb1d0"),
    "cross_entropy": Peer(cross_entropy, {"float32": 8, "bfloat16": 8}, "#d1803f"),
    "float() cross_entropy": Peer(float_cross_entropy, {"bfloat16": None}, "#e8b98f"),
    TRL: Peer(trl_selective_log_softmax, {"float32": 8, "bfloat16": 4}, "#5a9a68"),
}


def find_missing() -> dict[str, str]:
    """Peers that cannot run here, with the reason."""
    try:
        importlib.import_module("trl.trainer.utils").selective_log_softmax  # noqa: B018
    except (ImportError, RuntimeError, AttributeError) as error:
        return {TRL: f"{type(error).__name__}: {error}".splitlines()[0]}
    return {}


def peers_of(case: Case, missing: dict[str, str]) -> dict[str, Peer]:
    return {k: p for k, p in PEERS.items() if case.dtype in p.targets and k not in missing}


class Workload:
    """Inputs of a case, and the calls that are measured on them."""

    def __init__(self, case: Case) -> None:
        random = torch.Generator().manual_seed(0)
        rows, vocab = case.rows, case.vocab
        self.source = torch.randn(rows, vocab, generator=random).mul_(4).to(DTYPES[case.dtype])
        self.labels = torch.randint(vocab, (rows,), generator=random)
        self.coefficients = torch.randn(rows, generator=random)  # not all ones: as a loss sends
        self.logits = self.source.clone()

    def fresh_leaf(self) -> Tensor:
        """The same memory every time, so that no contender pays for first touching it."""
        self.logits.copy_(self.source)
        return self.logits.detach().requires_grad_()

    def floor(self, operation: Callable[[Tensor], object]) -> Prepare:
        def prepare() -> Work:
            numbers = self.fresh_leaf().detach().flatten().view(torch.float32)  # the same bytes
            return lambda: operation(numbers)

        return prepare

    def forward(self) -> Work:
        leaf = self.fresh_leaf()

        @torch.no_grad()
        def work() -> Tensor:
            return token_logps(leaf, self.labels)

        return work

    def forward_backward(self, function: Callable[[Tensor, Tensor], Tensor]) -> Prepare:
        def prepare() -> Work:
            leaf = self.fresh_leaf()

            def work() -> None:
                logps = function(leaf, self.labels)
                logps.backward(self.coefficients.to(logps.dtype))

            return work

        return prepare
