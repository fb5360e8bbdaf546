"""The tool that makes mutants of the kernels: what it changes, what it leaves, what it tells of their tests."""

import ast
import csv
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOY = '''"""A module."""
import triton
import triton.language as tl

LIMIT = 3


@triton.jit
def add(x, y, n, SIZE: tl.constexpr, TWICE: tl.constexpr):
    """Adds 1."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.load(x + i, mask=i < n, other=0.0)
    if not TWICE:
        total += 1.0
    tl.store(y + i, total, mask=i < n)


@triton.jit(do_not_specialize=["n"])
def half(x, n):
    return x / n


def launcher(x):
    return x + LIMIT
'''


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", Path(__file__).with_name("mutants.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        spec.loader.exec_module(module)
    return module


def by_hand(*given: str) -> Any:
    return sys.modules["mutations"].Named(*given)


def lines_of(tool: ModuleType) -> dict[str, str]:
    """The line that each mutant changes, by its change."""
    source = TOY.encode()
    return {
        f"{m.before} => {m.after}": m.applied(source).decode().splitlines()[m.line - 1].strip()
        for m in tool.generated("toy.py", source)
    }


def test_every_mutant_is_valid_python_that_differs_in_one_place_of_a_kernel(tool: ModuleType) -> None:
    source = TOY.encode()
    mutants = tool.generated("toy.py", source)
    assert mutants == tool.generated("toy.py", source)
    whole = ast.dump(ast.parse(source))
    texts = set()
    for mutant in mutants:
        changed = mutant.applied(source)
        assert ast.dump(ast.parse(changed)) != whole
        pairs = [(a, b) for a, b in zip(source.splitlines(), changed.splitlines(), strict=True) if a != b]
        assert len(pairs) == 1
        assert mutant.function in ("add", "half")
        texts.add(changed)
    assert len(texts) == len(mutants)
    assert source == TOY.encode()
    assert len({mutant.key for mutant in mutants}) == len(mutants)


def test_mutants_are_of_each_kind(tool: ModuleType) -> None:
    found = lines_of(tool)
    for change, line in {
        "tl.program_id(0) * SIZE => (tl.program_id(0) + SIZE)": "i = (tl.program_id(0) + SIZE) + tl.arange(0, SIZE)",
        "0 => 1": "i = tl.program_id(1) * SIZE + tl.arange(0, SIZE)",
        "i < n => (i <= n)": "tl.store(y + i, total, mask=(i <= n))",
        "tl.load(x + i, mask=i < n, other=0.0) => tl.load(x + i)": "total = tl.load(x + i)",
        "0.0 => 1.0": "total = tl.load(x + i, mask=i < n, other=1.0)",
        "not TWICE => TWICE": "if TWICE:",
        "total += 1.0 => pass": "pass",
        "total += 1.0 => total = 1.0": "total = 1.0",
        "total += 1.0 => total -= 1.0": "total -= 1.0",
        "1.0 => 2.0": "total += 2.0",
        "tl.store(y + i, total, mask=i < n) => tl.store(y + i, total)": "tl.store(y + i, total)",
        "tl.store(y + i, total, mask=i < n) => pass": "pass",
        "x / n => (x * n)": "return (x * n)",
    }.items():
        assert found[change] == line
    mutations = sys.modules["mutations"]
    calls = [ast.parse("f(row, column, k, BLOCK, 3)").body[0].value, ast.parse("tl.dot(a, b, total)").body[0].value]
    made = [[ast.unparse(changed) for changed in mutations._changed(call)] for call in calls]
    assert made[0] == ["f(column, row, k, BLOCK, 3)", "f(row, k, column, BLOCK, 3)"]
    assert made[1] == ["tl.dot(a, b)", "tl.dot(b, a, total)", "tl.dot(a, total, b)"]


def test_a_sample_is_of_every_function_and_the_same_for_the_same_seed(tool: ModuleType) -> None:
    mutants = tool.generated("toy.py", TOY.encode())
    drawn = tool.sample(mutants, 3, 0)
    assert drawn == tool.sample(mutants, 3, 0)
    assert [m.function for m in drawn] == ["add"] * 3 + ["half"] * len([m for m in mutants if m.function == "half"])
    assert any(tool.sample(mutants, 3, seed) != drawn for seed in range(1, 5))
    assert drawn == [m for m in mutants if m in drawn]  # in the order of the source


def test_a_change_by_hand_that_no_longer_fits_is_an_error(tool: ModuleType) -> None:
    sources = {"toy.py": TOY.encode()}
    (mutant,) = tool.named([by_hand("no limit", "toy.py", "x + LIMIT", "x")], sources)
    assert mutant.applied(sources["toy.py"]).decode() == TOY.replace("x + LIMIT", "x")
    for text, count in (("x + BOUND", 0), ("@triton.jit", 2)):
        with pytest.raises(ValueError, match=f"mutant 'no limit': toy.py has {count} times .*, expected once"):
            tool.named([by_hand("no limit", "toy.py", text, "x")], sources)


def test_an_equivalent_mutant_has_a_reason(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "equivalent.csv"
    head = "file,function,before,after,place,reason\n"
    path.write_text(head + 'toy.py,add,i < n,(i <= n),1,"x has one more"\n')
    assert tool.reasons(path) == {("toy.py", "add", "i < n", "(i <= n)", "1"): "x has one more"}
    path.write_text(head + "toy.py,add,i < n,(i <= n),1,\n")
    with pytest.raises(ValueError, match=r"equivalent.csv, line 2: add has no reason"):
        tool.reasons(path)


def test_what_is_listed_as_equivalent_is_a_mutant_of_the_sources_as_they_are(tool: ModuleType) -> None:
    sources = tool.sources_of(ROOT)
    keys = {mutant.key for file, source in sources.items() for mutant in tool.generated(file, source)}
    keys |= {mutant.key for mutant in tool.named(tool.NAMED, sources)}
    assert tool.reasons(tool.EQUIVALENT).keys() - keys == set()
    kernels = {name for name, source in sources.items() if b"@triton.jit" in source}
    assert {str(Path(name).parent) for name in kernels} == tool.TESTS.keys()  # none is without tests
    for tests in {test for file in kernels for test in tool.tests_of(file)}:
        assert (ROOT / tests).is_file()


@pytest.fixture
def checkout(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one file that plain Python runs, and its tests."""
    root, package = tmp_path / "checkout", Path("kernels/cladapt_kernels")
    texts = {
        package / "__init__.py": "",
        package / "toy.py": (
            "import triton\nimport triton.language as tl\n\nLIMIT = 2\n\n\n"
            "@triton.jit\ndef twice(found, n, spare):\n    tl.store(found, n * 2 + spare // 1)\n"
        ),
        Path("tests/conftest.py"): "",
        Path("tests/kernels/conftest.py"): "",
        Path("tests/kernels/test_toy.py"): (
            "import torch\nfrom cladapt_kernels.toy import twice\n\n\n"
            "def found(n):\n    at = torch.zeros(1, dtype=torch.int32)\n    twice[(1,)](at, n, 0)\n"
            "    return at.item()\n\n\n"
            "def test_many():\n    assert [found(i) for i in range(3, 40)] == [*range(6, 80, 2)]\n\n\n"
            "def test_one():\n    assert found(3) == 6\n"
        ),
        Path("pyproject.toml"): "[tool.pytest.ini_options]\nmarkers = ['slow']\n",
    }
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (tmp_path / "equivalent.csv").write_text("file,function,before,after,place,reason\n")
    for name, value in (
        ("ROOT", root), ("TESTS", {".": ("toy",)}), ("EQUIVALENT", tmp_path / "equivalent.csv"),
        ("NAMED", (by_hand("never ends", "toy.py", "LIMIT = 2", "while True:\n    pass"),
                   by_hand("no module", "toy.py", "import triton\n", "import tritn\n"))),
    ):  # fmt: skip
        monkeypatch.setattr(tool, name, value)
    return root


def outcome(tool: ModuleType, checkout: Path, *given: str) -> tuple[int, dict[str, Mapping[str, Any]]]:
    """In a process of its own: this one has imported the kernels."""
    out = checkout.parent / "build" / "mutants.csv"
    script = f"""
import importlib.util, sys, pathlib
spec = importlib.util.spec_from_file_location("mutants", {tool.__file__!r})
tool = importlib.util.module_from_spec(spec)
sys.modules["mutants"] = tool
sys.path.insert(0, {str(Path(str(tool.__file__)).parent)!r})
spec.loader.exec_module(tool)
tool.ROOT, tool.TESTS = pathlib.Path({str(checkout)!r}), {{".": ("toy",)}}
tool.EQUIVALENT = pathlib.Path({str(tool.EQUIVALENT)!r})
import mutations
tool.NAMED = tuple(mutations.Named(*given) for given in {[tuple(vars(n).values()) for n in tool.NAMED]!r})
tool.SPARE_SECONDS = 1
sys.exit(tool.main([*{list(given)!r}, "--jobs", "1", "--out", {str(out)!r}]))
"""
    import subprocess

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return done.returncode, {f"{row['function']}: {row['before']} => {row['after']}": row for row in rows}


def test_killed_stopped_survived_and_equivalent(tool: ModuleType, checkout: Path) -> None:
    before = {path: path.read_bytes() for path in checkout.rglob("*.py")}
    code, rows = outcome(tool, checkout, "--all")
    assert code == 1
    status = {row["function"]: row["status"] for row in rows.values() if row["function"] != "twice"}
    assert status == {"never ends": "stopped", "no module": "killed"}
    own = {change: row["status"] for change, row in rows.items() if row["function"] == "twice"}
    same = {"spare // 1 => (spare % 1)", "1 => 2", "n * 2 + spare // 1 => (n * 2 - spare // 1)"}  # since spare is 0
    assert {change for change, found in own.items() if found == "survived"} == {f"twice: {change}" for change in same}
    assert {*own.values()} == {"survived", "killed"}
    assert rows["twice: 2 => 3"]["killer"] == "tests/kernels/test_toy.py::test_one"  # the quick one
    tool.EQUIVALENT.write_text(
        "file,function,before,after,place,reason\n"
        + "".join(f"toy.py,twice,{change.replace(' => ', ',')},1,spare is 0\n" for change in same)
        + "toy.py,twice,2,3,1,a reason that does not hold\n"
    )
    code, rows = outcome(tool, checkout, "--check")
    assert code == 1
    status = {change: row["status"] for change, row in rows.items()}
    assert status == {f"twice: {change}": "equivalent" for change in same} | {"twice: 2 => 3": "killed"}
    assert {path: path.read_bytes() for path in checkout.rglob("*.py")} == before
