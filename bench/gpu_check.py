"""Everything that needs a GPU, in one command, on a machine without network: build, check, measure, test, profile.

    python bench/gpu_check.py [--out DIR] [--limit SECONDS]     on a GPU
    python bench/gpu_check.py --rehearse --out DIR              the same steps on the CPU: does the script work?

Needs torch with CUDA, nvcc, ninja, pybind11, numpy and pytest; peers that PYTHONPATH finds take part. Builds into a
scratch folder. Steps come in the order of their worth, each within its own limit and all within --limit:
what is cut off is what matters least. Written as it comes, so that a killed run leaves what it had:
gpu.json (figures, after every workload), gpu_check.json (steps, after each), gpu_log.txt (all output),
gpu_tests.xml (junit), and, with matplotlib, gpu.png. Exits non-zero when a step fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_plot import plot
from gpu_runner import FAILED, STOPPED, Reports, Runner, Step, counts, first_failure, outcome

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
TESTS = sorted((ROOT / "tests").rglob("test_cuda_device*.py"))
SANITIZED = next(file for file in TESTS if file.name == "test_cuda_device.py")
# Seconds of a step at most; the whole run has --limit.
LIMITS = {
    "build": 150.0,
    "smoke": 40.0,
    "logits": 60.0,
    "head": 120.0,
    "training": 100.0,
    "attention": 30.0,
    "tests": 60.0,  # a file
    "ncu": 60.0,
    "compiled": 45.0,
    "sanitizer": 60.0,  # a tool
}
BEFORE_TESTS, AFTER_TESTS = ("logits", "head", "training", "attention"), ("compiled",)
NCU_SECTIONS = (
    "SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "SchedulerStats", "LaunchStats",
)  # fmt: skip
OUR_KERNELS = "regex:^(slice|sequence|backward)_kernel"


class Check:
    def __init__(self, runner: Runner, out: Path, rehearse: bool, installed: bool) -> None:
        self.runner, self.out, self.rehearse, self.installed = runner, out, rehearse, installed
        self.reports = Reports(out / "gpu_tests.xml")
        if not installed:
            # The package built here comes first: the source tree may have one without kernels for this machine.
            before = os.environ.get("PYTHONPATH")
            places = [str(runner.folder), *([before] if before else [])]
            runner.environment["PYTHONPATH"] = os.pathsep.join(places)

    def steps(self) -> Iterator[Step]:
        if not self.installed:
            step = self.build()
            yield step
            if step.result == FAILED:
                return
        yield self.smoke()
        for group in BEFORE_TESTS:
            yield self.figures(group)
        for file in TESTS:
            yield from self.device_tests(file)
        yield self.profile()
        for group in AFTER_TESTS:
            yield self.figures(group)
        for tool in ("memcheck", "racecheck"):
            yield self.sanitizer(tool)

    def build(self) -> Step:
        """pip, without network and without its own build environment; where that fails (a setuptools too old
        for our pyproject.toml), setup.py alone, from a folder without one."""
        capability = "9.0" if self.rehearse else "{}.{}".format(*torch.cuda.get_device_capability())
        environment = {"TORCH_CUDA_ARCH_LIST": capability, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environment["PYFAST_DPO_CUDA"] = "auto" if self.rehearse else "1"
        scratch, limit = self.runner.folder, LIMITS["build"]
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        pip += ["--no-index", "--no-compile", "--upgrade", "--target", str(scratch), str(ROOT)]
        status, _, seconds = self.runner.run(pip, limit, ROOT, environment)
        how = "pip"
        if status not in (0, STOPPED):
            shutil.copytree(
                ROOT / "pyfast_dpo",
                scratch / "pyfast_dpo",
                ignore=shutil.ignore_patterns("*.so", "__pycache__"),
                dirs_exist_ok=True,
            )
            setup = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", "."]
            status, _, more = self.runner.run(setup, limit, scratch, environment)
            how, seconds = "setup.py, pip failed", seconds + more
        return Step("build", outcome(status), seconds, f"for {capability}, by {how}")

    def smoke(self) -> Step:
        command = [sys.executable, str(BENCH / "gpu_smoke.py")]
        command += ["--device", "cpu"] if self.rehearse else []
        status, _, seconds = self.runner.run(command, LIMITS["smoke"])
        return Step("smoke test", outcome(status), seconds)

    def figures(self, group: str) -> Step:
        """In a process of its own: an error on the device poisons the process that it happens in."""
        limit = min(LIMITS[group], self.runner.left())
        command = [sys.executable, str(BENCH / "bench_gpu.py"), "--only", group]
        command += ["--json", str(self.out / "gpu.json"), "--budget", f"{0.7 * limit:.0f}"]
        command += ["--rehearse", "--repeats", "2"] if self.rehearse else []
        status, output, seconds = self.runner.run(command, limit)
        left = [line for line in output.splitlines() if line.startswith("left out or failed")]
        return Step(f"figures: {group}", outcome(status), seconds, "".join(left))

    def device_tests(self, file: Path) -> Iterator[Step]:
        """A process a file; the first test that fails, or a file that crashed, again with the host waiting for
        every kernel, which names the one at fault."""
        name = file.stem
        step, suite = self.pytest(name, [str(file)])
        step.name = f"device tests: {name}" + (" (on the CPU)" if self.rehearse else "")
        yield step
        if step.result != FAILED:
            return
        failed = None if suite is None else first_failure(suite)
        again = [str(file), "-x"] if failed is None else [f"{file}::{failed}"]
        step, _ = self.pytest(f"{name}_again", again, environment={"CUDA_LAUNCH_BLOCKING": "1"})
        step.name = f"again, blocking: {failed or name}"
        yield step

    def pytest(self, name: str, what: list[str], **options: Any) -> tuple[Step, Any]:
        report = self.runner.folder / f"{name}.xml"
        command = [*options.get("before", []), sys.executable, "-m", "pytest", *what, "-v"]
        command += ["--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [f"--rootdir={ROOT}"]
        limit = options.get("limit", LIMITS["tests"])
        status, output, seconds = self.runner.run(
            command, limit, environment=options.get("environment")
        )
        suite = self.reports.add(report)
        passed, line = (0, "no report") if suite is None else counts(suite)
        ran = passed or self.rehearse  # on a GPU a file that skips every test has tested nothing
        step = Step(name, "ok" if status == 0 and ran else FAILED, seconds, line)
        if "not supported" in output or "Unable to find injection" in output:
            step.result = "not supported here" if options.get("before") else step.result
        return step, suite

    def profile(self) -> Step:
        """Where the time of the kernels on logits goes; the clocks stay as they are."""
        command = [sys.executable, str(BENCH / "gpu_profile.py")]
        found = find_tool("ncu", "/opt/nvidia/nsight-compute/*")
        if self.rehearse:
            command += ["--rehearse"]
        elif found is None:
            return Step("ncu", "not found")
        else:
            sections = [word for section in NCU_SECTIONS for word in ("--section", section)]
            options = ["--clock-control", "none", "--kernel-name", OUR_KERNELS, *sections]
            command = [found, *options, *command]
        status, _, seconds = self.runner.run(command, LIMITS["ncu"])
        return Step("ncu", outcome(status), seconds)

    def sanitizer(self, tool: str) -> Step:
        """A small case, and of it our kernels alone: torch's are many and not ours."""
        name = f"compute-sanitizer {tool}"
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        found = find_tool("compute-sanitizer", f"{home}/bin", f"{home}/compute-sanitizer")
        if found is None or self.rehearse:
            return Step(name, "not found" if found is None else "not in a rehearsal")
        # Without torch's caching every tensor is an allocation of its own, with bounds of its own.
        step, _ = self.pytest(
            f"sanitizer_{tool}",
            [str(SANITIZED), "-k", "(test_layouts or test_certain_model) and bfloat16"],
            before=[
                found,
                "--tool",
                tool,
                "--error-exitcode",
                "99",
                "--kernel-name",
                "kns=pyfast_dpo",
            ],
            limit=LIMITS["sanitizer"],
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        step.name = name
        return step


def find_tool(name: str, *patterns: str) -> str | None:
    """On PATH, or in a folder that matches a pattern; the last such, which is the newest version."""
    found = [
        str(folder / name)
        for pattern in patterns
        for folder in sorted(Path("/").glob(pattern.lstrip("/")))
        if (folder / name).is_file()
    ]
    return shutil.which(name) or (found[-1] if found else None)


def versions() -> str:
    names = (
        "torch",
        "setuptools",
        "pybind11",
        "ninja",
        "numpy",
        "pytest",
        "triton",
        "transformers",
        "trl",
    )
    found = []
    for name in (*names, "liger_kernel", "cut_cross_entropy", "quack-kernels", "matplotlib"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"Python {sys.version.split()[0]}, " + ", ".join(found)


def perform(check: Check) -> int:
    device = "rehearsal" if check.rehearse else torch.cuda.get_device_name()
    facts = {"device": device, "versions": versions()}
    print(facts["versions"], flush=True)
    done: list[Step] = []
    for step in check.steps():
        done.append(step)
        content = {**facts, "steps": [asdict(step) for step in done]}
        (check.out / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"--- {step.name}: {step.result}, {step.seconds:.1f} s {step.detail}", flush=True)
        if step.name.startswith("figures") and (check.out / "gpu.json").exists():
            plot(json.loads((check.out / "gpu.json").read_text()), check.out / "gpu.png")
        if check.runner.left() <= 0:
            done.append(Step("the rest", "left out: the time is over"))
            break
    print(f"\n{'=' * 100}\n{device}, torch {torch.__version__}")
    for step in done:
        print(f"{step.name:50}{step.result:20}{step.seconds:7.1f} s  {step.detail}")
    return 1 if any(step.result == FAILED for step in done) else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="default: bench/results")
    parser.add_argument("--scratch", type=Path, help="default: a temporary folder, then removed")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU; needs --out")
    parser.add_argument("--installed", action="store_true", help="do not build")
    parser.add_argument("--limit", type=float, default=540, help="seconds in all")
    for name, seconds in LIMITS.items():
        parser.add_argument(f"--{name}-limit", type=float, default=seconds, help="seconds")
    options = parser.parse_args(arguments)
    if options.rehearse and options.out is None:
        parser.error("--rehearse needs --out: its figures are no results")
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device; torch sees none", file=sys.stderr)
        return 2
    LIMITS.update({name: getattr(options, f"{name}_limit") for name in LIMITS})
    out = (options.out or BENCH / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.limit
    with tempfile.TemporaryDirectory(prefix="pyfast_dpo_gpu_") as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        runner = Runner(scratch, out / "gpu_log.txt", deadline)
        return perform(Check(runner, out, options.rehearse, options.installed))


if __name__ == "__main__":
    sys.exit(main())
