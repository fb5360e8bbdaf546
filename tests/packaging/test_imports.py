"""The shape of the sources: light start-up, one-way imports, small modules, no pickles, no shadowed packages."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cladapt", "kernels/cladapt_kernels", "cli/cladapt_cli")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
ALL_FILES = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "bench").rglob("*.py"))]
MOST_LINES = 500


def module_name(path: Path) -> str:
    """Dotted name of a source file, seen from its source root."""
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts[1:] if relative.parts[0] in ("kernels", "cli") else relative.parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter that finds modules where this one does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def lines_matching(pattern: str, files: list[Path]) -> list[str]:
    """`path:line` of every line that matches."""
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_module_imports(path: Path) -> None:
    importlib.import_module(module_name(path))


def test_command_line_starts_without_the_heavy_packages(tmp_path: Path) -> None:
    heavy = ("torch", "transformers", "peft", "accelerate", "polars", "scipy", "sklearn", "numpy")
    code = f"import sys, cladapt_cli.app; print(*[name for name in {heavy} if name in sys.modules])"
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_transformers_is_not_shadowed_by_the_source_roots(tmp_path: Path) -> None:
    code = (
        "from transformers import AutoModelForCausalLM; from transformers.utils import is_kernels_available as k; k()"
    )
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_import_layers_hold() -> None:
    pytest.importorskip("importlinter", reason="import-linter comes with the dev extra")
    code = "from importlinter.cli import lint_imports_command as run; run()"
    result = python("-c", code, "--no-cache", "--no-logo")
    assert result.returncode == 0, result.stdout + result.stderr


def test_sources_are_small_modules() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ALL_FILES}
    assert [f"{p.relative_to(ROOT)}: {n} lines" for p, n in lengths.items() if n > MOST_LINES] == []


def test_sources_roots_are_not_packages() -> None:
    roots = ("kernels", "cli", "tests", "bench")
    assert [root for root in roots if (ROOT / root / "__init__.py").exists()] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_sources_read_and_write_no_pickle() -> None:
    pickles = (
        r"^\s*(import|from)\s+(pickle|cloudpickle|dill|joblib|shelve)\b|\btorch\.(load|save)\(|allow_pickle|_pickle\("
    )
    assert lines_matching(pickles, [path for path in ALL_FILES if path != Path(__file__)]) == []


def test_sources_leave_no_open_ends() -> None:
    assert lines_matching(r"#\s*(?:TODO|FIXME|XXX|HACK)\b", ALL_FILES) == []
