"""What the pages say of the code is so: the worked example of CONTRIBUTING, and links between pages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# The difference at which the example's loss is asked for: both sides of the hinge, beta 0.5.
PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include "common/losses_pair.h"
namespace pyfast_dpo {{
{struct}
}}
int main() {{
  pyfast_dpo::LossParams params{{}};
  params.beta = 0.5;
  for (double difference : {{-3.0, 0.25, 5.0}}) {{
    const auto value = pyfast_dpo::SquaredHinge::eval(difference, params);
    std::printf("%.17g %.17g\\n", value.loss, value.slope);
  }}
}}
"""


def test_the_struct_of_contributing_is_its_formula(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    struct = re.findall(r"^ *```cpp\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)[0]
    formula = re.findall(r"^ *```python\n(   def .*?)^ *```", text, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "example.cpp").write_text(PROGRAM.format(struct=struct))
    subprocess.run(
        [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", "example.cpp", "-o", "example"],
        cwd=tmp_path,
        check=True,
    )
    output = subprocess.run([tmp_path / "example"], capture_output=True, text=True, check=True)
    printed = torch.tensor(
        [[float(x) for x in line.split()] for line in output.stdout.splitlines()]
    )

    namespace = {"torch": torch}
    exec("if True:\n" + formula, namespace)
    difference = torch.tensor([-3.0, 0.25, 5.0], requires_grad=True)
    losses = namespace["squared_hinge_loss"](difference, 0.5, 0.0, 0.05)
    (slopes,) = torch.autograd.grad(losses.sum(), difference)
    torch.testing.assert_close(printed, torch.stack([losses.detach(), slopes], 1))


def test_names_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:csrc|tests|bench|pyfast_dpo|docs|\.github)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for name, path in (
        ("PairLosses", "csrc/common/losses.h"),
        ("OfDifference", "csrc/common/losses_pair.h"),
        ("OfBoth", "csrc/common/losses_pair.h"),
        ("DIFFERENCE_FORMULAS", "pyfast_dpo/losses/oracle.py"),
        ("PAIR_LOSSES", "pyfast_dpo/losses/table.py"),
        ("FORMULAS", "tests/losses/test_losses_table.py"),
    ):
        assert name in text and re.search(rf"\b{name}\b", (ROOT / path).read_text()), (name, path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
