"""Where torch's CPU tensors lie while a model trains."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from pyfast_dpo.ops import _C


def _import_arena() -> ModuleType | None:
    """The binary of the allocator serves the release of torch it was built with, and only that."""
    built, used = (
        v.partition("+")[0] for v in (_C.build_facts()["torch_at_build"], torch.__version__)
    )
    if built != used:
        return None
    from pyfast_dpo.ops import _arena

    return _arena


_ARENA = _import_arena()
AVAILABLE = _ARENA is not None
_users = 0


def use_arena() -> Callable[[], None]:
    """Puts torch's large CPU tensors, from now on, in one range of memory that keeps what is freed for what comes next.

    A training step then gets the memory of the step before it, not page by page from the system, all zeros,
    and holds little more than its tensors need: the C library (glibc 2.36) took half as much again.

    Returns:
        A function that ends this and gives what is free back to the system; tensors in the range stay. Both do
        nothing if this torch is not the one that the binary was built with, or has an allocator of somebody's.
    """
    global _users
    if _ARENA is None or not _ARENA.install():
        return lambda: None
    _users += 1

    def end() -> None:
        global _users
        _users -= 1
        if _users == 0:
            _ARENA.uninstall()

    return end
