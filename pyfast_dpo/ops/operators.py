"""The compiled operators for torch: fake implementations (shapes), autograd, and who may call them.

The schemas are in `csrc/torch/schema.cpp`; this is the only file that says `torch.ops.pyfast_dpo`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch  # loads libtorch, which _C links against
from torch import Tensor

from pyfast_dpo.ops import _C
from pyfast_dpo.ops.dtypes import statistics_dtype

if not _C.cpu_capability():
    raise ImportError(
        "pyfast_dpo: PYFAST_DPO_CPU_CAPABILITY must be one of "
        f"{_C.build_facts()['cpu_kernels']} and available; this CPU offers up to "
        f"{_C.best_cpu_capability()!r}, got {os.environ.get('PYFAST_DPO_CPU_CAPABILITY')!r}"
    )

_namespace = torch.ops.pyfast_dpo
seq_logp = _namespace.seq_logp
seq_logp_backward = _namespace.seq_logp_backward
seq_logp_backward_ = _namespace.seq_logp_backward_
seq_logp_backward_out = _namespace.seq_logp_backward_out
pair_loss = _namespace.pair_loss
unpaired_loss = _namespace.unpaired_loss
policy_loss = _namespace.policy_loss
gae = _namespace.gae
row_statistics = _namespace.row_statistics
scale_ = _namespace.scale_
head_logits_ = _namespace.head_logits_
head_grad_rows = _namespace.head_grad_rows
head_grad_weight_ = _namespace.head_grad_weight_
shared_prompt_attention = _namespace.shared_prompt_attention
linear_ = _namespace.linear_
linear_grad_rows = _namespace.linear_grad_rows
linear_grad_weight = _namespace.linear_grad_weight
silu_gate = _namespace.silu_gate
silu_gate_backward = _namespace.silu_gate_backward
rms_norm = _namespace.rms_norm
rms_norm_backward = _namespace.rms_norm_backward
HEAD_PANEL_ROWS: int = _C.head_panel_rows()  # the CPU's products take rows in such lots

Fake = TypeVar("Fake", bound=Callable[..., Any])
_HAS_KERNELS = {"cpu": True, "cuda": bool(_C.build_facts()["cuda"])}


def has_kernels(device_type: str) -> bool:
    return _HAS_KERNELS.get(device_type, False)


def _fake(name: str) -> Callable[[Fake], Fake]:
    """Registers what gives an operator's outputs their shapes, where a tensor has no data.

    A call that mixes real tensors and such ones comes here too: it must not get real outputs that nothing fills.
    """

    def register(function: Fake) -> Fake:
        arguments = getattr(_namespace, name).default._schema.arguments

        def checked(*args: Any, **options: Any) -> Any:
            given = {a.name: (a.type, v) for a, v in zip(arguments, args, strict=False)}
            tensors = [n for n, (kind, _) in given.items() if isinstance(kind, torch.TensorType)]
            missing = [n for n in tensors if given[n][1] is None]
            torch._check(not missing, lambda: f"pyfast_dpo::{name}: {missing} must not be None")
            devices = {n: v.device.type for n, (_, v) in given.items() if isinstance(v, Tensor)}
            if devices.get("blocks") == "cpu":
                del devices["blocks"]  # there whatever the others are on
            message = f"pyfast_dpo::{name}: tensors must be on one device, got {devices}"
            torch._check(len(set(devices.values())) <= 1, lambda: message)
            return function(*args, **options)

        torch.library.register_fake(f"pyfast_dpo::{name}", checked)
        return function

    return register


# --- log-probs of labels ------------------------------------------------------------------------


@_fake("seq_logp")
def _(logits, labels, ignore_index, shift, average, inplace_backward):
    torch._check(logits.dim() == 3, lambda: "pyfast_dpo::seq_logp: logits must be [B, T, V]")
    batch, length, _ = logits.shape
    per_row = [
        logits.new_empty((batch, length), dtype=statistics_dtype(logits.dtype)) for _ in range(3)
    ]
    per_sequence = [
        logits.new_empty((batch,), dtype=statistics_dtype(logits.dtype)) for _ in range(2)
    ]
    return per_sequence[0], *per_row, per_sequence[1]


@_fake("seq_logp_backward")
def _(
    grad_sequence,
    grad_token,
    logits,
    labels,
    token_logps,
    row_max,
    row_sum,
    sequence_scale,
    ignore_index,
    shift,
    out_dtype=None,
):
    return logits.new_empty(logits.shape, dtype=out_dtype)


@_fake("seq_logp_backward_")
@_fake("seq_logp_backward_out")
def _(*args):
    return None


def _seq_logp_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, labels, ctx.ignore_index, ctx.shift, _, ctx.inplace = inputs
    _, tokens, row_max, row_sum, scale = output
    ctx.mark_non_differentiable(row_max, row_sum, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, tokens, row_max, row_sum, scale)


def _seq_logp_backward(ctx: Any, grad_sequence: Tensor | None, grad_token: Tensor | None, *_: None):
    if grad_sequence is None and grad_token is None:
        return (None,) * 6
    args = (grad_sequence, grad_token, *ctx.saved_tensors, ctx.ignore_index, ctx.shift)
    if ctx.inplace and not torch.is_grad_enabled():
        # Writing through the saved tensor must count as a change of it, so that a second backward pass, or
        # another operator that saved the logits, raises instead of reading the gradient as logits.
        seq_logp_backward_(*args)
        logits = args[2]
        torch.autograd.graph.increment_version(logits)
        grad = logits.detach()
    else:
        grad = seq_logp_backward(*args)
    return grad, None, None, None, None, None


torch.library.register_autograd(
    "pyfast_dpo::seq_logp", _seq_logp_backward, setup_context=_seq_logp_setup
)


# --- losses on log-probs ------------------------------------------------------------------------


@_fake("pair_loss")
def _(policy_chosen, *rest):
    return tuple(torch.empty_like(policy_chosen) for _ in range(3))


@_fake("pair_loss_backward")
def _(grad_losses, policy_chosen, *rest):
    return torch.empty_like(policy_chosen), torch.empty_like(policy_chosen)


@_fake("unpaired_loss")
def _(policy, *rest):
    return torch.empty_like(policy), torch.empty_like(policy)


@_fake("unpaired_loss_backward")
def _(grad_losses, policy, *rest):
    return torch.empty_like(policy)


def _loss_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])  # rewards
    ctx.set_materialize_grads(False)
    ctx.tensor_count = sum(1 for value in inputs if value is None or isinstance(value, Tensor))
    ctx.options = inputs[ctx.tensor_count :]
    ctx.save_for_backward(*inputs[: ctx.tensor_count])


def _pair_loss_backward(ctx: Any, grad_losses: Tensor | None, *_: None):
    rest = (None,) * (ctx.tensor_count + len(ctx.options) - 2)
    if grad_losses is None:
        return None, None, *rest
    return (
        *_namespace.pair_loss_backward(grad_losses, *ctx.saved_tensors, *ctx.options),
        *rest,
    )


def _unpaired_loss_backward(ctx: Any, grad_losses: Tensor | None, *_: None):
    rest = (None,) * (ctx.tensor_count + len(ctx.options) - 1)
    if grad_losses is None:
        return None, *rest
    return _namespace.unpaired_loss_backward(grad_losses, *ctx.saved_tensors, *ctx.options), *rest


torch.library.register_autograd(
    "pyfast_dpo::pair_loss", _pair_loss_backward, setup_context=_loss_setup
)
torch.library.register_autograd(
    "pyfast_dpo::unpaired_loss", _unpaired_loss_backward, setup_context=_loss_setup
)


# --- losses of a policy, which hand their gradient on as coefficients of tokens -------------------------


@_fake("policy_loss")
def _(logps, old, reference, advantages, correction, mask, offsets, *options):
    per_token = [torch.empty_like(logps) for _ in range(4)]
    clipped = logps.new_empty(logps.shape, dtype=torch.int8)
    return logps.new_empty((offsets.shape[0] - 1,)), *per_token, clipped


@_fake("gae")
def _(rewards, values, *rest):
    return torch.empty_like(rewards, memory_format=torch.contiguous_format)


def _policy_loss_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], inputs[6], inputs[0])
    ctx.rest = (None,) * (len(inputs) - 1)


def _policy_loss_backward(ctx: Any, grad_sequences: Tensor | None, *_: None):
    if grad_sequences is None:
        return None, *ctx.rest
    return _PolicyLossGradient.apply(grad_sequences, *ctx.saved_tensors), *ctx.rest


class _PolicyLossGradient(torch.autograd.Function):
    """The coefficients depend on the log-probs, which are here so that a second derivative is refused."""

    @staticmethod
    def forward(
        grad_sequences: Tensor, coefficients: Tensor, offsets: Tensor, logps: Tensor
    ) -> Tensor:
        per_token = grad_sequences.repeat_interleave(
            offsets.diff(), output_size=coefficients.shape[0]
        )
        return per_token * coefficients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            "pyfast_dpo::policy_loss has no second derivative; use impl='torch' for double backward"
        )


torch.library.register_autograd(
    "pyfast_dpo::policy_loss", _policy_loss_backward, setup_context=_policy_loss_setup
)


@_fake("row_statistics")
def _(logits, targets, row_max=None):
    entropy, mean, log_sum_sq = (logits.new_empty((logits.shape[0],)) for _ in range(3))
    return entropy, mean, logits.new_empty((logits.shape[0],), dtype=torch.bool), log_sum_sq


@_fake("scale_")
def _(values, factor):
    return None


# --- the lm_head on the CPU: building blocks of pyfast_dpo.logprobs.linear, which has their gradients --------


@_fake("head_logits_")
def _(out, rows, weight):
    return None


@_fake("head_grad_rows")
def _(gradient, weight):
    return gradient.new_empty((gradient.shape[0], weight.shape[1]), dtype=torch.float32)


@_fake("head_grad_weight_")
def _(out, gradient, rows, accumulate, total):
    return None


# --- attention over rows of shared prompts, on the CPU ---------------------------------------------


@_fake("shared_prompt_attention")
def _(query, key, value, blocks, scale, window):
    tokens, heads, _ = query.shape
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        (heads, tokens), dtype=torch.float32
    )


@_fake("shared_prompt_attention_backward")
def _(grad_output, query, key, value, *rest):
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (query, key, value)
    )


def _attention_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, key, value, blocks, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, blocks)


def _attention_backward(ctx: Any, grad_output: Tensor, _: Any):
    gradients = _namespace.shared_prompt_attention_backward(
        grad_output, *ctx.saved_tensors, *ctx.options
    )
    return *gradients, None, None, None


torch.library.register_autograd(
    "pyfast_dpo::shared_prompt_attention", _attention_backward, setup_context=_attention_setup
)


# --- linear layers, on the CPU ------------------------------------------------------------------


@_fake("linear_")
def _(out, rows, weight, low_rows=None, low_weight=None):
    return None


@_fake("linear_grad_rows")
def _(gradient, weight, low_gradient=None, low_weight=None):
    return gradient.new_empty((gradient.shape[0], weight.shape[1]))


@_fake("linear_grad_weight")
def _(gradient, rows):
    return gradient.new_empty((gradient.shape[1], rows.shape[1]))


# --- gates of feed-forward layers and norms, on the CPU ---------------------------------------------


@_fake("silu_gate")
def _(gate, up):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@_fake("silu_gate_backward")
def _(grad_output, gate, up):
    return tuple(torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))


@_fake("rms_norm")
def _(input, weight, epsilon):
    rows = math.prod(input.shape[:-1])
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    return output, input.new_empty((rows,))


@_fake("rms_norm_backward")
def _(grad_output, input, weight, inverse, of_weight):
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format)
    return grad_input, weight.new_empty(weight.shape if of_weight else (0,))


# --- double backward: refused by name, never a wrong number -----------------------------------------


def _refuse_double_backward(name: str) -> None:
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"pyfast_dpo::{name} has no second derivative; use impl='torch' for double backward"
        )

    torch.library.register_autograd(f"pyfast_dpo::{name}", backward)


for _name in (
    "seq_logp_backward",
    "pair_loss_backward",
    "unpaired_loss_backward",
    "shared_prompt_attention_backward",
    "linear_grad_rows",
    "linear_grad_weight",
    "silu_gate_backward",
    "rms_norm_backward",
):
    _refuse_double_backward(_name)
