"""Which test files of the entries are red: an op is not timed while its tests are."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from cladapt_kernels.timing import Entry


def red(entries: Iterable[Entry], root: Path) -> tuple[str, ...]:
    """Those of the entries' test files that fail at this commit; quick tests alone are run."""
    files = dict.fromkeys(file for entry in entries for file in entry.tests)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "not slow"]
    return tuple(
        file
        for file in files
        if subprocess.run([*command, file], cwd=root, capture_output=True, check=False).returncode
    )


def red_by_report(entries: Iterable[Entry], report: Path) -> tuple[str, ...]:
    """Those of the entries' test files of which the JUnit report of pytest has a failure, an error or no test at all.

    A report that pytest wrote when it was interrupted counts for what it holds.
    """
    counts: dict[str, int] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        # a file that cannot be collected has its module for a name
        module = case.get("classname") or case.get("name") or ""
        counts.setdefault(module, 0)
        counts[module] += sum(case.find(kind) is not None for kind in ("failure", "error"))
    files = dict.fromkeys(file for entry in entries for file in entry.tests)
    return tuple(file for file in files if counts.get(file.removesuffix(".py").replace("/", "."), 1))
