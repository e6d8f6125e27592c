"""`make fuzz`: random calls of every operator and public function, held against float64.

    python tests/fuzz/run.py --calls 20000 --seconds 600 --seed 1 --sanitize address,undefined

Calls are numbered; a number and the seed give the call, its instruction set included. Lots of calls run in processes
of their own, of which a crash ends one and names its call. Exit status: 1 where anything was found.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOT = 12_500  # calls of a process
HANGS = 300.0  # seconds for a lot, beside those that its calls may take
TAIL = 6000  # characters of a crash's report


@dataclass
class Report:
    calls: int = 0
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    by_capability: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: dict[str, object], capability: str) -> None:
        self.calls += int(str(other["made"]))
        self.counts.update(other["counts"])  # type: ignore[arg-type]
        self.by_capability[capability] += int(str(other["made"]))
        self.faults += [(int(i), text) for i, text in other["faults"]]  # type: ignore[attr-defined]

    def join(self, other: Report) -> None:
        self.calls += other.calls
        self.counts.update(other.counts)
        self.by_capability.update(other.by_capability)
        self.faults += other.faults


def capabilities() -> list[str]:
    """What this CPU offers, of what is built."""
    code = (
        "from pyfast_dpo.ops import build; f = build.build_info();"
        "k = f['cpu_kernels']; print(*k[: k.index(f['cpu_available']) + 1])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYFAST_DPO_CPU_CAPABILITY"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return result.stdout.split()


def binaries(sanitize: str) -> Path:
    """Builds the instrumented extensions; returns their folder."""
    environment = {**os.environ, "PYFAST_DPO_SANITIZE": sanitize}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"], cwd=ROOT, env=environment, check=True
    )
    name = "-".join(
        [sysconfig.get_platform(), str(sys.implementation.cache_tag), *sanitize.split(",")]
    )
    return ROOT / "build" / name / "lib"


def preloaded(sanitize: str) -> str:
    """Run-time libraries that must come before all others. libstdc++ too: the interception of exceptions is set up
    before torch would load it."""
    wanted = {"address": "libasan.so", "thread": "libtsan.so", "undefined": "libubsan.so"}
    names = [wanted[s] for s in sanitize.split(",")][:1] + ["libstdc++.so"]
    compiler = os.environ.get("CXX", "g++")
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={n}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for n in names
    ]
    return " ".join(paths)


class Fuzzer:
    def __init__(self, seed: int, only: str, sanitize: str, built: Path | None) -> None:
        self.seed, self.only = seed, only
        self.levels = capabilities()
        # One thread in torch's start; calls set their own number.
        # Five threads on fewer cores must not wait for each other in a loop.
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment["PYTHONPATH"] = os.pathsep.join(paths)
        self.command = [sys.executable, "-m", "fuzz.worker", "--seed", str(seed), "--only", only]
        if sanitize:
            self.command += ["--binaries", str(built or binaries(sanitize))]
            self.environment |= {
                "LD_PRELOAD": preloaded(sanitize),
                # Python never frees what it holds to its end.
                "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
                "UBSAN_OPTIONS": "print_stacktrace=1",
                "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
            }

    def capability_of(self, index: int) -> str:
        return self.levels[index // LOT % len(self.levels)]

    def run_lot(self, first: int, count: int, seconds: float, report: Report) -> None:
        """Calls of one lot, in one process, or in more where one crashes."""
        end = first + count
        while first < end and len(report.faults) < 200:
            capability = self.capability_of(first)
            with tempfile.NamedTemporaryFile() as progress:
                progress.write(struct.pack("q", first))
                progress.flush()
                command = [*self.command, "--first", str(first), "--count", str(end - first)]
                command += ["--progress", progress.name, "--seconds", str(seconds)]
                environment = {**self.environment, "PYFAST_DPO_CPU_CAPABILITY": capability}
                try:
                    done = subprocess.run(
                        command,
                        capture_output=True,
                        text=True,
                        env=environment,
                        cwd=ROOT,
                        timeout=seconds + HANGS,
                    )
                    crash = (
                        f"exit status {done.returncode}\n{done.stderr[:TAIL]}"
                        if done.returncode
                        else ""
                    )
                except subprocess.TimeoutExpired:
                    crash = "hangs"
                (at,) = struct.unpack("q", Path(progress.name).read_bytes())
            if not crash:
                report.add(json.loads(done.stdout.splitlines()[-1]), capability)
                return
            # Those before the crash were made, and found nothing that they could tell.
            report.add({"made": at - first + 1, "counts": {}, "faults": [[at, crash]]}, capability)
            first = at + 1

    def repeat(self, index: int) -> str:
        only = f" FUZZ_ONLY={self.only}" if self.only else ""
        return f"make fuzz FUZZ_SEED={self.seed} FUZZ_FIRST={index} FUZZ_CALLS=1{only}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only",
        default="",
        help="calls of subjects with this in their name, such as on_logits or attention",
    )
    parser.add_argument("--sanitize", default="address,undefined", help='"" for the usual build')
    parser.add_argument(
        "--built", type=Path, help="folder of instrumented extensions, instead of building them"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument(
        "--report", type=Path, help="a file for the counts and what was found, as JSON"
    )
    options = parser.parse_args()
    fuzzer, report = Fuzzer(options.seed, options.only, options.sanitize, options.built), Report()
    started, last = time.monotonic(), options.first + options.calls
    lock = threading.Lock()

    def play_lot(first: int) -> None:
        left, own = options.seconds - (time.monotonic() - started), Report()
        if left <= 0:
            return
        fuzzer.run_lot(first, min(last, (first // LOT + 1) * LOT) - first, left, own)
        with lock:
            for index, text in own.faults:
                again = fuzzer.repeat(index)
                print(
                    f"call {index} ({fuzzer.capability_of(index)}): {text}\n  again: {again}",
                    flush=True,
                )
            report.join(own)

    lots = [options.first, *range((options.first // LOT + 1) * LOT, last, LOT)]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(play_lot, lots))
    print(
        f"{report.calls} calls in {time.monotonic() - started:.0f} s, seed {options.seed}: {len(report.faults)} found"
    )
    for counts in (report.by_capability, report.counts):
        print("  " + ", ".join(f"{name} {number}" for name, number in sorted(counts.items())))
    if options.report:
        result = {"calls": report.calls, "first": options.first, "seed": options.seed, "counts": report.counts,
                  "capabilities": report.by_capability, "faults": report.faults}  # fmt: skip
        options.report.write_text(json.dumps(result, indent=1))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
