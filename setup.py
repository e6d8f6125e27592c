"""Builds pyfast_dpo.ops._C and pyfast_dpo.ops._arena with one ninja file: C++ by the C++ compiler, CUDA by nvcc where it is
found.

Environment: PYFAST_DPO_CUDA=auto|0|1 (auto: CUDA kernels when nvcc is found), CUDA_HOME,
TORCH_CUDA_ARCH_LIST (such as "8.0;9.0+PTX"), MAX_JOBS, DEBUG=1, CXX; PYFAST_DPO_SANITIZE (such as
"address,undefined", or "thread"): instrumented CPU kernels in a folder of their own below build/, for `make fuzz`.

torch's BuildExtension is not used: on a CPU-only torch it refuses CUDA sources, and with a CUDA torch it links
libtorch_cuda. The kernels need neither: they know no torch, and the CUDA runtime is linked statically.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# Binaries for one architecture run on later ones of the same major version; PTX covers what comes after.
DEFAULT_ARCHITECTURES = ["8.0", "9.0", "10.0", "12.0+PTX"]
TORCH_TARGET_VERSION = (
    "0x020a000000000000"  # the stable ABI of torch 2.10: one binary for every later torch
)
APART = ("cuda", "arena")  # folders of csrc with sources that not every build of _C takes
WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]  # gcc's own intrinsics


def cuda_home() -> Path | None:
    """The CUDA toolkit with nvcc, or None when it is not wanted or not there."""
    wanted = "0" if sanitizers() else os.environ.get("PYFAST_DPO_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"PYFAST_DPO_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        # The nvcc on PATH may be a link or a script: ask it where its toolkit is.
        lines = subprocess.run(
            [nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        ).stderr
        top = re.search(r"^#\$ TOP=(.+)$", lines, re.MULTILINE)
        candidates.append(top.group(1).strip() if top else str(Path(nvcc).resolve().parent.parent))
    candidates.append("/usr/local/cuda")
    for candidate in candidates:
        if candidate and (Path(candidate) / "bin" / "nvcc").exists():
            return Path(candidate).resolve()
    if wanted == "1":
        raise SystemExit("PYFAST_DPO_CUDA=1 but nvcc was not found; set CUDA_HOME or PATH")
    return None


def architectures(nvcc: Path) -> list[str]:
    """Numbers such as "90", with "+PTX" where asked, of what this nvcc can compile."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    names = re.split(r"[;\s]+", wanted.strip()) if wanted else DEFAULT_ARCHITECTURES
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"compute_(\d+)", listed.stdout))
    numbers = [name.replace(".", "") for name in names if name]
    unknown = [n for n in numbers if n.removesuffix("+PTX").rstrip("af") not in known]
    if wanted and unknown:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST names {unknown}, but {nvcc} knows {sorted(known)}")
    return [n for n in numbers if n not in unknown]


def find_library(home: Path, name: str) -> Path:
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (home / folder / name).exists():
            return home / folder / name
    raise SystemExit(
        f"{name} was not found below {home}; install the CUDA runtime's static library"
    )


def sanitizers() -> str:
    return os.environ.get("PYFAST_DPO_SANITIZE", "")


def sanitizer_flags() -> list[str]:
    return [f"-fsanitize={sanitizers()}", "-fno-sanitize-recover=all"]


def build_folder() -> Path:
    name = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    return ROOT / "build" / "-".join([name, *filter(None, sanitizers().split(","))])


def escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Compiles the two extensions of this package: _C, for every torch from 2.10 on, and _arena, for the release of
    torch that is installed now."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if sanitizers():
            # A binary that only a preloaded run-time library can load must not take the place of the usual one.
            self.inplace, self.build_lib = False, str(build_folder() / "lib")

    def build_extensions(self) -> None:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        debug = os.environ.get("DEBUG", "0") not in ("", "0")
        # Not build_temp: pip gives that a fresh folder every time, and ninja would start anew.
        build = build_folder()
        build.mkdir(parents=True, exist_ok=True)

        optimize = ["-O0", "-g"] if debug else ["-O3", "-DNDEBUG"]
        if sanitizers():
            # The first finding ends the process, so that none is only a line in a log. Vectors of the kernels
            # are intrinsics, so -O1 runs the loops and tails that -O3 runs.
            optimize = ["-O1", "-g1", "-fno-omit-frame-pointer", *sanitizer_flags()]
        # -isystem, pybind11 before torch: torch bundles an older pybind11 of its own.
        python_headers = sysconfig.get_paths()["include"]
        system = [pybind11.get_include(), python_headers, *include_paths()]
        cxx_flags = [
            *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"),
            *optimize,
            *WARNINGS,
            f"-I{CSRC}",
            *(f"-isystem{path}" for path in system),
            f"-DPFD_TORCH_VERSION={torch.__version__}",
        ]
        link_flags = [
            *(f"-L{path}" for path in library_paths()),
            "-Wl,--exclude-libs,ALL",
            *(sanitizer_flags() if sanitizers() else [] if debug else ["-s"]),
        ]
        # torch stays needed although nothing names it: through it the loader finds the CUDA stream symbol.
        torch_libraries = [
            *("-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10")
        ]
        sources = [p for p in sorted(CSRC.glob("*/*.cpp")) if p.parent.name not in APART]

        home = cuda_home()
        nvcc_flags: list[str] = []
        if home is None:
            sources.append(CSRC / "cuda" / "not_built.cpp")
            summary = "without CUDA kernels"
        else:
            targets = architectures(home / "bin" / "nvcc")
            sources += sorted((CSRC / "cuda").glob("*.cu"))
            nvcc_flags = [
                "-std=c++17",
                "-O3",
                "-Xfatbin",
                "-compress-all",
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden",
            ]
            nvcc_flags += [f"-I{CSRC}"]
            for target in targets:
                number = target.removesuffix("+PTX")
                code = [f"sm_{number}"] + ([f"compute_{number}"] if target.endswith("+PTX") else [])
                nvcc_flags.append(f"-gencode=arch=compute_{number},code=[{','.join(code)}]")
            torch_libraries += [
                str(find_library(home, "libcudart_static.a")),
                "-ldl",
                "-lrt",
                "-lpthread",
            ]
            summary = f"with CUDA kernels for {', '.join(targets)} by {home / 'bin' / 'nvcc'}"
        summary = f"pyfast_dpo: CPU kernels generic, avx2, avx512, avx512_bf16, amx; {summary}; torch {torch.__version__}"

        stable = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
        edges = [
            *self.edges("pyfast_dpo.ops._C", sources, build, [stable], torch_libraries),
            *self.edges(
                "pyfast_dpo.ops._arena", sorted(CSRC.glob("arena/*.cpp")), build, [], ["-lc10"]
            ),
        ]
        cxx = os.environ.get("CXX", "g++")
        nvcc = home / "bin" / "nvcc" if home else "nvcc"
        rules = {
            "cxx": f"{cxx} {join(cxx_flags)} $flags -MMD -MF $out.d -c $in -o $out",
            "nvcc": f"{nvcc} {join(nvcc_flags)} -MD -MF $out.d -c $in -o $out",
            "link": f"{cxx} -shared $in -o $out {join(link_flags)} $libraries",
        }
        lines = ["ninja_required_version = 1.5"]
        for name, command in rules.items():
            lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
            lines += [] if name == "link" else ["  depfile = $out.d", "  deps = gcc"]
        (build / "build.ninja").write_text("\n".join([*lines, *edges]) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([ninja_executable(), "-C", str(build), *jobs], check=True)
        print(summary, flush=True)

    def edges(
        self, name: str, sources: list[Path], build: Path, flags: list[str], libraries: list[str]
    ) -> list[str]:
        """Ninja's lines for one extension: its objects and its binary."""
        output = Path(self.get_ext_fullpath(name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        objects, lines = [], []
        for source in sources:
            objects.append(escape(str(build / f"{source.parent.name}_{source.name}.o")))
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            lines += [f"build {objects[-1]}: {rule} {escape(str(source))}"]
            lines += [f"  flags = {join(flags)}"] if rule == "cxx" else []
        lines += [f"build {escape(str(output))}: link {' '.join(objects)}"]
        return [*lines, f"  libraries = {join(libraries)}"]


def join(flags: list[str]) -> str:
    return shlex.join(flags).replace("$", "$$")


def ninja_executable() -> str:
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("ninja was not found: pip install ninja") from None
        return found


setup(
    ext_modules=[Extension(f"pyfast_dpo.{name}", sources=[]) for name in ("ops._C", "ops._arena")],
    cmdclass={"build_ext": NinjaBuild},
)
