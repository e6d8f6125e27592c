"""Arguments as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.floating[Any]]


def arrays_of(
    function: str, names: tuple[str, ...], values: tuple[ArrayLike | None, ...], required: int
) -> list[FloatArray | None]:
    """One-dimensional arrays of equal length, of which the first `required` must be there: float64 when any is wider than float32, else float32. Integers
    beside floating-point arrays (lengths) leave the dtype as it is."""
    arrays = [
        None if value is None and number >= required else as_array(function, name, value)
        for number, (name, value) in enumerate(zip(names, values, strict=True))
    ]
    first = arrays[0]
    assert first is not None
    dtypes = []
    for name, array in zip(names, arrays, strict=True):
        if array is None:
            continue
        floating = np.issubdtype(array.dtype, np.floating)
        if not floating and not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{function}: {name} must be floating point, got {describe(array)}")
        if array.ndim != 1 or array.shape != first.shape:
            raise ValueError(
                f"{function}: {name} must be one-dimensional, as long as {names[0]}, got {describe(array)}"
            )
        if floating or not name.endswith("_lengths"):
            dtypes.append(array.dtype)
    dtype = np.float32 if all(d in (np.float32, np.float16) for d in dtypes) else np.float64
    # aligned: kernels read whole elements
    return [None if a is None else np.require(a, dtype, ["C", "ALIGNED"]) for a in arrays]


def as_array(function: str, name: str, value: ArrayLike | None) -> NDArray[Any]:
    """`np.asarray`, with an error that names the argument."""
    try:
        return np.asarray(value)
    except Exception as error:
        raise TypeError(
            f"{function}: {name} must be an array, got {value!r:.80}: {error}"
        ) from error


def describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
