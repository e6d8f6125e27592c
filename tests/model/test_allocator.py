"""Large CPU tensors of a training process lie in one range of memory: nothing is lost between them, what a step frees
is there for the next, and the system has it back afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pyfast_dpo.model import allocator

needs_arena = pytest.mark.skipif(
    not allocator.AVAILABLE, reason="built with another torch: its allocator is used"
)

PRELUDE = """
import resource, torch
from pyfast_dpo.model.allocator import use_arena

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def floats(kilobytes):
    return torch.empty(kilobytes * 256)
"""


def run(program: str, **environment: str) -> list[int]:
    """The numbers that a process of its own prints: what is asked of an allocator depends on what came before."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@needs_arena
@pytest.mark.parametrize("used", [True, False])
def test_freed_memory_serves_again_and_is_given_back_at_the_end(used):
    faults, kept, after = run(f"""
before = held()
end = use_arena() if {used} else (lambda: None)
for _ in range(10):
    first = faults()
    tensors = [torch.zeros(20_000_000) for _ in range(3)]
    del tensors
    last = faults()
kept = held() - before
end()
print(last - first, kept, held() - before)
""")
    if used:
        assert faults < 100
        assert kept > 200e6 and after < 40e6
    else:
        assert faults > 200, "without, every step gets its pages anew"
        assert kept < 40e6


@needs_arena
def test_blocks_are_found_again_whatever_small_ones_came_in_between():
    """Layers that keep some tensors and free others, with small allocations all the time."""
    program = """
end = use_arena() if {used} else (lambda: None)
before, most = held(), 0
for step in range(6):
    kept, small = [], []
    for layer in range(30):
        tensors, live = [], sum(tensor.nbytes for tensor in kept)
        for size in [1500 + 100 * step, 4000 + 270 * step] * 3:
            tensors.append(floats(size).fill_(1))
            small += [torch.empty(40) for _ in range(20)]
        most = max(most, live + sum(tensor.nbytes for tensor in tensors))
        kept += tensors[:3]
        del tensors
    del kept, small
print(most, held() - before)
"""
    live, used = run(program.format(used=True))
    _, others = run(program.format(used=False), MALLOC_TRIM_THRESHOLD_="-1", MALLOC_MMAP_MAX_="0")
    print(f"bytes held over those in use: {used / live:.2f}; the C library's {others / live:.2f}")
    assert used < 1.05 * live


# Tensors in kilobytes that are made, those of them that are freed, and one more: how far behind the first it lies.
PLACES = [
    ([100, 100, 100], [1], 100, 100, "in a hole of its size"),
    ([100, 100, 100, 100], [1, 2], 200, 100, "in two holes that touch, freed in their order"),
    ([100, 100, 100, 100], [2, 1], 200, 100, "and in the opposite one"),
    ([100, 100, 100, 100, 100], [1, 3, 2], 300, 100, "in three, the middle one last"),
    ([200, 100, 100, 100], [0, 2], 100, 0, "in the first that fits"),
    ([200, 100, 100, 100], [0, 2], 250, 500, "behind all when none does"),
    ([100, 100], [1], 300, 100, "where the last one was"),
    ([100, 100], [0, 1], 300, 0, "at the beginning when all is free"),
]


@needs_arena
@pytest.mark.parametrize(
    "made, freed, size, place", [p[:4] for p in PLACES], ids=[p[4] for p in PLACES]
)
def test_a_tensor_takes_the_first_place_that_fits(made, freed, size, place):
    first, last = run(f"""
use_arena()
tensors = [floats(size) for size in {made}]
first = tensors[0].data_ptr()
for index in {freed}:
    tensors[index] = None
print(first, floats({size}).data_ptr())
""")
    assert (last - first) / 1024 == place


@needs_arena
def test_small_tensors_stay_with_the_c_library():
    small, large, other = run("""
use_arena()
large, small, other = floats(64), floats(63), floats(64)
print(small.data_ptr(), large.data_ptr(), other.data_ptr())
""")
    assert other - large == 64 * 1024
    assert not large <= small < other


@needs_arena
def test_tensors_survive_the_end_and_are_freed_after_it():
    before, living, after = run("""
end = use_arena()
start = held()
tensor = torch.ones(50_000_000)
end()
assert tensor.sum() == 50_000_000
living = held()
tensor.resize_(60_000_000)  # by the allocator it came from
assert tensor[:50_000_000].sum() == 50_000_000
del tensor
print(start, living, held())
""")
    assert living - before > 190e6
    assert after - before < 20e6


@needs_arena
def test_the_arena_ends_with_its_last_user():
    inside, between, outside = run("""
first, second = use_arena(), use_arena()
inside = floats(1024).data_ptr()
first()
between = floats(1024).data_ptr()
second()
print(inside, between, floats(1024).data_ptr())
""")
    assert inside == between != outside


@needs_arena
def test_threads_may_allocate_and_free_at_once():
    (wrong,) = run("""
import random, threading
use_arena()
wrong = 0

def work(seed):
    global wrong
    choose, kept = random.Random(seed), []
    for turn in range(2000):
        value = seed * 10_000 + turn
        kept.append((value, torch.full((choose.randrange(16_000, 80_000),), float(value))))
        if len(kept) > 8:
            expected, tensor = kept.pop(choose.randrange(8))
            wrong += int((tensor != expected).any())

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(wrong)
""")
    assert wrong == 0


@needs_arena
def test_a_forked_process_has_memory_of_its_own():
    (status, value) = run("""
import os
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
use_arena()
tensor = torch.ones(1_000_000)
child = os.fork()
if child == 0:
    tensor.fill_(2)
    other = torch.full((1_000_000,), 3.0)
    os._exit(7 if other.data_ptr() != tensor.data_ptr() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(tensor.sum()))
""")
    assert (status, value) == (7, 1_000_000)


@needs_arena
def test_the_profiler_sees_its_tensors():
    (seen,) = run("""
use_arena()
with torch.profiler.profile(profile_memory=True) as profile:
    tensor = torch.empty(1_000_000)
print(sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.key == "aten::empty"))
""")
    assert seen >= 4_000_000


@needs_arena
def test_a_limit_on_addresses_leaves_the_c_library():
    """No memory of our own then, and no error."""
    (value,) = run("""
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
end = use_arena()
print(int(torch.ones(1_000_000).sum()))
end()
""")
    assert value == 1_000_000


def test_another_torch_than_the_binarys_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert allocator._import_arena() is None
    monkeypatch.setattr(allocator, "_ARENA", None)
    allocator.use_arena()()


@pytest.mark.parametrize("device, expected", [("cpu", ["begin", "end"]), ("cuda", [])])
def test_training_on_the_cpu_begins_and_ends_it_once(monkeypatch, device, expected):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pyfast_dpo.trainers import callbacks

    calls = []

    def begin():
        calls.append("begin")
        return lambda: calls.append("end")

    monkeypatch.setattr(callbacks, "use_arena", begin)
    callback = callbacks.KeepFreedMemory()
    args = SimpleNamespace(device=torch.device(device))
    for _ in range(2):  # as auto_find_batch_size does
        callback.on_train_begin(args, None, None)
    for _ in range(2):
        callback.on_train_end(args, None, None)
    assert calls == expected
