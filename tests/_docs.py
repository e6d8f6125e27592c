"""Code blocks of the documentation, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, heading: str) -> list[str]:
    """The Python blocks below a heading of a page, down to the next heading."""
    sections = re.split(r"^## ", (DOCS / page).read_text(), flags=re.MULTILINE)
    for section in sections:
        if section.splitlines()[0] == heading:
            return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    raise ValueError(f"docs/{page} has no heading {heading!r}")
