from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What asks whether every kernel has run comes last."""
    items.sort(key=lambda item: item.name == "test_every_kernel_has_run")
