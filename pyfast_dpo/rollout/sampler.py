"""From logits to tokens: every row draws by numbers of its own, so that its neighbours do not matter to it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_dpo.rollout.engine import Sampling


class Sampler:
    """Draws the tokens of `rows` responses.

    Row r takes its t-th token by the number `uniforms[r, t]` and inverse distribution: a response does not depend on
    which others have ended.
    """

    def __init__(self, sampling: Sampling, rows: int, device: torch.device) -> None:
        self.sampling = sampling
        self.uniforms: Tensor | None = None
        if sampling.temperature > 0:
            generator = torch.Generator()  # of the CPU: the same numbers on every device
            generator.manual_seed(
                int(torch.randint(2**62, ())) if sampling.seed is None else sampling.seed
            )
            shape = (rows, sampling.max_tokens)
            self.uniforms = torch.rand(shape, generator=generator, dtype=torch.float64).to(device)

    def draw(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(tokens, log-probs) `[r]` of the responses `rows` from their logits `[r, V]` at a step.

        Log-probs are float32 whatever the dtype of the logits, at the temperature, and before tokens are left out.
        """
        temperature = self.sampling.temperature or 1.0
        logps = (logits.float() / temperature).log_softmax(-1)
        if self.uniforms is None:
            tokens = logps.argmax(-1)
        else:
            weights = self._kept(logps).exp().double().cumsum(-1)
            targets = self.uniforms[rows, step].unsqueeze(-1) * weights[:, -1:]
            # The first token whose cumulated probability exceeds the number: never one of probability 0.
            found = torch.searchsorted(weights, targets, right=True).squeeze(-1)
            tokens = found.clamp(max=logps.shape[-1] - 1)
        return tokens, logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    def _kept(self, logps: Tensor) -> Tensor:
        """-inf where a token is left out; the likeliest always stays."""
        sampling = self.sampling
        if sampling.min_p > 0:
            least = logps.amax(-1, keepdim=True) + torch.tensor(sampling.min_p).log()
            logps = logps.masked_fill(logps < least, -torch.inf)
        if sampling.top_k == 0 and sampling.top_p == 1:
            return logps
        ordered, order = logps.sort(dim=-1, descending=True, stable=True)
        out = torch.zeros_like(ordered, dtype=torch.bool)
        if sampling.top_k > 0:
            out[:, sampling.top_k :] = True
            ordered = ordered.masked_fill(out, -torch.inf)
        if sampling.top_p < 1:
            shares = ordered.softmax(-1)
            before = shares.cumsum(-1) - shares  # of what is likelier
            out |= before >= sampling.top_p - 1e-6  # shares are float32
        out[:, 0] = False
        return logps.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -torch.inf)
