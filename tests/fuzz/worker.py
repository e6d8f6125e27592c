"""The process that makes the calls of one lot; the runner starts it with the sanitizers' run-time library.

Before each call its number is written to the progress file, which a crash leaves behind.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import mmap
import struct
import sys
import time
import traceback
from pathlib import Path

MOST_FAULTS = 20  # of a lot; then it ends


def use_binaries(folder: Path) -> None:
    """The instrumented extensions in place of the package's own."""
    import torch  # noqa: F401  (loads what they link against)

    for name in ("pyfast_dpo.ops._C", "pyfast_dpo.ops._arena"):
        (path,) = folder.glob(f"{name.replace('.', '/')}.*.so")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--binaries", type=Path)
    parser.add_argument("--progress", type=Path, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if options.binaries:
        use_binaries(options.binaries)
    from fuzz.case import Fault
    from fuzz.play import play, subjects

    choices = [s for s in subjects() if options.only in s.__module__ + "." + s.__name__]
    counts: collections.Counter[str] = collections.Counter()
    faults, made, end = [], 0, time.monotonic() + options.seconds
    with options.progress.open("r+b") as file, mmap.mmap(file.fileno(), 8) as progress:
        for index in range(options.first, options.first + options.count):
            if time.monotonic() > end or len(faults) >= MOST_FAULTS:
                break
            struct.pack_into("q", progress, 0, index)
            made += 1
            try:
                subject, outcome = play(options.seed, index, choices)
                counts[f"{subject} {outcome}"] += 1
            except Fault as fault:
                faults.append([index, str(fault)])
            except Exception:
                faults.append([index, "the fuzzer itself:\n" + traceback.format_exc()])
    print(json.dumps({"made": made, "counts": counts, "faults": faults}))


if __name__ == "__main__":
    main()
