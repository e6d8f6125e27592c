"""Gradient checkpointing only as far as memory needs it: the last layers keep their activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from pyfast_dpo.model.saved_tensors import SavedTensors, local


class KeptActivations(TrainerCallback):
    """Lets as many of the last layers as fit a budget keep their activations for the backward pass; the
    others are computed again.

    The last ones, since the backward pass frees theirs first, before the gradients of the other layers come.
    Until the end of the first step one layer is kept, and measured: that is also where the peak of a step
    with all layers recomputed is, so it costs little. Then the optimizer has its state, and what is still
    free is known.

    Args:
        max_bytes: the budget, >= 0; with 0 no layer is kept, in the first step neither. None: those of
            the gradients on this device, or one and a half times those of the frozen weights if that is more,
            and at most half of what is free after the first step.

    Attributes:
        layers_kept: in the last forward pass.
        bytes_per_token: what one layer keeps, the largest measure so far; 0 before the first.
        budget: in bytes, for all layers together; None during the first step.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        self._replaced: list[tuple[Any, Callable[..., Any]]] = []  # layers and their own functions
        self.layers_kept = 0
        self.bytes_per_token = 0
        self.budget: int | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._restore()  # the Trainer begins anew when it looks for a batch size
        self.bytes_per_token, self.budget = 0, None
        if args.deepspeed_plugin is not None:
            # ZeRO-3 gathers weights while it recomputes: all ranks would have to keep the same layers, and the
            # lengths of their batches differ.
            return
        # Of the layers that are to be recomputed: `every_n_layers` may have left some out.
        layers = [layer for layer in _layers(model) if layer.gradient_checkpointing]
        for index, layer in enumerate(layers):
            recompute = layer._gradient_checkpointing_func
            self._replaced.append((layer, recompute))
            layer._gradient_checkpointing_func = partial(
                self._call, layer, len(layers) - index, recompute
            )

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self.budget is None:
            self.budget = _default_budget(model) if self._max_bytes is None else self._max_bytes

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for layer, recompute in self._replaced:
            layer._gradient_checkpointing_func = recompute
        self._replaced.clear()

    def _call(
        self,
        layer: nn.Module,
        from_end: int,
        recompute: Callable[..., Any],
        forward: Callable[..., Any],
        *args: Any,
    ) -> Any:
        """The layer's forward pass; `from_end` is 1 for the last layer."""
        # A compiled graph has fixed what it recomputes.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return recompute(forward, *args)
        keywords = forward.keywords if isinstance(forward, partial) else {}
        inputs = [each for each in tree_leaves((args, keywords)) if isinstance(each, Tensor)]
        tokens = inputs[0].shape[:-1].numel()  # the hidden states come first
        self.layers_kept = self._layers_to_keep(tokens)
        if from_end > self.layers_kept:
            return recompute(forward, *args)
        saved = SavedTensors([*inputs, *layer.parameters(), *layer.buffers()])
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            output = forward(*args)
        self.bytes_per_token = max(self.bytes_per_token, -(-saved.bytes // tokens))
        return output

    def _layers_to_keep(self, tokens: int) -> int:
        if self._max_bytes == 0:
            return 0
        if self.budget is None or self.bytes_per_token == 0:
            return 1  # to be measured
        return min(len(self._replaced), self.budget // (self.bytes_per_token * tokens))


def _layers(module: nn.Module) -> Iterator[Any]:
    """The outermost layers that can be recomputed, in the order of the modules."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _layers(child)


def _default_budget(model: nn.Module) -> int:
    """The bytes of the gradients, which do not exist yet while activations peak; or, where few weights are
    trained, half of what gradients and moments of the frozen ones would take."""
    weights = [(local(p).nbytes, p.requires_grad) for p in model.parameters()]
    gradients = sum(size for size, trained in weights if trained)
    frozen = sum(size for size, trained in weights if not trained)
    wanted = max(gradients, frozen * 3 // 2)
    return min(wanted, _free_bytes(next(model.parameters()).device) // 2)


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    # What torch has reserved and does not use is free for the next step.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
