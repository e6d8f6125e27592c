"""`import fuzz` and `import _helpers`, as the runner's processes have them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
