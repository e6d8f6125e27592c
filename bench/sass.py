"""Counts the instructions of a kernel's inner loop in what nvcc made of it: no GPU is needed.

The loop is the one that moves 16 bytes at a time; the path through it is the shortest that takes all of those
loads and stores, so that tails and rare branches (a new maximum, the target's vector) are not counted.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"


@dataclass
class Loop:
    """One turn of a kernel's inner loop, for one thread."""

    kernel: str
    instructions: int
    loads: int  # of 16 bytes
    stores: int
    exponentials: int  # the MUFU pipe
    classes: dict[str, int]  # instructions by their first word

    def elements(self, load_lanes: int) -> int:
        return self.loads * load_lanes


def find_tool(name: str) -> str | None:
    """nvcc or nvdisasm: on PATH, in CUDA_HOME, or where pip puts NVIDIA's packages."""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    places += [f"{path}/nvidia/cu13/bin" for path in sys.path]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def disassemble(source: Path, architecture: int) -> str:
    """SASS of a .cu file."""
    nvcc, nvdisasm = find_tool("nvcc"), find_tool("nvdisasm")
    if nvcc is None or nvdisasm is None:
        raise FileNotFoundError(f"{'nvcc' if nvcc is None else 'nvdisasm'} was not found")
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernel.cubin")
        flags = ["-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", f"-I{CSRC}"]
        subprocess.run([nvcc, *flags, str(source), "-o", cubin], check=True, capture_output=True)
        text = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True)
    return text.stdout


def demangled(names: list[str]) -> list[str]:
    """Without namespaces and arguments: slice_kernel<BFloat16>."""
    done = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True)
    noise = r"\(anonymous namespace\)::|pyfast_dpo::(cuda::)?|^void |\(.*\)$"
    return [re.sub(noise, "", name) for name in done.stdout.splitlines()]


def loops(sass: str) -> dict[str, Loop]:
    """Inner loop of every kernel that has one with 16-byte loads; names without namespaces."""
    found: dict[str, Loop] = {}
    parts = re.split(r"^\.text\.(.+):$", sass, flags=re.MULTILINE)
    for name, body in zip(demangled(parts[1::2]), parts[2::2], strict=True):
        loop = _inner_loop(name, _Graph(body))
        if loop is not None:
            found[name] = loop
    return found


class _Graph:
    """Basic blocks of a kernel: where they start and end, and where they lead."""

    def __init__(self, body: str) -> None:
        self.code: list[str] = []
        labels: dict[str, int] = {}
        for line in body.splitlines():
            if line.startswith("\t.section"):
                break
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(self.code)
            if instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
                self.code.append(instruction[1].strip())
        starts = {0, *labels.values()}
        starts |= {i + 1 for i, text in enumerate(self.code) if re.search(r"\b(BRA|EXIT)\b", text)}
        ordered = sorted(s for s in starts if s < len(self.code))
        self.ends = dict(zip(ordered, [*ordered[1:], len(self.code)], strict=True))
        self.next: dict[int, list[int]] = {}
        for start, end in self.ends.items():
            last = self.code[end - 1]
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", last)
            always = re.match(r"(BRA|EXIT)\b", last) and not re.search(r"BRA !?U?P\d", last)
            self.next[start] = [labels[target[1]]] if target and target[1] in labels else []
            if not always and end in self.ends:
                self.next[start].append(end)

    def block(self, start: int) -> list[str]:
        return self.code[start : self.ends[start]]

    def wide(self, start: int, what: str) -> int:
        return sum(what in text and ".128" in text for text in self.block(start))

    def shortest(self, start: int, end: int, low: int, high: int) -> list[int] | None:
        """Blocks from start to end inside [low, high] with the fewest instructions."""
        best = {start: len(self.block(start))}
        before: dict[int, int] = {}
        queue = [(best[start], start)]
        while queue:
            length, here = heapq.heappop(queue)
            if here == end:
                path = [end]
                while path[-1] != start:
                    path.append(before[path[-1]])
                return path[::-1]
            for there in self.next[here]:
                through = length + len(self.block(there))
                if low <= there <= high and through < best.get(there, sys.maxsize):
                    best[there], before[there] = through, here
                    heapq.heappush(queue, (through, there))
        return None


def _inner_loop(name: str, graph: _Graph) -> Loop | None:
    candidates = []
    for back in graph.ends:
        for head in graph.next[back]:
            if head > back:
                continue
            inside = [start for start in graph.ends if head <= start <= back]
            most = max(graph.wide(start, "LDG") for start in inside)
            if most == 0:
                continue
            through = {start for start in inside if graph.wide(start, "STG")}
            loading = [start for start in inside if graph.wide(start, "LDG")]
            through |= (
                set(loading)
                if most == 1
                else {start for start in loading if graph.wide(start, "LDG") == most}
            )
            path = [head]
            for stop in [*sorted(through), back]:
                step = graph.shortest(path[-1], stop, head, back)
                if step is None:
                    break
                path += step[1:]
            else:
                code = [text for start in path for text in graph.block(start)]
                candidates.append(_count(name, code))
    # A loop over rows has thousands of instructions; one that only fills has no exponential.
    with_work = [loop for loop in candidates if loop.exponentials and loop.instructions < 1000]
    # Of the copies for aligned and other rows, the one for aligned rows loads every byte once.
    return min(with_work, key=lambda loop: loop.instructions / loop.loads, default=None)


def _count(name: str, code: list[str]) -> Loop:
    words = Counter(re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0] for text in code)
    wide = [text for text in code if ".128" in text]
    return Loop(
        name,
        len(code),
        sum("LDG" in text for text in wide),
        sum("STG" in text for text in wide),
        words["MUFU"],
        dict(words.most_common()),
    )
