"""Builds the kernels of csrc/cuda with g++ and the stand-in, and calls them on guarded memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from host_cuda.truth import Scores, statistics_dtype
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "host_cuda"
CSRC = ROOT / "csrc"

# A small grid limit sends every test of more than 64 rows through the kernels' grid walk.
# -ffp-contract=off: a fused multiply-add would be a third arithmetic beside the CPU's and the device's.
FLAGS = [
    *("-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=default", "-Wall", "-Wextra", "-Werror"),
    *("-Wno-unknown-pragmas", "-ffp-contract=off", "-U_FORTIFY_SOURCE"),  # longjmp out of a fiber
    *("-DPFD_MAX_GRID=64", f"-I{HERE}", f"-I{CSRC}"),
]

# index = value of DType in common/dtype.h
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}


def build() -> Path:
    """The shared library, compiled anew only when a source or a flag has changed."""
    kernels = sorted(CSRC.glob("cuda/*.cu")) + sorted(HERE.glob("*.cu"))
    sources = kernels + sorted(HERE.glob("*.cpp"))
    headers = [*CSRC.glob("common/*.h"), *CSRC.glob("cuda/*.*h"), *HERE.glob("*.h")]
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*sources, *headers]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "host_cuda" / digest.hexdigest()[:16]
    library = folder / "libhost_cuda.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    cxx = os.environ.get("CXX", "g++")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.{os.getpid()}.o"
        run([cxx, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = folder / f"{library.name}.{os.getpid()}"
    run([cxx, "-shared", "-o", str(partial), *map(str, objects)])
    for path in objects:
        path.unlink()
    os.replace(partial, library)  # two test processes may build at the same time
    return library


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


_I64, _PTR, _INT, _BOOL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool


class RowLabels(ctypes.Structure):
    _fields_ = [("labels", _PTR)] + [
        (n, _I64) for n in ("batch", "length", "vocab", "ignore_index")
    ]
    _fields_ += [("shift", _BOOL)]


class SeqLogpParams(ctypes.Structure):
    _fields_ = [("logits", _PTR), ("batch_stride", _I64), ("row_stride", _I64), ("dtype", _INT)]
    _fields_ += [("rows", RowLabels)]
    _fields_ += [(n, _PTR) for n in ("token_logps", "row_max", "row_sum", "slices")]
    _fields_ += [(n, _PTR) for n in ("sequence_logps", "sequence_scale")] + [("average", _BOOL)]


class SeqLogpBackwardParams(ctypes.Structure):
    _fields_ = [("logits", _PTR), ("batch_stride", _I64), ("row_stride", _I64), ("dtype", _INT)]
    _fields_ += [("rows", RowLabels)]
    _fields_ += [(n, _PTR) for n in ("token_logps", "row_max", "row_sum", "sequence_scale")]
    _fields_ += [(n, _PTR) for n in ("grad_sequence", "grad_token", "entropy", "grad_entropy")]
    _fields_ += [("grad_logits", _PTR), ("grad_dtype", _INT)]
    _fields_ += [("grad_batch_stride", _I64), ("grad_row_stride", _I64)]


class LossParams(ctypes.Structure):
    _names = (
        "beta", "label_smoothing", "discopop_tau", "desirable_weight", "undesirable_weight",
    )  # fmt: skip
    _fields_ = [(n, ctypes.c_double) for n in _names]


class PairLossParams(ctypes.Structure):
    _fields_ = [("dtype", _INT), ("loss", _INT), ("pairs", _I64), ("params", LossParams)]
    _fields_ += [("margin", ctypes.c_double), ("divergence", _INT)]
    _fields_ += [("divergence_alpha", ctypes.c_double), ("average_first", _BOOL)]
    _fields_ += [(n, _PTR) for n in ("policy_chosen", "policy_rejected")]
    _fields_ += [(n, _PTR) for n in ("reference_chosen", "reference_rejected")]
    _fields_ += [(n, _PTR) for n in ("chosen_lengths", "rejected_lengths", "margins", "shift")]
    _fields_ += [("grad_losses", _PTR)]
    _fields_ += [(n, _PTR) for n in ("losses", "chosen_rewards", "rejected_rewards")]
    _fields_ += [(n, _PTR) for n in ("grad_chosen", "grad_rejected")]


class UnpairedLossParams(ctypes.Structure):
    _fields_ = [("dtype", _INT), ("loss", _INT), ("count", _I64), ("params", LossParams)]
    _fields_ += [(n, _PTR) for n in ("policy", "reference", "is_desirable", "kl", "grad_losses")]
    _fields_ += [(n, _PTR) for n in ("losses", "rewards", "grad_policy")]


class RowStatisticsParams(ctypes.Structure):
    _fields_ = [("logits", _PTR), ("row_stride", _I64), ("dtype", _INT), ("rows", _I64)]
    _fields_ += [("vocab", _I64)]
    _fields_ += [(n, _PTR) for n in ("targets", "row_max", "entropy", "mean_logits")]
    _fields_ += [(n, _PTR) for n in ("is_top1", "log_sum_sq_probs")]


class PolicyOptions(ctypes.Structure):
    _names = (
        "epsilon", "epsilon_high", "delta", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos",
        "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
    )  # fmt: skip
    _fields_ = [(n, ctypes.c_double) for n in _names]


class PolicyLossParams(ctypes.Structure):
    _fields_ = [("dtype", _INT), ("loss", _INT), ("tokens", _I64), ("sequences", _I64)]
    _fields_ += [("options", PolicyOptions)]
    _fields_ += [(n, _BOOL) for n in ("sequence_level", "sequence_means", "advantage_per_token")]
    _fields_ += [("beta", ctypes.c_double), ("kl_estimator", _INT), ("kl_with_ratio", _BOOL)]
    _fields_ += [(n, _PTR) for n in ("logps", "old", "reference", "advantages", "correction")]
    _fields_ += [(n, _PTR) for n in ("mask", "offsets", "sequence_losses", "token_losses")]
    _fields_ += [(n, _PTR) for n in ("coefficients", "kl", "ratios", "clipped")]


class GaeParams(ctypes.Structure):
    _fields_ = [("dtype", _INT), ("batch", _I64), ("length", _I64)]
    _fields_ += [(n, ctypes.c_double) for n in ("gamma", "lam")]
    _fields_ += [(n, _PTR) for n in ("rewards", "values", "last_values", "dones", "mask")]
    _fields_ += [("advantages", _PTR)]


class ScaleParams(ctypes.Structure):
    _fields_ = [("dtype", _INT), ("count", _I64), ("values", _PTR), ("factor", _PTR)]


class KernelError(RuntimeError):
    pass


class HostCuda:
    """The launchers of csrc/cuda on the stand-in. Outputs are new guarded tensors full of NaN."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.pfd_error_string.restype = ctypes.c_char_p
        self.lib.pfd_guarded_alloc.restype = _PTR
        self.lib.pfd_guarded_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t, _BOOL]
        self.lib.pfd_guarded_free.argtypes = [_PTR]
        self.lib.pfd_set_order.argtypes = [_INT, ctypes.c_uint64]
        self.lib.pfd_skip_barrier.argtypes = [ctypes.c_char_p, _INT]
        self.lib.pfd_launched_kernels.argtypes = [ctypes.POINTER(_PTR), ctypes.c_size_t]
        self.lib.pfd_launched_kernels.restype = ctypes.c_size_t
        self.path = library

    def set_order(self, name: str, seed: int = 0) -> None:
        self.lib.pfd_set_order(ORDERS[name], seed)

    @contextmanager
    def without_barrier(self, file: str, line: int) -> Iterator[None]:
        self.lib.pfd_skip_barrier(file.encode(), line)
        try:
            yield
        finally:
            self.lib.pfd_skip_barrier(b"", 0)

    def kernels(self) -> tuple[set[str], set[str]]:
        """Names of all kernels in the library (functions called ..._kernel), and of those that have run."""
        lines = run(["nm", "-C", str(self.path)]).splitlines()
        symbols = {
            int(line.split()[0], 16): line.split(" ", 2)[2] for line in lines if line[0] != " "
        }
        anchor = next(a for a, name in symbols.items() if name == "pfd_launched_kernels")
        base = ctypes.cast(self.lib.pfd_launched_kernels, _PTR).value - anchor
        launched = (_PTR * 1000)()
        count = self.lib.pfd_launched_kernels(launched, len(launched))
        names = {
            address: name
            for address, name in symbols.items()
            if re.search(r"::\w+_kernel(<.*>)?\(.*\)$", name) and "::launch_kernel<" not in name
        }
        return set(names.values()), {names[address - base] for address in launched[:count]}

    def call(self, name: str, params: ctypes.Structure) -> None:
        code = getattr(self.lib, f"pfd_{name}")(ctypes.byref(params))
        if code:
            raise KernelError(f"{name}: {code}: {self.lib.pfd_error_string(code).decode()}")

    def empty(
        self, count: int, dtype: torch.dtype, *, alignment: int = 0, from_start: bool = False
    ) -> Tensor:
        """`[count]` between inaccessible pages, full of NaN (or -1)."""
        size = torch.empty(0, dtype=dtype).element_size()
        if count == 0:
            return torch.empty(0, dtype=dtype)
        address = self.lib.pfd_guarded_alloc(count * size, alignment or size, from_start)
        if not address:
            raise MemoryError(f"{count * size} bytes")
        memory = (ctypes.c_char * (count * size)).from_address(address)
        weakref.finalize(memory, self.lib.pfd_guarded_free, address)
        return torch.frombuffer(memory, dtype=dtype)

    def full(self, shape: tuple[int, ...], dtype: torch.dtype, **kwargs: Any) -> Tensor:
        count = int(torch.Size(shape).numel())
        return self.empty(count, dtype, **kwargs).fill_(float("nan")).view(shape)

    def copy(self, source: Tensor) -> Tensor:
        return self.empty(source.numel(), source.dtype).view(source.shape).copy_(source)

    def rows(
        self,
        values: Tensor,
        dtype: torch.dtype,
        *,
        offset: int = 0,
        row_gap: int = 0,
        batch_gap: int = 0,
        aligned: bool = True,
        from_start: bool = False,
    ) -> Tensor:
        """`values` [B, T, V] as a strided view of guarded memory; everything between rows is NaN.

        `aligned` puts the memory at a multiple of 16, and `offset` elements after it the first row;
        otherwise the last element touches the inaccessible page.
        """
        batch, length, vocab = values.shape
        row_stride = vocab + row_gap
        batch_stride = length * row_stride + batch_gap
        if values.numel() == 0:
            return values.to(dtype)
        count = offset + (batch - 1) * batch_stride + (length - 1) * row_stride + vocab
        memory = self.full((count,), dtype, alignment=16 if aligned else 0, from_start=from_start)
        view = memory.as_strided(values.shape, (batch_stride, row_stride, 1), offset)
        return view.copy_(values)

    def slices(self, dtype: torch.dtype, vocab: int) -> int:
        """How many blocks work on a row."""
        return self.lib.pfd_seq_logp_slices(DTYPES.index(dtype), _I64(vocab))

    def seq_logp(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        shift: bool = False,
        average: bool = False,
        ignore_index: int = -100,
    ) -> Scores:
        batch, length, _ = logits.shape
        stat = statistics_dtype(logits.dtype)
        out = Scores(
            *(self.full((batch, length), stat) for _ in range(3)),
            *(self.full((batch,), stat) for _ in range(2)),
        )
        extra = self.slices(logits.dtype, logits.shape[-1]) - 1
        slices = self.full((extra, 2, batch, length), stat)
        params = SeqLogpParams(
            logits=logits.data_ptr(),
            batch_stride=logits.stride(0),
            row_stride=logits.stride(1),
            dtype=DTYPES.index(logits.dtype),
            rows=self._row_labels(logits, labels, shift, ignore_index),
            average=average,
            slices=slices.data_ptr() if slices.numel() else None,
            **{name: tensor.data_ptr() for name, tensor in out._asdict().items()},
        )
        self.call("seq_logp_forward", params)
        return out

    def seq_logp_backward(
        self,
        logits: Tensor,
        labels: Tensor,
        scores: Scores,
        grad_sequence: Tensor | None,
        grad_token: Tensor | None = None,
        *,
        out: Tensor,
        shift: bool = False,
        ignore_index: int = -100,
        entropy: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`entropy`: of the rows, and the gradient that it brings."""
        own, incoming = (t.data_ptr() for t in entropy) if entropy is not None else (None, None)
        params = SeqLogpBackwardParams(
            logits=logits.data_ptr(),
            batch_stride=logits.stride(0),
            row_stride=logits.stride(1),
            dtype=DTYPES.index(logits.dtype),
            rows=self._row_labels(logits, labels, shift, ignore_index),
            token_logps=scores.token_logps.data_ptr(),
            row_max=scores.row_max.data_ptr(),
            row_sum=scores.row_sum.data_ptr(),
            sequence_scale=scores.sequence_scale.data_ptr(),
            grad_sequence=None if grad_sequence is None else grad_sequence.data_ptr(),
            grad_token=None if grad_token is None else grad_token.data_ptr(),
            entropy=own,
            grad_entropy=incoming,
            grad_logits=out.data_ptr(),
            grad_dtype=DTYPES.index(out.dtype),
            grad_batch_stride=out.stride(0),
            grad_row_stride=out.stride(1),
        )
        self.call("seq_logp_backward", params)
        return out

    def row_statistics(
        self, logits: Tensor, targets: Tensor, row_max: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """entropy, mean_logits, is_top1, log_sum_sq_probs `[R]` of logits `[R, V]`."""
        rows, vocab = logits.shape
        is_top1 = self.copy(torch.zeros(rows, dtype=torch.bool))
        entropy, mean, log_sum_sq = (self.full((rows,), logits.dtype) for _ in range(3))
        params = RowStatisticsParams(
            logits=logits.data_ptr(),
            row_stride=logits.stride(0),
            dtype=DTYPES.index(logits.dtype),
            rows=rows,
            vocab=vocab,
            targets=targets.data_ptr(),
            row_max=None if row_max is None else row_max.data_ptr(),
            entropy=entropy.data_ptr(),
            mean_logits=mean.data_ptr(),
            is_top1=is_top1.data_ptr(),
            log_sum_sq_probs=log_sum_sq.data_ptr(),
        )
        self.call("row_statistics", params)
        return entropy, mean, is_top1, log_sum_sq

    def scale(self, values: Tensor, factor: Tensor) -> None:
        params = ScaleParams(
            dtype=DTYPES.index(values.dtype),
            count=values.numel(),
            values=values.data_ptr(),
            factor=factor.data_ptr(),
        )
        self.call("scale", params)

    def _row_labels(
        self, logits: Tensor, labels: Tensor, shift: bool, ignore_index: int
    ) -> RowLabels:
        batch, length, vocab = logits.shape
        assert labels.is_contiguous() and labels.shape == (batch, length)
        return RowLabels(labels.data_ptr(), batch, length, vocab, ignore_index, shift)
