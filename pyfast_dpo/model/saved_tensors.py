"""What a layer that is not recomputed keeps for the backward pass: not what cheap operations make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyfast_dpo.ops import operators


class SavedTensors:
    """Hooks for `torch.autograd.graph.saved_tensors_hooks`: results of products and activation functions are
    not kept where autograd has saved what they were made of, but made again, by the same operation with the
    same bits. A layer of a Llama keeps little more than half of its bytes so: the outputs of its linear layers,
    without the normalized and gated values in front of them.

    Args:
        others: tensors that are there in any case, which `bytes` does not count.

    Attributes:
        bytes: of the storages that are kept, each once and whole. Not counted: what a
            `torch.autograd.Function` keeps without `save_for_backward`.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        self._seen = {local(tensor).untyped_storage().data_ptr() for tensor in others}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor | Remade:
        remade = _remade(tensor)
        if remade is not None:
            return remade
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        # An operation's own output would hold its graph, and the graph the output: never freed without a backward.
        return tensor.detach()

    def unpack(self, packed: Tensor | Remade) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return packed()


Remade = Callable[[], Tensor]


def _remade(tensor: Tensor) -> Remade | None:
    """How to make a tensor again from what its graph has saved; None if that is not known to be cheap."""
    node, casts = tensor.grad_fn, 0
    while node is not None and node.name() in _SAME_VALUES:
        casts += node.name() == _CAST
        node = node.next_functions[0][0]
    # A second cast may have rounded in between, and strides other than a result's own would get lost.
    if node is None or casts > 1 or not tensor.is_contiguous() or not _is_cheap(node):
        return None
    shape, dtype = tensor.shape, tensor.dtype
    return lambda: _value(node).view(shape).to(dtype)


_CAST = "ToCopyBackward0"
_SAME_VALUES = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", _CAST}
_FUNCTIONS: dict[str, Callable[[Any], Tensor]] = {
    "SiluBackward0": lambda node: functional.silu(node._saved_self),
    "GeluBackward0": lambda node: functional.gelu(
        node._saved_self, approximate=node._saved_approximate
    ),
    "SiluGateBackward": lambda node: operators.silu_gate(*node.saved_tensors),
    "RmsNormBackward": lambda node: operators.rms_norm(*node.saved_tensors[:2], node.epsilon)[0],
}
_MUL = "MulBackward0"


def _is_cheap(node: Any) -> bool:
    if node.name() in _FUNCTIONS:
        return True
    if node.name() != _MUL:
        return False
    (left, _), (right, _) = node.next_functions
    # A factor is saved if the other one has a gradient.
    return (left is None or right is not None or _is_cheap(left)) and (
        right is None or left is not None or _is_cheap(right)
    )


def _value(node: Any) -> Tensor:
    """The output of a node of which `_is_cheap` holds."""
    if node.name() in _FUNCTIONS:
        return _FUNCTIONS[node.name()](node)
    (left, _), (right, _) = node.next_functions
    # Without a gradient of the other one: what it was computed from.
    self = node._saved_self if right is not None else _value(left)
    other = node._saved_other if left is not None else _value(right)
    return self * other


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
