"""Every kernel compiled ahead of time for three architectures, without a GPU, against the budgets of its Triton."""

import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in triton")

from cladapt_kernels.aot.compile import COLUMNS, SHARED_LIMIT, path_of

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = path_of(Path(__file__).with_name("budgets"))
KEY = ("variant", "kernel", "sm")
UPDATE = f"make budgets TRITONS={BUDGETS.stem}"
PROBLEMS = """
import torch, triton, triton.language as tl
from cladapt_kernels.aot.compile import Variant, budgets

@triton.jit
def greedy(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(x + i, tl.cumsum(value) / tl.sum(value))

x = torch.empty(2048, device="meta")
row, = budgets([Variant("greedy", lambda: greedy[(1,)](x, BLOCK=2048, num_warps=1, maxnreg=32))], (90,))
print(row["spills"], row["instructions"])
"""


def python(*arguments: str) -> str:
    """Output of a Python of its own: where this one interprets kernels, it cannot compile them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rows_of(text: str) -> dict[tuple[str, ...], dict[str, str]]:
    return {tuple(row[name] for name in KEY): row for row in csv.DictReader(io.StringIO(text))}


def problems(found: dict[tuple[str, ...], dict[str, str]], budget: dict[tuple[str, ...], dict[str, str]]) -> list[str]:
    """What is wrong with the kernels, or with the file of budgets."""
    told = [f"{key}: not in {BUDGETS.name}: {UPDATE}" for key in found.keys() - budget.keys()]
    told += [f"{key}: in {BUDGETS.name} alone: {UPDATE}" for key in budget.keys() - found.keys()]
    for key, row in found.items():
        if int(row["spills"]):
            told.append(f"{key}: {row['spills']} bytes spill")
        if int(row["shared"]) > SHARED_LIMIT[int(row["sm"])]:
            told.append(f"{key}: {row['shared']} bytes of shared memory")
        if allowed := budget.get(key):
            for figure in ("registers", "shared"):
                if int(row[figure]) > int(allowed[figure]):
                    told.append(f"{key}: {figure} {row[figure]}, budget {allowed[figure]}")
                if int(row[figure]) < int(allowed[figure]):
                    told.append(f"{key}: {figure} {row[figure]} is less than the budget, keep it: {UPDATE}")
        faults = {*row["instructions"].split()} & {"serialized", "atom", *row["forbids"].split()}
        told += [f"{key}: {fault}" for fault in sorted(faults)]
        if row["sm"] == "90":
            missing = {*row["expects"].split()} - {*row["instructions"].split()}
            told += [f"{key}: no {family} among its instructions" for family in sorted(missing)]
    return told


@pytest.mark.slow
def test_every_kernel_stays_within_its_budget(tmp_path: Path) -> None:
    assert BUDGETS.exists(), f"no budgets are recorded for Triton {BUDGETS.stem}: {UPDATE}"
    budget = rows_of(BUDGETS.read_text(encoding="utf-8"))
    # what has changed is compiled, and of what has not one variant of every kernel
    anew = {next(key for key in budget if key[1:] == (kernel, "90")) for _, kernel, _ in budget}
    with path_of(tmp_path).open("w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        sources = {budget[key]["source"] for key in anew}
        writer.writerows(row for row in budget.values() if row["source"] not in sources)
    python("-m", "cladapt_kernels.aot", str(tmp_path))
    found = rows_of(path_of(tmp_path).read_text(encoding="utf-8"))
    assert problems(found, budget) == []
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    launched = {*re.findall(r"\b(\w+)\[\(", sources)} & {*re.findall(r"@triton\.jit.*\ndef (\w+)", sources)}
    assert {kernel for _, kernel, _ in found} == launched  # none is without a variant


def test_every_triton_of_the_matrix_has_budgets_the_oldest_and_the_constrained_one_among_them() -> None:
    (line,) = re.findall(r"^TRITONS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split() == sorted(line.split(), key=lambda version: [int(part) for part in version.split(".")])
    assert {path.stem for path in BUDGETS.parent.iterdir()} == {*line.split()}
    (lowest,) = re.findall(r'"triton>=([0-9.]+);', (ROOT / "pyproject.toml").read_text())
    assert line.startswith(f"{lowest}.")
    (constrained,) = re.findall(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert constrained in line.split()


def test_the_check_tells_of_spills_and_of_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(PROBLEMS)  # triton reads a kernel's source from its file
    spills, _, instructions = python(str(tmp_path / "greedy.py")).partition(" ")
    assert int(spills) > 0
    row = {"sm": "90", "registers": "99", "shared": "300000", "spills": spills, "expects": "wgmma"}
    row |= {"instructions": instructions.strip(), "forbids": "wgmma"}
    told = problems({("v", "k", "90"): row}, {("v", "k", "90"): {**row, "registers": "98"}})
    assert [text.split(": ")[1] for text in told] == [
        f"{spills} bytes spill",
        "300000 bytes of shared memory",
        "registers 99, budget 98",
        "no wgmma among its instructions",
    ]
    sound = {**row, "shared": "0", "spills": "0", "expects": ""}
    assert problems({("v", "k", "90"): sound}, {}) == [f"('v', 'k', '90'): not in {BUDGETS.name}: {UPDATE}"]
    for sm in ("80", "90", "100"):
        rounding = {**sound, "sm": sm, "instructions": "cp.async wgmma"}
        assert problems({("v", "k", sm): rounding}, {("v", "k", sm): rounding}) == [f"('v', 'k', '{sm}'): wgmma"]
