"""What the commands show: errors that the user can mend in one line, and no chatter of libraries."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from pyfast_dpo.ops.extras import require


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """For the set-up of a command (options, files, data, model): one line and exit status 1."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SystemExit(f"pyfast-dpo: error: {error}") from error


def quiet_transformers(purpose: str) -> Any:
    """Imports `transformers` without its loading bars and its notices to developers."""
    transformers = require("transformers", purpose)
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return transformers
