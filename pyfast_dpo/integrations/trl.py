"""TRL's own trainers on these kernels: `patch()`, `unpatch()`, `with patched():`.

DPO, KTO, GRPO, RLOO and SFT score tokens from hidden states through one autograd function, which is replaced:
completion rows only, float32 logits, two matrix products instead of four where the head is frozen. CPO, ORPO,
TPO and the other experimental trainers score tokens from logits through one function, which is replaced too.
What TRL does with the log-probs, and every name, option and metric of it, stays TRL's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyfast_dpo.logprobs.chunks import LinearLogps, refuse_second
from pyfast_dpo.logprobs.linear_checks import (
    checked_head,
    completion_rows,
    rows_in_budget,
    under_autocast,
)
from pyfast_dpo.logprobs.logits import token_logps
from pyfast_dpo.logprobs.plan import Plan
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.ops import operators
from pyfast_dpo.ops.dtypes import LOGITS_DTYPES

KNOWN_VERSIONS = ("1.15", "1.16")

# TRL's names: the autograd function, whether its caller keeps completion rows only, and log-probs from logits.
HEAD, COMPACT, FROM_LOGITS = "_ChunkedLogProbFunction", "_use_triton", "selective_log_softmax"

_originals: dict[str, Any] = {}  # what stood under these names when they were last replaced


def patch() -> None:
    """Makes TRL's trainers compute log-probs with these kernels, those that exist already included.

    A second call does nothing. Code outside of TRL that has imported `selective_log_softmax` by name keeps
    TRL's. A device without kernels keeps TRL's functions.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: a version of TRL whose internals this module does not know.
    """
    utils = _known_utils()
    if _is_patched(utils):
        return
    for name, replacement in _replacements(utils).items():
        _originals[name] = vars(utils)[name]
        setattr(utils, name, replacement)
    _replace_everywhere(FROM_LOGITS, _originals[FROM_LOGITS], selective_log_softmax)


def unpatch() -> None:
    """Puts back what `patch` replaced, also in modules that were imported since; without it does nothing."""
    utils = sys.modules.get("trl.trainer.utils")
    if utils is None or not _is_patched(utils):
        return
    for name, replacement in _replacements(utils).items():
        if vars(utils)[name] is replacement:
            setattr(utils, name, _originals[name])
    _replace_everywhere(FROM_LOGITS, selective_log_softmax, _originals[FROM_LOGITS])


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """`patch` inside the block; afterwards everything is as it was before."""
    before = _is_patched(_known_utils())
    patch()
    try:
        yield
    finally:
        if not before:
            unpatch()


def _is_patched(utils: ModuleType) -> bool:
    return vars(utils).get(HEAD) is LogProbFunction


def _known_utils() -> ModuleType:
    try:
        import trl
        from trl.trainer import utils
    except ImportError as error:
        raise ImportError(
            f"pyfast_dpo.integrations.trl needs TRL {' or '.join(KNOWN_VERSIONS)} (pip install trl): {error}"
        ) from error
    # `_use_triton` came with 1.16; before, completion rows were all that TRL's function was given.
    missing = [name for name in (HEAD, FROM_LOGITS) if name not in vars(utils)]
    if ".".join(trl.__version__.split(".")[:2]) not in KNOWN_VERSIONS or missing:
        lacks = f" without {', '.join(missing)}" if missing else ""
        raise RuntimeError(
            f"pyfast_dpo.integrations.trl knows the internals of TRL {', '.join(KNOWN_VERSIONS)}, found "
            f"{trl.__version__}{lacks}; nothing was patched"
        )
    return utils


def _replacements(utils: ModuleType) -> dict[str, Any]:
    every = {
        HEAD: LogProbFunction,
        COMPACT: _keep_completion_rows,
        FROM_LOGITS: selective_log_softmax,
    }
    return {name: value for name, value in every.items() if name in vars(utils)}


def _replace_everywhere(name: str, old: object, new: object) -> None:
    """In every module of TRL that has imported the name: trainers look it up in their own namespace."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module.__name__.split(".")[0] == "trl":
            # vars, not getattr: TRL's packages import their submodules when asked for an attribute.
            if vars(module).get(name) is old:
                setattr(module, name, new)


# --- what stands in TRL's place -----------------------------------------------------------------------


def _keep_completion_rows(device: torch.device) -> bool:
    return operators.has_kernels(device.type) or _originals[COMPACT](device)


class _TokenLogps(LinearLogps):
    """DeepSpeed's ZeRO-3 shards the weight again after the forward pass; the backward pass needs it whole."""

    @staticmethod
    def backward(
        ctx: Any, grad_tokens: Tensor | None, grad_entropy: Tensor | None = None, *_: None
    ) -> tuple[Tensor | None, ...]:
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        if grad_tokens is None and grad_entropy is None:
            return (None,) * 6
        saved = ctx.saved_tensors
        with torch.no_grad(), maybe_gather_lm_head_ctx(*saved[1:3]):
            gradients = LinearLogps.gradients(ctx, grad_tokens, grad_entropy, *saved)
        return *refuse_second(gradients, saved[:3]), None, None, None


class LogProbFunction:
    """In the place of TRL's autograd function, of which only `apply` is used."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """(log-probs, entropy, log of the sum of p^2, mean logit, is_top1), each `[N]`, the last four None
        unless in `outputs`; of hidden `[N, H]`, weight `[V, H]`, bias `[V]` and targets `[N]`.

        Logits are `softcap * tanh(logit_scale (hidden W^T + bias) / softcap) / temperature`. Log-probs and
        entropy have gradients. A target as likely as another token is a hit (TRL: only before it).
        """
        if not operators.has_kernels(hidden.device.type):
            return _originals[HEAD].apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )  # fmt: skip
        name = "pyfast_dpo.integrations.trl"
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)  # TRL's `cast_lm_head_to_fp32`
            bias = None if bias is None else bias.to(hidden.dtype)
        # The temperature divides what the soft-cap bounds: t softcap tanh(s y / softcap) with t = 1 / T.
        softcap = None if softcap is None else softcap / temperature
        head = checked_head(name, hidden, weight, bias, logit_scale / temperature, softcap)
        count = targets.shape[0]
        rows = CompletionRows(
            torch.arange(count, device=targets.device),
            targets,
            torch.full((1,), count, device=targets.device),
            (count,),
        )
        completion_rows(name, hidden, head.weight.shape[0], None, rows, False, -100, None)
        hidden = under_autocast(hidden)
        plan = Plan(rows, 1, rows_in_budget(name, None, head))
        wanted = [output for output in outputs if output != "log_probs"]
        logps, *statistics = _TokenLogps.apply(
            hidden, head.weight, head.bias, (head.logit_scale, head.softcap), plan, bool(wanted)
        )
        if not wanted:
            return logps, None, None, None, None
        entropy, mean_logits, is_top1, log_sum_sq_probs = statistics
        every = {
            "entropy": entropy,
            "log_sum_sq_probs": log_sum_sq_probs,
            "mean_logits": mean_logits,
            "is_top1": is_top1,
        }
        return logps, *(value if name in wanted else None for name, value in every.items())


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probs `[...]` of index `[...]` under logits `[..., V] / temperature`, float32; 0 where row_mask is 0.

    With several tokens a row, index `[..., K]`, TRL's own function answers.
    """
    one_a_row = logits.dim() >= 2 and index.shape == logits.shape[:-1]
    known = logits.dtype in LOGITS_DTYPES and operators.has_kernels(logits.device.type)
    if not (one_a_row and known) or temperature <= 0:
        return _originals[FROM_LOGITS](logits, index, temperature, row_mask)
    labels = index.long()
    if row_mask is not None:
        labels = labels.masked_fill(row_mask == 0, -100)
    return token_logps(logits if temperature == 1.0 else logits / temperature, labels)
