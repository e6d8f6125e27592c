"""Everything that needs a GPU, in one command, on a machine without network: build, test, check, measure.

    python bench/gpu_check.py [--out DIR] [--scratch DIR]     on a GPU
    python bench/gpu_check.py --rehearse --out DIR            the same steps on the CPU: does the script work?

Needs torch with CUDA, nvcc, ninja, pybind11, numpy and pytest. Builds into a scratch folder, runs the device
tests, compute-sanitizer where it works, and bench_gpu.py; writes gpu.json and, with matplotlib, gpu.png, after
every step what there is. Exits non-zero when the build, a test, the sanitizer or the benchmark fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = sorted((ROOT / "tests" / "cuda").glob("test_*.py"))
FAILED = "FAILED"


@dataclass
class Step:
    name: str
    result: str  # "ok", "FAILED" or why it did not run
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Check:
    """One run: where it builds, how long it may take, what it has found."""

    scratch: Path
    rehearse: bool
    deadline: float
    installed: bool = False  # test the package that Python finds instead of building one
    steps: list[Step] = field(default_factory=list)

    def run(
        self, command: list[str], limit: float, cwd: Path, environment: dict[str, str]
    ) -> tuple[int, str, float]:
        """Exit status (124: past the limit), output and seconds; the end of the output is printed."""
        print(f"\n$ {' '.join(command)}", flush=True)
        start = time.monotonic()
        limit = max(1.0, min(limit, self.deadline - start))
        try:
            done = subprocess.run(
                command,
                cwd=cwd,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            text = error.stdout or b""
            output = text.decode(errors="replace") if isinstance(text, bytes) else text
            status, output = 124, f"{output}\nstopped after {limit:.0f} s"
        except OSError as error:
            status, output = 127, str(error)
        print(output[-6000:], flush=True)
        return status, output, time.monotonic() - start

    @property
    def environment(self) -> dict[str, str]:
        """Finds the package built here: the source tree may have one without kernels for this machine."""
        return {} if self.installed else {"PYTHONPATH": str(self.scratch)}

    def build(self) -> Step:
        """pip, without network and without its own build environment; where that fails (a setuptools too old
        for our pyproject.toml), setup.py alone, from a folder without one."""
        capability = "9.0" if self.rehearse else "{}.{}".format(*torch.cuda.get_device_capability())
        environment = {"TORCH_CUDA_ARCH_LIST": capability, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environment["PYFAST_DPO_CUDA"] = "auto" if self.rehearse else "1"
        pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        pip += ["--no-index", "--upgrade", "--target", str(self.scratch), str(ROOT)]
        status, _, seconds = self.run(pip, 240, ROOT, environment)
        how = "pip"
        if status != 0:
            shutil.copytree(
                ROOT / "pyfast_dpo",
                self.scratch / "pyfast_dpo",
                ignore=shutil.ignore_patterns("*.so", "__pycache__"),
                dirs_exist_ok=True,
            )
            setup = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", "."]
            status, _, more = self.run(setup, 240, self.scratch, environment)
            how, seconds = "setup.py, pip failed", seconds + more
        detail = f"for compute capability {capability}, by {how}"
        return Step("build", outcome(status), seconds, detail)

    def pytest(self, report: Path, limit: float, *before: str, **options: Any) -> tuple[Step, str]:
        command = [*before, sys.executable, "-m", "pytest", *map(str, TESTS), "-q"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}", f"--rootdir={ROOT}"]
        command += options.get("select", [])
        environment = {**self.environment, **options.get("environment", {})}
        status, output, seconds = self.run(command, limit, self.scratch, environment)
        passed, line = counts(report) if report.exists() else (0, "no report")
        result = "ok" if status == 0 and passed else FAILED
        return Step(
            "", f"stopped after {limit:.0f} s" if status == 124 else result, seconds, line
        ), output

    def device_tests(self) -> Step:
        step, _ = self.pytest(self.scratch / "device_tests.xml", 200)
        step.name = "device tests" + (" (rehearsed on the CPU)" if self.rehearse else "")
        step.result = FAILED if step.result.startswith("stopped") else step.result
        return step

    def sanitizer(self, tool: str) -> Step:
        """A small case under compute-sanitizer, where there is one that works."""
        name = f"compute-sanitizer {tool}"
        home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        places = [home / "bin", home / "compute-sanitizer"]
        found = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path=os.pathsep.join(map(str, places))
        )
        if found is None or self.rehearse:
            return Step(name, "not found" if found is None else "not in a rehearsal")
        # Without torch's caching every tensor is an allocation of its own, with bounds of its own.
        step, output = self.pytest(
            self.scratch / f"sanitizer_{tool}.xml",
            90,
            *(found, "--tool", tool, "--error-exitcode", "99"),
            select=["-k", "(test_layouts or test_certain_model) and bfloat16"],
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        step.name = name
        if "not supported" in output or "Unable to find injection" in output:
            step.result = "not supported here"
        return step

    def benchmark(self, figures: Path) -> tuple[Step, str]:
        script = str(ROOT / "bench" / "bench_gpu.py")
        command = [sys.executable, script, "--json", str(figures)]
        command += ["--rehearse", "--repeats", "3"] if self.rehearse else []
        status, output, seconds = self.run(command, 280, self.scratch, self.environment)
        start = output.find("\n\n")  # after the lines of progress
        return Step("benchmark", outcome(status), seconds), output[start:] if start > 0 else output


def outcome(status: int) -> str:
    return "ok" if status == 0 else FAILED


def counts(report: Path) -> tuple[int, str]:
    """Tests that passed, and a line about all of them."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, failed, errors, skipped = (
        int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")
    )
    passed = total - failed - errors - skipped
    return passed, f"{passed} passed, {failed + errors} failed, {skipped} skipped"


def versions() -> str:
    names = ("torch", "setuptools", "pybind11", "ninja", "numpy", "pytest", "triton", "trl")
    found = []
    for name in (*names, "liger_kernel", "quack-kernels", "matplotlib"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"Python {sys.version.split()[0]}, " + ", ".join(found)


def plot(figures: dict[str, Any], path: Path) -> bool:
    """One panel a workload: the share of the floor that everybody reaches. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in figures["rows"]:
        if not row["note"]:
            groups.setdefault(row["workload"], []).append(row)
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.4 * columns, 3.4 * lines), sharey=True, squeeze=False
    )
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (title, rows) in zip(axes.flat, groups.items(), strict=False):
        names = [row["contestant"] for row in rows]
        colors = [
            "#888888" if name == "floor" else "#d1495b" if "pyfast" in name else "#30638e"
            for name in names
        ]
        axis.bar(names, [row["of_floor"] for row in rows], color=colors)
        if rows[0]["target"]:
            axis.axhline(rows[0]["target"], color="#333333", linewidth=0.8, linestyle="--")
        axis.set_title(title.replace(", ", "\n"), fontsize=7)
        axis.tick_params(axis="x", rotation=60, labelsize=6)
        axis.grid(axis="y", alpha=0.3)
    for row in axes:
        row[0].set_ylabel("share of the floor")
    figure.suptitle(f"{figures['device']}, torch {figures['torch']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def perform(check: Check, out: Path) -> int:
    figures_path = check.scratch / "figures.json"
    device = "rehearsal" if check.rehearse else torch.cuda.get_device_name()
    figures: dict[str, Any] = {"device": device, "torch": torch.__version__, "rows": []}
    print(versions(), flush=True)

    def keep(step: Step) -> bool:
        check.steps.append(step)
        figures["steps"] = [asdict(step) for step in check.steps]
        (out / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")
        return step.result != FAILED

    text = ""
    if check.installed or keep(check.build()):
        keep(check.device_tests())
        # Measured before it is sanitized: when the time is short, figures are worth more.
        step, text = check.benchmark(figures_path)
        if figures_path.exists():
            figures |= json.loads(figures_path.read_text())
        keep(step)
        for tool in ("memcheck", "racecheck"):
            keep(check.sanitizer(tool))
    drawn = bool(figures["rows"]) and plot(figures, out / "gpu.png")
    print(f"\n{'=' * 100}\n{figures['device']}, torch {torch.__version__}\n{text.rstrip()}\n")
    for step in check.steps:
        print(f"{step.name:38}{step.result:20}{step.seconds:7.1f} s  {step.detail}")
    print(f"written: {out / 'gpu.json'}" + (f", {out / 'gpu.png'}" if drawn else ""))
    return 1 if any(step.result == FAILED for step in check.steps) else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="default: bench/results")
    parser.add_argument("--scratch", type=Path, help="default: a temporary folder, then removed")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU; needs --out")
    parser.add_argument("--installed", action="store_true", help="do not build")
    parser.add_argument("--limit", type=float, default=570, help="seconds in all")
    options = parser.parse_args(arguments)
    if options.rehearse and options.out is None:
        parser.error("--rehearse needs --out: its figures are no results")
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device; torch sees none", file=sys.stderr)
        return 2
    out = (options.out or ROOT / "bench" / "results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pyfast_dpo_gpu_") as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + options.limit
        return perform(Check(scratch, options.rehearse, deadline, options.installed), out)


if __name__ == "__main__":
    sys.exit(main())
