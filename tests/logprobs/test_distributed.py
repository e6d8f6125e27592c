"""Several processes (gloo) give what one process gives: a divided vocabulary, DDP and FSDP2.

One set of four processes runs every check and saves its results; the tests compare them.
"""

from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from _helpers import name_of
from linear_problem import problem
from torch import Tensor, nn

from pyfast_dpo import fused_linear_dpo_loss, linear_sequence_logps, linear_token_logps
from pyfast_dpo.logprobs.vocab_parallel import (
    vocab_parallel_sequence_logps,
    vocab_parallel_token_logps,
)

pytestmark = pytest.mark.slow  # four processes
RANKS, VOCAB = 4, 212
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
OPTIONS = [
    ({}, "plain"),
    ({"shift": True, "max_chunk_bytes": 8 * VOCAB}, "one row at a time"),
    ({"softcap": 5.0, "logit_scale": 0.7}, "soft-capped and scaled"),
]
SHARDS = {"2 ranks": [100, 112], "4 ranks": [53, 53, 53, 53], "4 uneven ranks": [1, 90, 20, 101]}


def inputs_of(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return problem(vocab=VOCAB, dtype=dtype)


def upstream(labels: Tensor) -> Tensor:
    return torch.linspace(-2, 3, labels.numel()).view(labels.shape)


SPECIAL = [
    ("one part of the vocabulary is impossible", (slice(53, 106), -math.inf), 5),
    ("the target's part is impossible but for it", (slice(54, 106), -math.inf), 53),
    ("the target is impossible", (slice(7, 8), -math.inf), 7),
    ("nothing is possible", (slice(0, VOCAB), -math.inf), 7),
    ("NaN in another part", (slice(200, 201), math.nan), 7),
    ("+inf in another part", (slice(200, 201), math.inf), 7),
    ("certain by 20 nats", (slice(7, 8), 20.0), 7),
    ("certain by 40 nats", (slice(7, 8), 40.0), 7),
    ("no such token", (slice(0, 1), 0.0), VOCAB + 3),
]


def special_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of one hidden state each, whose logits are the bias of its own."""
    bias = torch.zeros(len(SPECIAL), VOCAB)
    for row, (_, (where, value), _) in enumerate(SPECIAL):
        bias[row, where] = value
    return torch.zeros(1, 1, 1), torch.zeros(VOCAB, 1), bias, torch.tensor([s[2] for s in SPECIAL])


class Model(nn.Module):
    """The loss is computed inside forward: where FSDP2 has gathered the weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 16)
        self.body = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, VOCAB, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = self.body(self.embedding(tokens)).tanh()
        return fused_linear_dpo_loss(
            hidden, self.lm_head.weight, labels, max_chunk_bytes=8 * VOCAB * 9
        ).loss


def batch() -> tuple[Tensor, Tensor]:
    """Four pairs of the same lengths, chosen first."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (8, 7), generator=generator)
    labels = torch.randint(0, VOCAB, (8, 7), generator=generator)
    labels[:, :3] = -100
    return tokens, labels


def pairs_of(rank: int, values: Tensor) -> Tensor:
    chosen, rejected = values.chunk(2)
    return torch.cat([chosen[2 * rank : 2 * rank + 2], rejected[2 * rank : 2 * rank + 2]])


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    results: dict[str, object] = {}
    groups = {"2 ranks": dist.new_group([0, 1])}
    for name, sizes in SHARDS.items():
        if rank >= len(sizes):
            continue
        first = sum(sizes[:rank])
        own = slice(first, first + sizes[rank])
        for dtype in DTYPES:
            for options, what in OPTIONS:
                hidden, weight, bias, labels = inputs_of(dtype)
                leaves = [t.clone().requires_grad_() for t in (hidden, weight[own], bias[own])]
                shared = {"group": groups.get(name), **options}
                if name != "4 ranks":
                    shared["vocab_start"] = first
                logps = vocab_parallel_token_logps(
                    leaves[0], leaves[1], labels, bias=leaves[2], **shared
                )
                (logps * upstream(labels)).sum().backward()
                sequences = vocab_parallel_sequence_logps(
                    hidden, weight[own], labels, bias=bias[own], average=True, **shared
                )
                gradients = [leaf.grad for leaf in leaves]
                results[f"{name} {dtype} {what}"] = (logps.detach(), sequences, *gradients)
    hidden, weight, bias, labels = special_rows()
    own = slice(53 * rank, 53 * rank + 53)
    results["special"] = torch.stack([
        vocab_parallel_token_logps(hidden, weight[own], label.view(1, 1), bias=row[own]).flatten()
        for row, label in zip(bias, labels, strict=True)
    ])  # fmt: skip
    if rank < 2:
        results.update(data_parallel(rank, groups["2 ranks"]))
    dist.barrier()
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def data_parallel(rank: int, group: dist.ProcessGroup) -> dict[str, object]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    tokens, labels = (pairs_of(rank, values) for values in batch())
    results: dict[str, object] = {}
    model = DistributedDataParallel(Model(), process_group=group)
    loss = model(tokens, labels)
    loss.backward()
    results["DDP"] = {n: p.grad for n, p in model.module.named_parameters()}
    sharded = fully_shard(Model(), mesh=DeviceMesh.from_group(group, "cpu"))
    try:
        fused_linear_dpo_loss(torch.zeros(2, 7, 16), sharded.lm_head.weight, labels[:2])
    except TypeError as error:
        results["outside"] = str(error)
    sharded(tokens, labels).backward()
    results["FSDP2"] = {n: p.grad.full_tensor() for n, p in sharded.named_parameters()}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (str(folder), port), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("options, what", OPTIONS, ids=[o[1] for o in OPTIONS])
@pytest.mark.parametrize("ranks", SHARDS)
def test_a_divided_vocabulary_gives_what_one_process_gives(results, ranks, options, what, dtype):
    hidden, weight, bias, labels = inputs_of(dtype)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logps = linear_token_logps(leaves[0], leaves[1], labels, bias=leaves[2], **options)
    (logps * upstream(labels)).sum().backward()
    sequences = linear_sequence_logps(hidden, weight, labels, bias=bias, average=True, **options)
    count = len(SHARDS[ranks])
    own = [results[rank][f"{ranks} {dtype} {what}"] for rank in range(count)]
    for other in own[1:]:
        for i in range(3):
            assert torch.equal(own[0][i], other[i]), (
                "every rank has the same log-probs and gradient"
            )
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    if dtype == torch.float64:
        tolerance = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(own[0][0], logps.detach(), **tolerance)
    torch.testing.assert_close(own[0][1], sequences, **tolerance)
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 2**-7, "atol": 2**-8 * leaves[0].grad.abs().max().item()}
    torch.testing.assert_close(own[0][2], leaves[0].grad, **tolerance)
    torch.testing.assert_close(torch.cat([r[3] for r in own]), leaves[1].grad, **tolerance)
    torch.testing.assert_close(torch.cat([r[4] for r in own]), leaves[2].grad, **tolerance)


@pytest.mark.parametrize("row", range(len(SPECIAL)), ids=[s[0] for s in SPECIAL])
def test_special_rows_have_the_answers_of_one_process(results, row):
    hidden, weight, bias, labels = special_rows()
    ours = results[0]["special"][row]
    if labels[row] >= VOCAB:
        assert ours.isnan().all()
        return
    truth = linear_token_logps(hidden, weight, labels[row].view(1, 1), bias=bias[row]).flatten()
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_two_processes_have_the_gradients_of_one(results, wrapper):
    model = Model()
    model(*batch()).backward()
    for rank in (0, 1):
        gradients = results[rank][wrapper]
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_a_sharded_weight_outside_forward_is_refused_with_the_remedy(results):
    for word in ("DTensor", "full_tensor", "forward", "pyfast_dpo.distributed"):
        assert word in results[0]["outside"]
