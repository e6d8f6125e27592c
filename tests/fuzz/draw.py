"""Random choices of one call, all from its seed: sizes, dtypes, values, layouts in memory, and what spoils an argument."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Nothing, one, odd, prime, and one less, as many and one more than vectors, panels and tiles hold.
SIZES = (0, 1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 9, 13, 14, 15, 16, 17, 23, 31, 32, 33, 48, 61, 64, 65, 97, 112,
         127, 128, 129, 191, 257, 263, 521, 1021, 1030, 2053, 4099, 9001)  # fmt: skip
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, -3e38, 1e-40, -1e-45, 88.0, -104.0)
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 0.0, -0.0, 0.5, 1e-320, 1e-30, 1e30, 1e308, -1e308, math.nan, math.inf, -math.inf, INT64_MAX,
    INT64_MIN, 2**64, True, None, "1", "", 1j, [1.0], np.float32(0.5), np.int64(2),
)  # fmt: skip


class Draw:
    """The generator of call `index` of the run `seed`."""

    def __init__(self, seed: int, index: int) -> None:
        self.random = random.Random(f"{seed}/{index}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self.random.random() * len(choices))]

    def size(self, most: int, least: int = 0) -> int:
        """Mostly small: one draw of eight goes up to `most`."""
        limit = most if self.chance(0.12) else min(most, max(least + 1, 17))
        return self.pick([n for n in SIZES if least <= n <= limit])

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def integers(self, shape: Sequence[int], low: int, high: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), tuple(shape), generator=self.generator)

    def bools(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(tuple(shape), generator=self.generator) < 0.5

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float32)
        return values.to(dtype)

    def logits(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Of a model, far from 0, certain, flat, tiny, or with values that are no ordinary numbers."""
        values = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)
        kind = self.random.random()
        if kind < 0.5:
            values *= 3
        elif kind < 0.6:
            values = 3 * values + self.pick([1e4, -1e4, 300.0])
        elif kind < 0.7:
            values *= 40
        elif kind < 0.75:
            values = torch.full_like(values, self.pick([0.0, -3.25, 1e4]))
        elif kind < 0.8:
            values *= 1e-30
        else:
            values = self.with_special(3 * values)
        return values.to(dtype)

    def with_special(self, values: Tensor) -> Tensor:
        """A few elements replaced; also the first or last of a row, where loops begin and end."""
        if values.numel() == 0:
            return values
        values = values.clone().contiguous()
        flat = values.view(-1)
        for _ in range(self.integer(1, 4)):
            place = self.pick([0, flat.numel() - 1, self.integer(0, flat.numel() - 1)])
            flat[place] = self.pick(SPECIAL)
        if values.dim() > 1 and self.chance(0.2):
            values.flatten(0, -2)[self.integer(0, values[..., 0].numel() - 1)] = self.pick(
                [math.nan, math.inf, -math.inf]
            )
        return values

    # --- layouts: the same values elsewhere in memory ---------------------------------------------------

    def layout(self, tensor: Tensor, *, last_contiguous: bool = False) -> Tensor:
        """The values as a view with offset, gaps, other strides; memory around them holds what must not be
        read."""
        kind = self.random.random()
        if kind < 0.5 or tensor.dim() == 0 or tensor.numel() == 0:
            return tensor
        if kind < 0.65:  # in the middle of a buffer, mostly misaligned
            before, after = self.integer(0, 17), self.integer(0, 2)
            buffer = self._poison((before + tensor.numel() + after,), tensor.dtype)
            view = buffer[before : before + tensor.numel()].view(tensor.shape)
        elif kind < 0.8 and tensor.dim() > 1:  # rows apart
            dim = self.integer(1, tensor.dim() - 1)
            shape = list(tensor.shape)
            shape[dim] += self.integer(1, 5)
            view = self._poison(shape, tensor.dtype).narrow(dim, 0, tensor.shape[dim])
        elif kind < 0.86 and tensor.dim() > 1:  # dimensions in another order
            order = list(range(tensor.dim()))
            if last_contiguous:
                order = [*self.random.sample(order[:-1], len(order) - 1), order[-1]]
            else:
                self.random.shuffle(order)
            inverse = [order.index(i) for i in range(len(order))]
            memory = self._poison([tensor.shape[i] for i in order], tensor.dtype)
            view = memory.permute(inverse)
        elif kind < 0.9 and not last_contiguous:  # every second element
            shape = [*tensor.shape[:-1], 2 * tensor.shape[-1]]
            view = self._poison(shape, tensor.dtype)[..., ::2]
        elif kind < 0.94:  # a dimension of one element has any stride
            strides = [
                2**40 + 3 if n == 1 else s
                for n, s in zip(tensor.shape, tensor.contiguous().stride(), strict=True)
            ]
            if last_contiguous:
                strides[-1] = 1
            return tensor.clone(memory_format=torch.contiguous_format).as_strided(
                tensor.shape, strides
            )
        elif kind < 0.97 and tensor.is_floating_point() and not last_contiguous:
            return torch._neg_view(-tensor)  # negated when it is read
        else:
            return tensor
        view.copy_(tensor)
        return view

    def _poison(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if dtype == torch.bool:
            return self.bools(shape)
        value = math.nan if dtype.is_floating_point else 2**62
        return torch.full(tuple(shape), value, dtype=dtype)

    # --- arguments that do not fit ------------------------------------------------------------------------

    def spoiled(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.spoiled_tensor(value)
        if isinstance(value, np.ndarray):
            return self.spoiled_array(value)
        if isinstance(value, str):
            return self.pick(["", "x", value.upper(), None, 3, [value], ["sigmoid", "ipo"], []])
        if isinstance(value, bool):
            return self.pick([not value, None, "x", 2, 0.5, torch.tensor(True)])
        return self.pick(NUMBERS)

    def spoiled_tensor(self, t: Tensor) -> Any:
        kinds = [
            lambda: None,
            lambda: self.pick(NUMBERS),
            lambda: t.tolist() if t.numel() < 100 else [],
            lambda: t.to(self.pick([*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool])),
            lambda: t.to(self.pick([torch.complex64, torch.int16, torch.float8_e4m3fn])),
            lambda: t.unsqueeze(self.integer(0, t.dim())),
            lambda: t[0] if t.dim() and t.shape[0] else t.reshape(-1),
            lambda: t.flatten(),
            lambda: t[:0] if t.dim() else t[None][:0],
            lambda: t[..., :0] if t.dim() else t,
            lambda: t[..., :-1] if t.dim() and t.shape[-1] else t,
            lambda: t[1:] if t.dim() and t.shape[0] else t,
            lambda: torch.cat([t, t]) if t.dim() else t,
            lambda: t.to("meta"),
            lambda: t.transpose(0, -1) if t.dim() else t,
            lambda: t[:1].expand(t.shape) if t.dim() and t.shape[0] else t,
            lambda: t.flatten()[:1].expand(t.shape) if t.numel() and t.dim() else t,
            lambda: t.to_sparse() if t.dim() else t,
            lambda: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
            lambda: self.layout(t),
            lambda: torch.empty(0),
            lambda: torch.tensor(1.0),
            lambda: self.overlapping(t),
            lambda: self.extreme(t),
            lambda: t.numpy(force=True) if t.dtype != torch.bfloat16 else t,
        ]
        return self.pick(kinds)()

    def overlapping(self, t: Tensor) -> Tensor:
        """Windows of one memory: elements of different places share it."""
        if t.dim() < 2 or t.numel() < 4 or t.shape[0] < 2:
            return t
        strides = list(t.contiguous().stride())
        strides[0] = max(1, strides[0] // 2)
        return t.contiguous().as_strided(t.shape, strides)

    def extreme(self, t: Tensor) -> Tensor:
        if t.numel() == 0 or t.dtype == torch.bool:
            return t
        t = t.clone().contiguous()
        extremes = [INT64_MAX, INT64_MIN, -1, 2**31, 2**40, -101]
        value = self.pick(SPECIAL if t.is_floating_point() else extremes)
        if (
            not t.is_floating_point()
            and not torch.iinfo(t.dtype).min <= value <= torch.iinfo(t.dtype).max
        ):
            return t
        t.view(-1)[self.integer(0, t.numel() - 1)] = value
        return t

    def spoiled_array(self, a: np.ndarray) -> Any:
        with np.errstate(all="ignore"):
            kinds = [
                lambda: None,
                lambda: self.pick(NUMBERS),
                lambda: a.tolist() if a.size < 100 else [],
                lambda: a.astype(self.pick(["f2", "f4", "f8", "i8", "i4", "u1", "u8", "?", "g"])),
                lambda: a.astype(self.pick(["c8", "O", "U8", "M8[s]"])),
                lambda: a[None],
                lambda: a[0] if a.ndim and len(a) else a.reshape(-1),
                lambda: a.reshape(-1),
                lambda: a[:0] if a.ndim else a,
                lambda: a[..., :-1] if a.ndim else a,
                lambda: a[1:] if a.ndim else a,
                lambda: np.concatenate([a, a]) if a.ndim else a,
                lambda: a.T,
                lambda: np.broadcast_to(a.reshape(-1)[:1], a.shape) if a.size else a,
                lambda: self.array_layout(a),
                lambda: np.zeros(0),
                lambda: np.float32(1.0),
                lambda: (
                    torch.from_numpy(a.copy())
                    if a.dtype.isnative and a.dtype != np.longdouble
                    else a
                ),
                lambda: self._extreme_array(a),
            ]
            return self.pick(kinds)()

    def _extreme_array(self, a: np.ndarray) -> np.ndarray:
        if a.size == 0 or a.dtype == np.bool_:
            return a
        a = a.copy()
        extremes = (
            SPECIAL if a.dtype.kind == "f" else (np.iinfo(a.dtype).max, np.iinfo(a.dtype).min)
        )
        a.reshape(-1)[self.integer(0, a.size - 1)] = self.pick(extremes)
        return a

    def array_layout(self, a: np.ndarray) -> np.ndarray:
        """The values byte-swapped, misaligned, backwards, with gaps, in another order, read-only, in a record."""
        if a.ndim == 0 or a.size == 0:
            return a
        kind = self.integer(0, 8)
        if kind == 0:
            return a.astype(a.dtype.newbyteorder())
        if kind == 1:
            memory = np.zeros(a.nbytes + 3, np.uint8)
            view = memory[self.integer(1, 3) :][: a.nbytes].view(a.dtype).reshape(a.shape)
        elif kind == 2:
            axis = self.integer(0, a.ndim - 1)
            return np.flip(np.flip(a, axis).copy(), axis)  # negative strides, the same values
        elif kind == 3:
            view = np.full([*a.shape[:-1], 2 * a.shape[-1]], self._fill(a), a.dtype)[..., ::2]
        elif kind == 4:
            return np.asfortranarray(a)
        elif kind == 5 and a.ndim > 1:
            view = np.full([a.shape[0], a.shape[1] + 2, *a.shape[2:]], self._fill(a), a.dtype)[
                :, 1:-1
            ]
        elif kind == 6:
            record = np.zeros(a.shape, np.dtype([("before", np.int8), ("value", a.dtype)]))
            view = record["value"]  # strides that are no multiple of the element
        elif kind == 7:
            view = a.copy()
            view.flags.writeable = False
            return view
        else:
            return a
        view[...] = a
        return view

    def _fill(self, a: np.ndarray) -> Any:
        return math.nan if a.dtype.kind == "f" else 0
