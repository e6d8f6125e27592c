"""The kernels of csrc/cuda/policy.cu on the stand-in, against the oracle in float64."""

from __future__ import annotations

import pytest
import torch
from host_cuda import harness
from host_cuda.harness import DTYPES, HostCuda, KernelError
from host_cuda.policy_call import call_policy_loss
from torch import Tensor

from pyfast_dpo import gae
from pyfast_dpo.losses import policy_oracle
from pyfast_dpo.losses.policy_table import KL_ESTIMATORS, POLICY_LOSSES, check_policy_options

CASES = [(name, level) for name, spec in POLICY_LOSSES.items() for level in spec.levels]
# empty, one, a part of a block, a block and one, several rounds; then more sequences than the grid has blocks
LENGTHS = {"ragged": [5, 0, 1, 129, 300], "many": [2] * 70}


@pytest.fixture(scope="module")
def cuda() -> HostCuda:
    return HostCuda(harness.build())


def draw(count: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name, level", CASES)
def test_policy_losses(
    cuda: HostCuda, name: str, level: str, dtype: torch.dtype, lengths: str
) -> None:
    counts = torch.tensor(LENGTHS[lengths])
    tokens, sequences = int(counts.sum()), len(counts)
    with_ratio = name != "cispo"
    term = check_policy_options(
        "test",
        name,
        level,
        beta=0.2,
        kl_estimator=KL_ESTIMATORS[sequences % 3],
        use_bias_correction_kl=with_ratio,
    )
    logps = -draw(tokens, 0).abs()
    inputs = {
        "logps": logps, "old": logps + draw(tokens, 1, 0.4), "reference": logps + draw(tokens, 2, 0.4),
        "advantages": draw(sequences, 3), "correction": draw(tokens, 4, 0.2).exp(),
    }  # fmt: skip
    given = {key: cuda.copy(value.to(dtype)) for key, value in inputs.items()}
    mask = cuda.empty(tokens, torch.bool).copy_(draw(tokens, 5) > -1)
    out = call_policy_loss(cuda, given, mask, counts, term)

    leaf = given["logps"].double().requires_grad_()
    rest = [given[key].double() for key in ("old", "reference", "advantages", "correction")]
    sums, losses, kl, ratios, bounds = policy_oracle.policy_loss(leaf, *rest, mask, counts, term)
    (coefficients,) = torch.autograd.grad(sums.sum(), leaf)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    truth = {"token_losses": losses, "coefficients": coefficients, "kl": kl, "ratios": ratios}
    for key, expected in {**truth, "sequence_losses": sums.detach()}.items():
        torch.testing.assert_close(
            out[key].double(),
            expected,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, k=key: f"{k}: {m}",
        )
    assert torch.equal(out["clipped"], bounds)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 129, 64 * 128 + 3])
def test_generalized_advantages(cuda: HostCuda, dtype: torch.dtype, batch: int) -> None:
    length = 5
    rewards, values = (
        cuda.copy(draw(batch * length, i).to(dtype)).view(batch, length) for i in (0, 1)
    )
    dones, mask = (
        cuda.empty(batch * length, torch.bool)
        .copy_(draw(batch * length, i) > edge)
        .view(batch, length)
        for i, edge in ((2, 1.5), (3, -1.0))
    )
    last, out = cuda.copy(draw(batch, 4).to(dtype)), cuda.full((batch * length,), dtype)
    params = harness.GaeParams(
        dtype=DTYPES.index(dtype), batch=batch, length=length, gamma=0.9, lam=0.8,
        rewards=rewards.data_ptr(), values=values.data_ptr(), last_values=last.data_ptr(),
        dones=dones.data_ptr(), mask=mask.data_ptr(), advantages=out.data_ptr(),
    )  # fmt: skip
    cuda.call("gae", params)
    wide = (t.double() for t in (rewards, values))
    truth = gae(
        *wide, gamma=0.9, lam=0.8, dones=dones, mask=mask, last_values=last.double(), impl="torch"
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        out.view(batch, length).double(), truth.advantages, rtol=tolerance, atol=tolerance
    )


def test_unknown_loss_is_refused(cuda: HostCuda) -> None:
    for index in (-1, 99):
        with pytest.raises(KernelError, match=": 1:"):
            cuda.call("policy_loss", harness.PolicyLossParams(loss=index, sequences=1))
