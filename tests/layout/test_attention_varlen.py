"""Rows of shared prompts in one attention call: what the kernel is given, with a plain one in its place."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from model_families import MODELS, PROMPTS, make, packed

from pyfast_dpo.layout import attention_cpu, attention_varlen
from pyfast_dpo.layout.attention import use_shared_prompt_attention
from pyfast_dpo.layout.attention_blocks import Scores, attend_by_blocks
from pyfast_dpo.layout.shared_prompt import Group, SharedPromptLayout, pack_row

PLAIN = Scores(None, 0.0, None, None)


def plain_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    scale=None, window_size=(-1, -1), enable_gqa=False, aligned_with_end=True,
):  # fmt: skip
    """What `torch.nn.attention.attention_varlen.varlen_attn` documents, sequence by sequence."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    outputs = []
    for n in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[n] : cu_seq_q[n + 1]].transpose(0, 1)
        k, v = (t[cu_seq_k[n] : cu_seq_k[n + 1]].transpose(0, 1) for t in (key, value))
        assert q.shape[1] <= max_q and k.shape[1] <= max_k
        own = torch.arange(q.shape[1])
        if aligned_with_end:
            own = own + k.shape[1] - q.shape[1]
        behind = own.unsqueeze(1) - torch.arange(k.shape[1])
        left, right = window_size
        seen = (behind >= -right) & ((behind <= left) if left >= 0 else True)
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the calls of the plain kernel, which serves everything that the real one would on CUDA."""
    seen = []

    def kernel(*arguments, **options):
        seen.append((arguments, options))
        return plain_kernel(*arguments, **options)

    kernel.__signature__ = inspect.signature(plain_kernel)
    monkeypatch.setattr(attention_varlen, "kernel", lambda: kernel)
    monkeypatch.setattr(attention_cpu, "takes", lambda *_: False)
    monkeypatch.setattr(
        attention_varlen,
        "takes",
        lambda q, k, scores: not scores.dropout and scores.softcap is None,
    )
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_one_call_a_layer_gives_hidden_states_and_gradients_of_the_blocks(name, calls, monkeypatch):
    model = make(name)
    use_shared_prompt_attention(model)

    def results():
        model.zero_grad()
        hidden = packed(model)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        return [
            hidden.detach(),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]

    ours = results()
    layers = model.config.num_hidden_layers
    assert len(calls) == (0 if name == "gemma2 soft-cap" else layers), "one call a layer"
    monkeypatch.setattr(attention_varlen, "takes", lambda *_: False)
    for result, expected in zip(ours, results(), strict=True):
        difference = float((result - expected).abs().max() / (expected.abs().max() + 1e-6))
        assert difference < 1e-4, f"relative difference {difference:.2g}"


def test_arguments_fit_the_kernel_of_the_installed_torch(calls):
    real = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    model = make("mistral sliding window")
    use_shared_prompt_attention(model)
    packed(model)
    arguments, options = calls[0]
    inspect.signature(real).bind(*arguments, **options)
    assert options["window_size"] == (4, 0), "5 positions, the query's own among them"


def test_keys_of_a_prompt_stand_again_before_every_other_response():
    layout = SharedPromptLayout(
        (Group(2, (1, 2, 1)), Group(1, (1,)), Group(0, (1, 2)), Group(0, (0, 1)))
    )
    sequences = layout.sequences(torch.device("cpu"))
    assert sequences.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1, 5, 6, 7, 8, 9, 10, 11]
    assert sequences.query_ends.tolist() == [0, 3, 5, 6, 8, 9, 11, 12]
    assert sequences.key_ends.tolist() == [0, 3, 7, 10, 12, 13, 15, 16]
    assert (sequences.max_queries, sequences.max_keys) == (3, 4)
    assert sequences.keys[sequences.first_places].tolist() == list(range(layout.tokens))
    assert [(a.tolist(), b.tolist()) for a, b in sequences.repeats] == [([3, 4], [0, 1]), ([7, 8], [0, 1])]  # fmt: skip
    assert layout.sequences(torch.device("cpu")) is sequences, "made once a batch"


def test_gradients_of_repeated_keys_are_those_of_index_select():
    sequences = pack_row(PROMPTS, [[1], [2, 3], [4], [5], [6]]).layout.sequences(
        torch.device("cpu")
    )
    values = torch.randn(len(sequences.first_places), 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v: attention_varlen._RepeatPrompts.apply(v, sequences), (values,)
    )


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


@pytest.mark.parametrize(
    "kernel, message",
    [
        (lambda *a, **k: plain_kernel(*a, **k, aligned_with_end=False), "differs by"),
        (lambda *a, **k: _NanGradient.apply(plain_kernel(*a, **k)), "differs by nan"),
        (lambda *a, **k: torch.zeros(0).index_select(0, a[3]), "Error"),
    ],
    ids=["causal from the start of the keys", "gradients that are not a number", "raises"],
)  # fmt: skip
def test_a_kernel_that_does_otherwise_is_announced_and_not_used(kernel, message, monkeypatch):
    kernel.__signature__ = inspect.signature(plain_kernel)
    monkeypatch.setattr(attention_varlen, "kernel", lambda: kernel)
    attention_varlen._agrees.cache_clear()
    arguments = torch.device("cpu"), torch.float32, 4, 2, 8, PLAIN
    with pytest.warns(UserWarning, match=f"one attention call a response.*{message}"):
        assert not attention_varlen._agrees(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not attention_varlen._agrees(*arguments), "and announced once"
    attention_varlen._agrees.cache_clear()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_kernel_passes_its_check(dtype, window, monkeypatch):
    monkeypatch.setattr(attention_varlen, "kernel", lambda: plain_kernel)
    attention_varlen._agrees.cache_clear()
    scores = PLAIN._replace(window=window, scaling=0.3)
    state = torch.get_rng_state()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention_varlen._agrees(torch.device("cpu"), dtype, 4, 2, 8, scores)
    assert torch.equal(torch.get_rng_state(), state), "the check takes no random numbers"
    attention_varlen._agrees.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 5])
def test_on_cuda_one_call_is_used_and_gives_what_the_blocks_give(window):
    layout = SharedPromptLayout((Group(33, (20, 41, 7)), Group(5, (64, 3)), Group(1, (1,))))
    scores = PLAIN._replace(window=window)

    def draw(heads):
        return torch.randn(
            1, heads, layout.tokens, 64, device="cuda", dtype=torch.bfloat16
        ).requires_grad_()

    leaves = draw(4), draw(2), draw(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if attention_varlen.kernel() is not None:
            assert attention_varlen.takes(leaves[0], leaves[1], scores)
        else:
            pytest.skip("this torch has no variable-length attention with windows")
    results = []
    for attend in (attention_varlen.attend_at_once, attend_by_blocks):
        output = attend(*leaves, layout, scores)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        difference = (ours.float() - expected.float()).norm() / expected.float().norm()
        assert difference < 0.02, f"relative difference {difference:.2g}"
