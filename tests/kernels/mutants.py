"""Mutants of the kernels: small errors put into their sources one at a time, each of which some fast test must tell.

    python tests/kernels/mutants.py                     the named mutants and a seeded sample of every kernel
    python tests/kernels/mutants.py --all lora/gemm.py  all of one file
    python tests/kernels/mutants.py --check             those of `equivalent_mutants.csv`, which no test may kill

Generated are, from the syntax tree of each function under `triton.jit`: operators and comparisons exchanged, constants
changed, conditions negated, masks, accumulators and statements left out, neighbouring arguments and indices swapped.
`NAMED` are errors that a reviewer made by hand, in launchers too. A mutant is written into a copy of the sources and
the tests that run its function, quickest first, run there until one fails. The copy's processes are forked from this
one, which has imported torch and triton, never the kernels.

A row of the report is a mutant: killed by a test, stopped after a multiple of the time that the sources as they are
take, survived, or equivalent, which is a survivor listed in `equivalent_mutants.csv` with the reason why no test can
tell it. The exit status is 1 where one survived, or where the list has rows that nothing generates.
"""

import argparse
import csv
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mutations import NAMED, Mutant, generated, named, sample

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path("kernels/cladapt_kernels")
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.csv")
COPIED = (PACKAGE, Path("tests/kernels"), Path("tests/conftest.py"), Path("pyproject.toml"))
TESTS = {
    ".": ("branches", "branches_rectify", "branches_retract"),
    "lora": ("branches", "branches_items"),
    "optim": ("branches_adamw",),
    "rectify": ("branches_rectify",),
    "retract": ("branches_retract",),
}
"""The test files of a folder of kernels."""
SPARE_SECONDS = 20
"""What a mutant may take beyond four times what the tests take."""
STATUSES = ("killed", "stopped", "survived", "equivalent")
COLUMNS = ("status", "file", "function", "line", "before", "after", "place", "killer", "seconds")


def reasons(path: Path) -> dict[tuple[str, ...], str]:
    """Why no test can tell a mutant, by its key. `ValueError` where one has no reason."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        if not (row["reason"] or "").strip():
            raise ValueError(f"{path.name}, line {number}: {row['function']} has no reason, which every row needs")
    return {(row["file"], row["function"], row["before"], row["after"], row["place"]): row["reason"] for row in rows}


@dataclass
class Known:
    """What the sources as they are told: the seconds of every test, and the kernels that each one ran."""

    seconds: dict[str, float] = field(default_factory=dict)
    ran: dict[str, set[tuple[str, str]]] = field(default_factory=dict)

    def tests(self, mutant: Mutant, first: Sequence[str]) -> list[str]:
        """Names of the tests of a mutant: those that killed others of its function, then the quickest."""
        kernel, files = (mutant.file, mutant.function), tests_of(mutant.file)
        own = [
            test for test in self.seconds
            if (kernel in self.ran[test] if mutant.kernel else test.partition("::")[0] in files)
        ]  # fmt: skip
        return sorted(own, key=lambda test: (-first.count(test), self.seconds[test]))


def sources_of(root: Path) -> dict[str, bytes]:
    """The package's sources in a checkout, by their paths in the package."""
    package = root / PACKAGE
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in sorted(package.rglob("*.py"))}


def tests_of(file: str) -> list[str]:
    return [f"tests/kernels/test_{name}.py" for name in TESTS[str(Path(file).parent)]]


class Watch:
    """A plugin of pytest: the order of the tests, what each took and ran, the first that failed."""

    def __init__(self, order: Sequence[str] = ()) -> None:
        self.order = {name: i for i, name in enumerate(order)}
        self.told = Known()
        self.killer = ""
        self._running: set[tuple[str, str]] = set()

    def follow(self) -> None:
        """Keep in mind which kernels run."""
        from triton.runtime.interpreter import InterpretedFunction

        ordinary, package = InterpretedFunction.rewrite, Path.cwd() / PACKAGE

        def rewrite(function: Any) -> Any:
            file = Path(function.fn.__code__.co_filename)
            if file.is_relative_to(package):
                self._running.add((file.relative_to(package).as_posix(), function.fn.__name__))
            return ordinary(function)

        InterpretedFunction.rewrite = rewrite

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.order:
            items.sort(key=lambda item: self.order.get(item.nodeid, len(self.order)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running.clear()
        self._began = time.process_time()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.killer:
            self.killer = report.nodeid
        if report.when == "teardown":
            self.told.seconds[report.nodeid] = round(time.process_time() - self._began, 3)
            self.told.ran[report.nodeid] = {*self._running}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.killer:
            self.killer = report.nodeid

    def pytest_sessionfinish(self) -> None:
        ran = {name: sorted(kernels) for name, kernels in self.told.ran.items()}
        told = {"killer": self.killer, "seconds": self.told.seconds, "ran": ran}
        Path("watched.json").write_text(json.dumps(told), encoding="utf-8")


class Copies:
    """Copies of the sources, one for each process that runs tests at a time."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folders = [folder / "0"]
        self.sources = sources_of(root)
        for part in COPIED:
            (self.folders[0] / part).parent.mkdir(parents=True, exist_ok=True)
            if (root / part).is_dir():
                shutil.copytree(root / part, self.folders[0] / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(root / part, self.folders[0] / part)

    def add(self, count: int) -> None:
        """More copies of the first one, with the byte code that it has by now."""
        first = self.folders[0]
        for number in range(1, count):
            self.folders.append(first.with_name(str(number)))
            shutil.copytree(first, self.folders[-1])

    def digest(self, test: str) -> str:
        """Of all that decides what a file of tests tells of the sources as they are."""
        found = hashlib.sha256()
        for part in (
            *(PACKAGE / name for name in self.sources),
            "tests/conftest.py",
            "tests/kernels/conftest.py",
            test,
        ):
            found.update((self.folders[0] / part).read_bytes())
        return found.hexdigest()[:16]

    def write(self, folder: Path, mutant: Mutant | None) -> None:
        """The sources as they are, but for this mutant."""
        for name, source in self.sources.items():
            wanted = source if mutant is None or mutant.file != name else mutant.applied(source)
            path = folder / PACKAGE / name
            if path.read_bytes() != wanted:
                path.write_bytes(wanted)


def start(folder: Path, tests: Sequence[str], order: Sequence[str], seconds: float | None) -> int:
    """Run tests in a process of their own, and return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.chdir(folder)
        with suppress(FileNotFoundError):
            Path("watched.json").unlink()
        out = os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 10))
        code = _run(folder, tests, order, stop=seconds is not None)
    finally:
        os._exit(code)


def _run(folder: Path, tests: Sequence[str], order: Sequence[str], stop: bool) -> int:
    import pytest

    sys.dont_write_bytecode = stop  # two mutants of equal length within a second would be taken for one
    sys.path[:0] = [str(folder), str(folder / "kernels")]
    spec = find_spec("cladapt_kernels")
    if spec is None or not str(spec.origin).startswith(str(folder)):
        print(f"cladapt_kernels would be imported from {spec and spec.origin}")
        return 70
    watch = Watch(order)
    watch.follow()
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "--tb=line", f"--rootdir={folder}"]
    return int(pytest.main([*options, *(["-x"] if stop else []), *tests], plugins=[watch]))


def watched(folder: Path) -> dict[str, Any]:
    path = folder / "watched.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"killer": "", "seconds": {}, "ran": {}}


def baseline(copies: Copies, files: Iterable[str], cache: Path) -> Known:
    """What the sources as they are tell, kept in `cache`. `RuntimeError` where a test fails."""
    folder, known = copies.folders[0], Known()
    cache.mkdir(parents=True, exist_ok=True)
    for test in sorted({test for file in files for test in tests_of(file)}):
        path = cache / f"{Path(test).stem}-{copies.digest(test)}.json"
        if not path.is_file():
            _, status = os.waitpid(start(folder, [test], (), None), 0)
            if status:
                told = (folder / "output.txt").read_text(encoding="utf-8")[-3000:]
                raise RuntimeError(f"{test} fails without any mutant ({os.waitstatus_to_exitcode(status)}):\n{told}")
            path.write_text(json.dumps(watched(folder)), encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
        known.seconds |= found["seconds"]
        known.ran |= {name: {(a, b) for a, b in ran} for name, ran in found["ran"].items()}
    return known


def verdict(status: int, mutant: Mutant, folder: Path) -> tuple[str, str]:
    """The mutant's status and who killed it. `RuntimeError` where the tests could not be run."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return "stopped", "time"
    if code < 0:
        return "killed", signal.Signals(-code).name
    if code == 0:
        return "survived", ""
    if code in (1, 2, 4) and (killer := watched(folder)["killer"]):  # a test failed, or could not be imported
        return "killed", killer
    told = (folder / "output.txt").read_text(encoding="utf-8")[-3000:]
    raise RuntimeError(f"{mutant}: pytest ended with {code}:\n{told}")


def judged(copies: Copies, known: Known, mutants: Sequence[Mutant]) -> Iterator[dict[str, Any]]:
    """A row of the report for every mutant, as each is done."""
    waiting, idle = list(reversed(mutants)), list(copies.folders)
    running: dict[int, tuple[Mutant, Path]] = {}
    killers: dict[tuple[str, str], list[str]] = {}
    while waiting or running:
        while waiting and idle:
            mutant, folder = waiting.pop(), idle.pop()
            tests = known.tests(mutant, killers.get((mutant.file, mutant.function), ()))
            if not tests:
                idle.append(folder)
                yield _row(mutant, "survived", "no test runs it", 0.0)
                continue
            copies.write(folder, mutant)
            seconds = SPARE_SECONDS + 4 * sum(known.seconds[test] for test in tests)
            running[start(folder, tests, tests, seconds)] = mutant, folder
        if running:
            pid, status, usage = os.wait3(0)
            mutant, folder = running.pop(pid)
            found, killer = verdict(status, mutant, folder)
            killers.setdefault((mutant.file, mutant.function), []).append(killer)
            idle.append(folder)
            yield _row(mutant, found, killer, usage.ru_utime + usage.ru_stime)


def _row(mutant: Mutant, status: str, killer: str, seconds: float) -> dict[str, Any]:
    row = {name: getattr(mutant, name, "") for name in COLUMNS}
    return row | {"status": status, "killer": killer, "seconds": round(seconds, 1)}


def shown(mutant: Mapping[str, Any]) -> str:
    """A change as lines of a diff."""
    where = f"{mutant['file']}:{mutant['line']} {mutant['function']}"
    return f"{where}\n    - {mutant['before']}\n    + {mutant['after']}"


def main(given: Sequence[str] | None = None) -> int:
    """Run the mutants that are asked for; the number of those that survived decides the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help=f"of {PACKAGE}, all if none is given")
    parser.add_argument("--all", action="store_true", help="all generated mutants, not a sample")
    parser.add_argument("--sample", type=int, default=4, help="mutants of each kernel (4); 0: the named ones alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--function", action="append", help="only of this kernel, or named so; may be repeated")
    parser.add_argument("--check", action="store_true", help="run those listed as equivalent, and no others")
    parser.add_argument("--list", action="store_true", help="print the mutants, run none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants.csv")
    asked = parser.parse_args(given)

    sources = sources_of(ROOT)
    by_hand = named(NAMED, sources)
    mutants = by_hand + [mutant for file, source in sources.items() for mutant in generated(file, source)]
    known_files = sorted({mutant.file for mutant in mutants})
    files = asked.files or known_files
    if unknown := sorted({*files} - {*known_files}):
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(known_files)}")
    listed = reasons(EQUIVALENT)
    if stale := listed.keys() - {mutant.key for mutant in mutants}:
        for key in sorted(stale):
            print(f"{EQUIVALENT.name} lists what is no mutant any longer: {', '.join(key)}", file=sys.stderr)
        return 1
    mutants = [mutant for mutant in mutants if mutant.file in files]
    if asked.function:
        mutants = [mutant for mutant in mutants if mutant.function in asked.function]
    mutants = [mutant for mutant in mutants if (mutant.key in listed) == asked.check]
    if not (asked.all or asked.check):
        drawn = {*sample([mutant for mutant in mutants if mutant.kernel], asked.sample, asked.seed)}
        mutants = [mutant for mutant in mutants if not mutant.kernel or mutant in drawn]
    if asked.list:
        print("\n".join(shown(vars(mutant)) for mutant in mutants))
        return 0

    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for module in ("torch._dynamo", "torch.testing", "triton.runtime.interpreter"):
        import_module(module)  # what is imported here, the forked processes need not

    counts = dict.fromkeys(STATUSES, 0)
    survivors = []
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, asked.out.open("w", newline="", encoding="utf-8") as file:
        copies = Copies(ROOT, Path(folder))
        known = baseline(copies, {mutant.file for mutant in mutants}, asked.out.parent / "mutants")
        copies.add(asked.jobs)
        print(
            f"{len(mutants)} mutants; {len(known.seconds)} tests take {sum(known.seconds.values()):.0f} s", flush=True
        )
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in judged(copies, known, mutants):
            if asked.check and row["status"] == "survived":
                row["status"] = "equivalent"
            counts[row["status"]] += 1
            writer.writerow(row)
            file.flush()
            if (row["status"] == "survived") or (asked.check and row["status"] != "equivalent"):
                survivors.append(row)
                print(f"{row['status']} {shown(row)}", flush=True)
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"({asked.out})")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
