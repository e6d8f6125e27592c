"""Shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "numerics: arithmetic of the CPU kernels; test_cpu_capability.py repeats these for every instruction set",
    )
    config.addinivalue_line("markers", "slow: seconds or more; `make test-fast` leaves it out")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules of many small tensors, where threads that wait for a busy core cost the most."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_pass() -> Any:
    """The module of gates and norms."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pyfast_dpo.model import one_pass

    return one_pass
