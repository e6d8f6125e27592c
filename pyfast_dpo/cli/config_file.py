"""A file with the options of a command: JSON, TOML or YAML."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from pyfast_dpo.ops.extras import require


def read_config(file: str) -> dict[str, Any]:
    """The mapping that the file holds.

    Raises:
        ValueError: another suffix, a file that its parser refuses, or no mapping.
        OSError: a file that cannot be read.
    """
    path = Path(file)
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            config = json.loads(text)
        elif path.suffix == ".toml":
            config = _toml().loads(text)
        elif path.suffix in (".yaml", ".yml"):
            config = require("yaml", "a .yaml config file").safe_load(text)
        else:
            raise ValueError("must end in .json, .toml or .yaml")
    except ImportError:
        raise
    except Exception as error:  # each parser has its own
        raise ValueError(f"--config {path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path}: must hold a mapping, got {type(config).__name__}")
    return config


def _toml() -> Any:
    try:
        return importlib.import_module("tomllib")
    except ImportError:  # Python 3.10
        return require("tomli", "a .toml config file on Python 3.10")
