"""The house: imports go one way, and every room is one that CONTRIBUTING describes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pyfast_dpo"

# From the ground floor up. A room sees the floors below it and itself, not its neighbours.
FLOORS = [
    {"ops"},
    {"losses"},
    {"logprobs", "numpy"},
    {"layout"},
    {"model", "data"},
    {"rollout", "rewards", "evaluation"},
    {"trainers"},
    {"integrations"},
    {"feedback", "lab"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOP = len(FLOORS)  # pyfast_dpo itself: `__init__` and `distributed`, which only hand names on
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str | None:
    """The room of a dotted name below pyfast_dpo; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR_OF else None


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of this package that a source imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "pyfast_dpo":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "pyfast_dpo":
                yield from ((node.lineno, f"pyfast_dpo.{alias.name}") for alias in node.names)
            elif node.module.startswith("pyfast_dpo."):
                yield node.lineno, node.module
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            yield node.lineno, "a relative import, which hides its room"


def wrong_imports(room: str | None, source: str) -> list[str]:
    floor = TOP if room is None else FLOOR_OF[room]
    wrong = []
    for line, name in imported(source):
        target = room_of(name)
        seen = TOP if target is None else FLOOR_OF[target]
        # The command line shows the version and the build; it stands above everything else.
        allowed = target == room or seen < floor or (target is None and room == "cli")
        if not allowed:
            wrong.append(f"line {line}: {room or 'pyfast_dpo'} imports {name}")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_from_the_floors_below_it(path: Path) -> None:
    module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    wrong = wrong_imports(room_of(module), path.read_text())
    assert not wrong, f"{path.relative_to(ROOT)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "room, source",
    [
        ("losses", "from pyfast_dpo.logprobs.head import Head"),
        ("model", "def late():\n    from pyfast_dpo.trainers import DPOTrainer"),
        ("model", "import pyfast_dpo.data.rows"),  # a neighbour
        ("ops", "from pyfast_dpo import token_logps"),  # the roof
        ("ops", "from ..losses import pairs"),
        ("evaluation", "from pyfast_dpo import trainers"),
    ],
)
def test_what_the_rule_is_for_is_found(room: str, source: str) -> None:
    assert wrong_imports(room, source)


def test_every_room_is_on_a_floor_and_described() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(FLOOR_OF), f"not on a floor: {sorted(rooms - set(FLOOR_OF))}"
    text = (ROOT / "CONTRIBUTING.md").read_text()
    missing = [room for room in sorted(rooms) if f"`{room}/`" not in text]
    assert not missing, f"CONTRIBUTING.md does not say what is in {missing}"


def test_the_top_of_the_package_holds_only_what_users_import() -> None:
    assert sorted(p.name for p in PACKAGE.glob("*.py")) == ["__init__.py", "distributed.py"]


def test_a_file_is_one_sitting() -> None:
    """400 lines at most; those of the demonstration's pairs are data."""
    long = {
        path.relative_to(ROOT).as_posix(): count
        for folder in ("pyfast_dpo", "csrc", "bench")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
        and (count := len(path.read_text().splitlines())) > 400
    }
    assert not long, f"cut where the subject changes: {long}"


def test_tests_stand_where_their_subject_does() -> None:
    beside = {"house", "docs", "bench", "cuda", "host_cuda", "fuzz"}
    rooms = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert rooms <= set(FLOOR_OF) | beside, sorted(rooms - set(FLOOR_OF) - beside)
    assert not list((ROOT / "tests").glob("test_*.py")), "a test file without a room"
