"""Operators of products, gates, norms and attention, called directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fuzz.case import Case, check, operator
from fuzz.draw import HALVES, Draw
from fuzz.truth import check_product
from torch import Tensor

ops = torch.ops.pyfast_dpo
MATRIX_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


def matrix(draw: Draw, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = draw.normal((rows, columns), torch.float64)
    if draw.chance(0.1):
        values = draw.with_special(values)
    return draw.layout(values.to(dtype))


def sizes(draw: Draw) -> tuple[int, int, int]:
    """Three sizes of a product, mostly small; one of them may be large."""
    a, b, c = (draw.size(65) for _ in range(3))
    if draw.chance(0.1):
        large = draw.size(4099)
        a, b, c = draw.pick(
            [
                (large, min(b, 33), min(c, 17)),
                (min(a, 17), large, min(c, 33)),
                (min(a, 17), min(b, 33), large),
            ]
        )
    return a, b, c


def is_matrix(*tensors: Tensor) -> None:
    assert all(t.dim() == 2 for t in tensors), "accepted what is no matrix"


def linear(draw: Draw) -> Case:
    rows, depth, columns = sizes(draw)
    kind, low = draw.pick(["linear_", "linear_grad_rows", "linear_grad_weight"]), draw.size(17)
    both = draw.chance(0.3)
    if kind == "linear_":
        arguments: dict[str, Any] = {
            "out": torch.full((rows, columns), float("nan")), "rows": matrix(draw, rows, depth), "weight": matrix(draw, columns, depth),
            "low_rows": matrix(draw, rows, low) if both else None, "low_weight": matrix(draw, columns, low) if both else None,
        }  # fmt: skip
    elif kind == "linear_grad_rows":
        arguments = {
            "gradient": matrix(draw, rows, depth), "weight": matrix(draw, depth, columns),
            "low_gradient": matrix(draw, rows, low) if both else None, "low_weight": matrix(draw, low, columns) if both else None,
        }  # fmt: skip
    else:
        arguments = {"gradient": matrix(draw, depth, rows), "rows": matrix(draw, depth, columns)}

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        values = [v for n, v in given.items() if v is not None and n != "out"]
        assert all(v.dtype == torch.float32 for v in values), "accepted another dtype"
        is_matrix(*values)
        if kind == "linear_grad_weight":
            terms = [(values[0].T, values[1])]
        else:
            turn = (lambda t: t.T) if kind == "linear_" else (lambda t: t)
            terms = [(a, turn(b)) for a, b in zip(values[::2], values[1::2], strict=True)]
        check_product(kind, results[-1], terms, torch.float32)

    return operator(kind, arguments, judge, ("out",) if kind == "linear_" else ())


def head_logits(draw: Draw) -> Case:
    rows, hidden, vocab = sizes(draw)
    dtype = draw.pick(MATRIX_DTYPES)
    arguments = {
        "out": torch.full((rows, vocab), float("nan")), "rows": matrix(draw, rows, hidden, dtype), "weight": matrix(draw, vocab, hidden, dtype)
    }  # fmt: skip

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        is_matrix(given["rows"], given["weight"])
        assert given["rows"].dtype == given["weight"].dtype
        check_product(
            "head_logits_", results[-1], [(given["rows"], given["weight"].T)], torch.float32
        )

    return operator("head_logits_", arguments, judge, ("out",))


def _rounded(gradient: Tensor, other: Tensor) -> Tensor:
    """A float32 gradient is rounded to bfloat16 on its way into a bfloat16 product, where it has vectors for it."""
    return gradient


def head_grad_rows(draw: Draw) -> Case:
    rows, hidden, vocab = sizes(draw)
    dtype = draw.pick(MATRIX_DTYPES)
    gradient = matrix(draw, rows, vocab, dtype).to(torch.float32)  # exact in the products' dtype
    if dtype == torch.bfloat16 and draw.chance(0.5):
        gradient = gradient.bfloat16()
    arguments = {"gradient": gradient, "weight": matrix(draw, vocab, hidden, dtype)}

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        is_matrix(given["gradient"], given["weight"])
        check_product(
            "head_grad_rows", results[0], [(given["gradient"], given["weight"])], torch.float32
        )

    return operator("head_grad_rows", arguments, judge)


def head_grad_weight(draw: Draw) -> Case:
    rows, hidden, vocab = sizes(draw)
    dtype = draw.pick(MATRIX_DTYPES)
    gradient = matrix(draw, rows, vocab, dtype).to(torch.float32)
    if dtype == torch.bfloat16 and draw.chance(0.5):
        gradient = gradient.bfloat16()
    wide = dtype == torch.float32 or draw.chance(0.5)
    start = draw.normal((vocab, hidden))
    accumulate = wide and draw.chance(0.4)
    total = start if not wide and draw.chance(0.5) else None
    out = start.clone() if accumulate else torch.full_like(start, float("nan"))
    arguments = {
        "out": out if wide else out.to(dtype), "gradient": gradient, "rows": matrix(draw, rows, hidden, dtype),
        "accumulate": accumulate, "total": total,
    }  # fmt: skip

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        is_matrix(given["gradient"], given["rows"])
        before = given["out"] if given["accumulate"] else given["total"]
        out_dtype = given["out"].dtype
        assert out_dtype in (torch.float32, given["rows"].dtype)
        check_product(
            "head_grad_weight_",
            results[-1],
            [(given["gradient"].T, given["rows"])],
            out_dtype,
            before,
        )

    return operator("head_grad_weight_", arguments, judge, ("out",))


# --- gates and norms --------------------------------------------------------------------------------------


def silu_gate(draw: Draw) -> Case:
    shape = [draw.size(17), draw.size(1030)][: draw.integer(0, 2)]
    dtype, backward = draw.pick([torch.float32, *HALVES]), draw.chance(0.5)

    def drawn() -> Tensor:
        values = draw.normal(shape, torch.float64) * draw.pick([1.0, 30.0])
        return draw.layout(
            (draw.with_special(values) if draw.chance(0.2) and shape else values).to(dtype)
        )

    arguments = {"gate": drawn(), "up": drawn()}
    if backward:
        arguments = dict(grad_output=drawn(), **arguments)

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        assert all(
            t.dtype == given["gate"].dtype and t.shape == given["gate"].shape
            for t in given.values()
        )
        gate, up = given["gate"].double(), given["up"].double()
        share = torch.sigmoid(gate)
        value = torch.where(gate == -torch.inf, gate * 0, gate * share)
        if not backward:
            truths, sizes = [value * up], [value.abs() * up.abs()]
        else:
            extra = given["grad_output"].double()
            slope = share * (1 + gate * (1 - share))
            truths = [extra * up * slope, extra * value]
            sizes = [(extra * up).abs() * (share * (1 + gate.abs())), (extra * value).abs()]
        dtype = given["gate"].dtype
        # 1 - sigmoid in float32 has an absolute rounding; below -87 e^x is no normal number.
        eps = 4e-6 if dtype == torch.float32 else 1.02 * torch.finfo(dtype).eps
        for ours, truth, size in zip(results, truths, sizes, strict=True):
            spread = 1 + gate.abs()
            plain = gate.isfinite() & up.isfinite() & (size < 1e30)
            if backward:
                plain &= given["grad_output"].isfinite() & (
                    (given["grad_output"].double() * up).abs() < 1e30
                )
            tolerance = (
                1e-36 * up.abs()
                + eps * truth.abs()
                + 4e-6 * size
                + 1e-30 * spread
                + torch.finfo(dtype).tiny
            )
            check("gate", ours[plain], truth[plain], tolerance[plain])
            assert not ours[up.isnan() | gate.isnan()].isfinite().any() or backward, (
                "a number out of NaN"
            )

    return operator("silu_gate_backward" if backward else "silu_gate", arguments, judge)


def rms_norm(draw: Draw) -> Case:
    shape = [draw.size(17), draw.size(9), draw.size(1030, 1)][draw.integer(0, 2) :]
    backward, epsilon = draw.chance(0.5), draw.pick([1e-6, 1e-5, 0.0])
    values = draw.normal(shape) * draw.pick([1.0, 1.0, 100.0])
    if epsilon == 0.0:
        values = values + values.sign()
    values, weight = draw.layout(values), draw.layout(draw.normal(shape[-1:]))
    arguments: dict[str, Any] = {"input": values, "weight": weight, "epsilon": epsilon}
    if backward:
        _, inverse = ops.rms_norm(values, weight, epsilon)
        arguments = {"grad_output": draw.layout(draw.normal(shape)), "input": values, "weight": weight,
                         "inverse": draw.layout(inverse), "of_weight": draw.chance(0.7)}  # fmt: skip
        known = inverse.clone()

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        x, w = given["input"].double(), given["weight"].double()
        assert (
            given["input"].dtype == given["weight"].dtype == torch.float32
            and w.shape == x.shape[-1:]
        )
        if not backward:
            if not isinstance(given["epsilon"], (int, float)) or not 0 <= given["epsilon"] < 1e30:
                return
            spread = (x.square().mean(-1, keepdim=True) + float(given["epsilon"])).rsqrt()
            plain = (x.abs() < 1e15).all(-1) & (spread < 1e15)[..., 0]
            output, size = x * spread * w, (x * spread * w).abs()
            check("output", results[0][plain], output[plain], (4e-6 * size + 1e-37)[plain])
            check(
                "inverse",
                results[1].view(plain.shape)[plain],
                spread[..., 0][plain],
                4e-6 * spread[..., 0][plain],
            )
            return
        assert given["inverse"].shape == known.shape and given["inverse"].dtype == torch.float32
        if not torch.equal(given["inverse"], known) or not bool((x.abs() < 1e15).all()):
            return
        g, spread = given["grad_output"].double(), known.double().view(*x.shape[:-1], 1)
        assert given["grad_output"].dtype == torch.float32 and g.shape == x.shape
        mean = (g * w * x).mean(-1, keepdim=True)
        truth = spread * (g * w - x * spread**2 * mean)
        size = spread * (
            (g * w).abs() + x.abs() * spread**2 * (g * w * x).abs().mean(-1, keepdim=True)
        )
        plain = size < 1e30
        check(
            "gradient of the input", results[0][plain], truth[plain], (8e-6 * size + 1e-37)[plain]
        )
        assert results[1].shape == (x.shape[-1:] if given["of_weight"] else (0,))
        if given["of_weight"]:
            each = (g * x * spread).reshape(-1, x.shape[-1])
            sizes = each.abs().sum(0)
            plain = sizes < 1e30
            check(
                "of the weight",
                results[1][plain],
                each.sum(0)[plain],
                (4e-6 * sizes + 1e-37)[plain],
            )

    return operator("rms_norm_backward" if backward else "rms_norm", arguments, judge)


SUBJECTS = (linear, head_logits, head_grad_rows, head_grad_weight, silu_gate, rms_norm)
