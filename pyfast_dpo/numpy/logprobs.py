"""Log-probs of sequences."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pyfast_dpo.numpy.arrays import FloatArray, as_array, describe
from pyfast_dpo.ops import _C

_IGNORED = -100  # label of a position that is not scored; masked positions take it


def compute_sequence_logprob(
    logits: ArrayLike, tokens: ArrayLike, mask: ArrayLike | None = None
) -> FloatArray:
    """Summed log-probability of the tokens, of all or of those where the mask is true.

    Args:
        logits: `[B, T, V]` or `[T, V]`, float64, float32 or float16; position t scores `tokens[t]`.
        tokens: `[B, T]` or `[T]` integers in [0, V) wherever they are scored.
        mask: the shape of tokens, bool or 0 and 1; None scores every token.

    Returns:
        `[B]`, or a 0-d array for `[T, V]`: float32, float64 for float64 logits; 0 where the mask is empty.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, mask values; a token out of range.
    """
    name = "compute_sequence_logprob"
    z, ids = as_array(name, "logits", logits), as_array(name, "tokens", tokens)
    scored = np.ones(ids.shape, np.bool_) if mask is None else as_array(name, "mask", mask)
    if z.dtype.newbyteorder("=") not in (np.float64, np.float32, np.float16):
        raise TypeError(f"{name}: logits must be float64, float32 or float16, got {describe(z)}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name}: tokens must be integers, got {describe(ids)}")
    if z.ndim not in (2, 3) or z.shape[-1] == 0:
        raise ValueError(
            f"{name}: logits must be [B, T, V] or [T, V] with V >= 1, got {describe(z)}"
        )
    if ids.shape != z.shape[:-1]:
        raise ValueError(
            f"{name}: tokens must have shape {list(z.shape[:-1])}, got {describe(ids)}"
        )
    if scored.shape != ids.shape:
        raise ValueError(f"{name}: mask must have shape {list(ids.shape)}, got {describe(scored)}")
    if scored.dtype.kind not in "biuf":
        raise TypeError(f"{name}: mask must hold bool or 0 and 1, got {describe(scored)}")
    if scored.dtype != np.bool_ and not np.isin(scored, (0, 1)).all():
        raise ValueError(f"{name}: mask must hold bool or 0 and 1, got {describe(scored)}")
    scored = scored.astype(np.bool_)
    bad = scored & ((ids < 0) | (ids >= z.shape[-1]))
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name}: tokens must be in [0, {z.shape[-1]}) where they are scored, "
            f"got {int(ids[index])} at {list(index)} ({int(bad.sum())} such tokens in all)"
        )
    rows = z if z.ndim == 3 else z[None]
    # Kernels read native, aligned rows in place, whatever the strides of the leading dimensions.
    readable = rows.dtype.isnative and rows.flags.aligned and rows.strides[-1] == rows.itemsize
    if not readable:
        rows = np.require(rows, rows.dtype.newbyteorder("="), ["C", "ALIGNED"])
    labels = np.where(scored, ids.astype(np.int64), _IGNORED).reshape(rows.shape[:-1])
    return _C.sequence_logps(rows, np.ascontiguousarray(labels)).reshape(z.shape[:-2])
