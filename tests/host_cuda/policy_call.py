"""The launcher of the policy losses on the stand-in, with guarded arguments and results."""

from __future__ import annotations

import torch
from host_cuda.harness import DTYPES, HostCuda, PolicyLossParams, PolicyOptions
from torch import Tensor

from pyfast_dpo.losses.policy_table import KL_ESTIMATORS, PolicyTerm


def call_policy_loss(
    cuda: HostCuda, given: dict[str, Tensor], mask: Tensor, counts: Tensor, term: PolicyTerm
) -> dict[str, Tensor]:
    """`given`: logps, old, reference, correction `[N]` and advantages `[S]`, guarded; mask likewise."""
    dtype, tokens, sequences = given["logps"].dtype, given["logps"].shape[0], len(counts)
    names = ("token_losses", "coefficients", "kl", "ratios")
    out = {name: cuda.full((tokens,), dtype) for name in names}
    out["sequence_losses"] = cuda.full((sequences,), dtype)
    out["clipped"] = cuda.empty(tokens, torch.int8)
    offsets = cuda.copy(torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
    params = PolicyLossParams(
        dtype=DTYPES.index(dtype),
        loss=cuda.lib.pfd_policy_loss_index(term.spec.formula.encode()),
        tokens=tokens,
        sequences=sequences,
        options=PolicyOptions(*term[2:11]),
        sequence_level=term.sequence_level,
        sequence_means=term.spec.sequence_means,
        advantage_per_token=False,
        beta=term.beta,
        kl_estimator=KL_ESTIMATORS.index(term.kl_estimator),
        kl_with_ratio=term.kl_with_ratio,
        mask=mask.data_ptr(),
        offsets=offsets.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in {**given, **out}.items()},
    )
    cuda.call("policy_loss", params)
    return out
