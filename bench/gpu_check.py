"""Everything that needs a GPU, in one command, on a machine without network: build, test, check, measure.

    python bench/gpu_check.py [--out DIR] [--scratch DIR]

Needs torch with CUDA, nvcc, ninja, pybind11, numpy and pytest. Builds into a scratch folder, runs the device
tests, compute-sanitizer where it works, and bench_gpu.py; writes gpu.json and, with matplotlib, gpu.png.
Exits non-zero when the build, a test, the sanitizer or the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "test_cuda_device.py"


@dataclass
class Step:
    name: str
    result: str  # "ok", "FAILED" or why it did not run
    seconds: float = 0.0
    detail: str = ""


def run(
    command: list[str], limit: float, cwd: Path, environment: dict[str, str]
) -> tuple[int, str, float]:
    """Exit status (124: past the limit), output and seconds; the end of the output is printed."""
    print(f"\n$ {' '.join(command)}", flush=True)
    start = time.monotonic()
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


def outcome(status: int) -> str:
    return "ok" if status == 0 else "FAILED"


def build(scratch: Path) -> Step:
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    environment = {"PYFAST_DPO_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--upgrade"]
    pip += ["--no-index", "--target", str(scratch), str(ROOT)]
    status, _, seconds = run(pip, 240, ROOT, environment)
    return Step("build", outcome(status), seconds, f"for compute capability {capability}")


def pytest_command(report: Path, *extra: str) -> list[str]:
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"--rootdir={ROOT}"]
    return [sys.executable, "-m", "pytest", str(TESTS), *options, *extra]


def counts(report: Path) -> tuple[int, str]:
    """Tests that passed, and a line about all of them."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, failed, errors, skipped = (
        int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")
    )
    passed = total - failed - errors - skipped
    return passed, f"{passed} passed, {failed + errors} failed, {skipped} skipped"


def device_tests(scratch: Path) -> Step:
    report = scratch / "device_tests.xml"
    # From the scratch folder: the source tree has a pyfast_dpo without kernels for this machine.
    status, _, seconds = run(pytest_command(report), 200, scratch, {"PYTHONPATH": str(scratch)})
    passed, line = counts(report) if report.exists() else (0, "no report")
    return Step("device tests", "ok" if status == 0 and passed else "FAILED", seconds, line)


def sanitizer(scratch: Path, tool: str) -> Step:
    name = f"compute-sanitizer {tool}"
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(home / "bin")
    )
    if found is None:
        return Step(name, "not found")
    report = scratch / f"sanitizer_{tool}.xml"
    command = [found, "--tool", tool, "--error-exitcode", "99"]
    command += pytest_command(report, "-k", "(test_layouts or test_certain_model) and bfloat16")
    # Without torch's caching every tensor is an allocation of its own, with bounds of its own.
    environment = {"PYTHONPATH": str(scratch), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output, seconds = run(command, 60, scratch, environment)
    if "not supported" in output or "Unable to find injection" in output:
        return Step(name, "not supported here", seconds)
    if status == 124:
        return Step(name, "stopped after 60 s", seconds)
    passed, line = counts(report) if report.exists() else (0, "no report")
    return Step(name, "ok" if status == 0 and passed else "FAILED", seconds, line)


def benchmark(scratch: Path, figures: Path) -> tuple[Step, str]:
    command = [sys.executable, str(ROOT / "bench" / "bench_gpu.py"), "--json", str(figures)]
    status, output, seconds = run(command, 200, scratch, {"PYTHONPATH": str(scratch)})
    return Step("benchmark", outcome(status), seconds), output


def plot(figures: dict, path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[dict]] = {}
    for row in figures["rows"]:
        if not row["note"]:
            groups.setdefault(f"{row['workload']}\n{row['pass_']}", []).append(row)
    figure, axes = pyplot.subplots(1, len(groups), figsize=(3.2 * len(groups), 3.4), sharey=True)
    for axis, (title, rows) in zip(axes, groups.items(), strict=True):
        names = [row["contestant"] for row in rows]
        colors = [
            "#888888" if "floor" in n else "#d1495b" if "pyfast" in n else "#30638e" for n in names
        ]
        axis.bar(names, [row["of_copy"] for row in rows], color=colors)
        axis.set_title(title, fontsize=8)
        axis.tick_params(axis="x", rotation=60, labelsize=7)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("share of the copy bandwidth")
    figure.suptitle(f"{figures['device']}, torch {figures['torch']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument(
        "--scratch", type=Path, help="default: a temporary folder, removed afterwards"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check.py needs a CUDA device; torch sees none", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="pyfast_dpo_gpu_") as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        out = options.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        steps = [build(scratch)]
        figures_path, figures_table = scratch / "figures.json", ""
        if steps[0].result == "ok":
            steps.append(device_tests(scratch))
            steps += [sanitizer(scratch, tool) for tool in ("memcheck", "racecheck")]
            step, figures_table = benchmark(scratch, figures_path)
            steps.append(step)
        figures = json.loads(figures_path.read_text()) if figures_path.exists() else {"rows": []}
        figures.setdefault("device", torch.cuda.get_device_name())
        figures["steps"] = [asdict(step) for step in steps]
        (out / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")
        drawn = bool(figures["rows"]) and plot(figures, out / "gpu.png")

    print(f"\n{'=' * 90}\n{figures['device']}, torch {torch.__version__}{figures_table}\n")
    for step in steps:
        print(f"{step.name:28}{step.result:20}{step.seconds:7.1f} s  {step.detail}")
    print(f"written: {out / 'gpu.json'}" + (f", {out / 'gpu.png'}" if drawn else ""))
    return 1 if any(step.result == "FAILED" for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
