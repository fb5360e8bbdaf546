"""Mutants of the kernels: small errors put into their sources one at a time, each of which some fast test must tell.

    python tests/kernels/mutants.py                     the named mutants and a seeded sample of every kernel
    python tests/kernels/mutants.py --all gemm.py       all of one file
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
import ast
import csv
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path("kernels/cladapt_kernels")
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.csv")
COPIED = (PACKAGE, Path("tests/kernels"), Path("tests/conftest.py"), Path("pyproject.toml"))
TESTS = {
    "tiles.py": ("branches",),
    "gemm.py": ("branches",),
    "shrink.py": ("branches",),
    "mask.py": ("branches",),
    "skinny.py": ("branches",),
    "adamw.py": ("branches_adamw",),
    "fused_step.py": ("branches_adamw",),
    "retract_triton.py": ("branches_retract",),
}
"""The test files of a file of kernels."""
SPARE_SECONDS = 20
"""What a mutant may take beyond four times what the tests take."""
STATUSES = ("killed", "stopped", "survived", "equivalent")
COLUMNS = ("status", "file", "function", "line", "before", "after", "place", "killer", "seconds")
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.RShift: ast.LShift,
}  # fmt: skip
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip
RENAMED = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
TEXTS = {"ieee": "tf32"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file: `before`, at bytes `start` to `end`, becomes `after`."""

    file: str
    function: str
    """Of the kernel, or the name of a change by hand."""
    line: int
    start: int
    end: int
    before: str
    after: str
    place: int = 1
    """Which of the equal changes of this function it is."""
    kernel: bool = True
    """Whether `function` is a kernel, whose tests are known by what they run."""

    @property
    def key(self) -> tuple[str, ...]:
        return self.file, self.function, self.before, self.after, str(self.place)

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.after.encode() + source[self.end :]


@dataclass(frozen=True)
class Named:
    """A change by hand; `before` is found once in its file."""

    name: str
    file: str
    before: str
    after: str


def named(changes: Iterable[Named], sources: Mapping[str, bytes]) -> list[Mutant]:
    """`ValueError` where a change no longer fits its file."""
    made = []
    for change in changes:
        source, before = sources[change.file], change.before.encode()
        if source.count(before) != 1:
            raise ValueError(
                f"mutant {change.name!r}: {change.file} has {source.count(before)} times {change.before!r}, expected"
                " once: write it anew for the source as it is"
            )
        start = source.index(before)
        line = source.count(b"\n", 0, start) + 1
        end = start + len(before)
        made.append(Mutant(change.file, change.name, line, start, end, change.before, change.after, kernel=False))
    return made


def generated(file: str, source: bytes) -> list[Mutant]:
    """All mutants of the kernels of a file, in the order of the source; each is valid Python."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    made: list[Mutant] = []
    counts: dict[tuple[str, ...], int] = {}
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or not any(map(_is_jit, function.decorator_list)):
            continue
        for node, after in _changes(function.body):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[operator]  # set by parse
            before = ast.unparse(node)
            key = (function.name, before, after)
            counts[key] = counts.get(key, 0) + 1
            made.append(Mutant(file, function.name, node.lineno, start, end, before, after, counts[key]))
    return made


def _is_jit(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called) == "triton.jit"


def _changes(body: Sequence[ast.stmt]) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """What may be replaced, and by what."""
    for statement in body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        for node in _walk(statement):
            for changed in _changed(node):
                text = ast.unparse(changed)
                compound = isinstance(changed, ast.BinOp | ast.Compare | ast.UnaryOp)
                yield node, f"({text})" if compound else text


def _walk(node: ast.AST) -> Iterator[Any]:
    """Nodes in the order of the source, without annotations and the ends of ranges of indices."""
    yield node
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.arange":
        return
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.AnnAssign) and child is node.annotation):
            yield from _walk(child)


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.BinOp(op=operator) if type(operator) in ARITHMETIC:
            yield _with(node, op=ARITHMETIC[type(operator)]())
        case ast.Compare(ops=[operator]) if type(operator) in COMPARISONS:
            yield _with(node, ops=[COMPARISONS[type(operator)]()])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.Constant(value=str(value)) if value in TEXTS:
            yield ast.Constant(TEXTS[value])
        case ast.Attribute(attr="int64"):
            yield _with(node, attr="int32")
        case ast.Subscript(slice=ast.Tuple(elts=[first, second])):
            yield _with(node, slice=ast.Tuple([second, first], ast.Load()))
        case ast.AugAssign(op=operator):
            yield ast.Pass()
            yield ast.Assign([node.target], node.value, lineno=node.lineno)
            yield _with(node, op=ARITHMETIC[type(operator)]())
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.IfExp(body=first, orelse=second):
            yield _with(node, body=second, orelse=first)
        case ast.Name(id=name) if name in RENAMED:
            yield ast.Name(RENAMED[name])
        case ast.Call():
            yield from _changed_call(node)
    if isinstance(node, ast.Attribute) and node.attr in RENAMED:
        yield _with(node, attr=RENAMED[node.attr])


def _changed_call(node: ast.Call) -> Iterator[ast.AST]:
    name, args = ast.unparse(node.func), node.args
    for keyword in node.keywords:
        if keyword.arg == "mask":
            left = [k for k in node.keywords if k.arg not in ("mask", "other")]  # without a mask there is no other
            yield _with(node, keywords=left)
    match name:
        case "tl.where":
            yield args[1]
            yield _with(node, args=[args[0], args[2], args[1]])
        case "tl.trans" | "tl.abs" | "tl.sqrt" | "tl.sqrt_rn" | "tl.floor":
            yield args[0]
        case "tl.dot" if len(args) == 3:
            yield _with(node, args=args[:2])
        case "range" if len(args) == 3:
            yield _with(node, args=[args[0], ast.BinOp(args[1], ast.Sub(), args[2]), args[2]])
            yield _with(node, args=[ast.BinOp(args[0], ast.Add(), args[2]), *args[1:]])
    for i, (first, second) in enumerate(pairwise(args)):
        if _is_value(first) and _is_value(second) and ast.unparse(first) != ast.unparse(second):
            yield _with(node, args=[*args[:i], second, first, *args[i + 2 :]])


def _is_value(node: ast.expr) -> bool:
    """A name or a number; what is in capitals is a size of a tile."""
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id.islower())


def _with(node: Any, **changes: Any) -> Any:
    made = copy(node)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def sample(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """At most `count` of each function, in the order given; the same for the same seed."""
    by_function: dict[tuple[str, str], list[Mutant]] = {}
    for mutant in mutants:
        by_function.setdefault((mutant.file, mutant.function), []).append(mutant)
    chosen = set()
    for (file, function), own in by_function.items():
        drawn = random.Random(f"{seed} {file} {function}").sample(range(len(own)), min(count, len(own)))
        chosen |= {own[i] for i in drawn}
    return [mutant for mutant in mutants if mutant in chosen]


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


def tests_of(file: str) -> list[str]:
    return [f"tests/kernels/test_{name}.py" for name in TESTS[file]]


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

        ordinary = InterpretedFunction.rewrite

        def rewrite(function: Any) -> Any:
            self._running.add((Path(function.fn.__code__.co_filename).name, function.fn.__name__))
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
        self.sources = {path.name: path.read_bytes() for path in sorted((root / PACKAGE).glob("*.py"))}
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

    files = asked.files or list(TESTS)
    if unknown := sorted({*files} - {*TESTS}):
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(TESTS)}")
    listed = reasons(EQUIVALENT)
    sources = {path.name: path.read_bytes() for path in (ROOT / PACKAGE).glob("*.py")}
    by_hand = named(NAMED, sources)
    mutants = by_hand + [mutant for file in TESTS for mutant in generated(file, sources[file])]
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


NAMED = (
    Named("the last group's height ignored", "tiles.py", "height = min(m_tiles - first, GROUP)", "height = GROUP"),
    Named(
        "groups that overlap", "tiles.py", "first = (program // per_group) * GROUP", "first = program // per_group"
    ),
    Named("a start of 32 bits", "tiles.py", "tl.full((), row, tl.int64) * row_stride", "row * row_stride"),
    Named(
        "a row beyond the matrix", "tiles.py", "(tl.arange(0, ROWS) < rows - row)", "(tl.arange(0, ROWS) <= rows - row)"
    ),
    Named(
        "later tiles of a strip without the low-rank term", "gemm.py",
        "BLOCK_R, DROP_Y\n        )\n        total = _product(",
        "BLOCK_R, DROP_Y\n        ) * 0.0\n        total = _product(",
    ),
    Named(
        "later tiles of a strip skipped", "gemm.py",
        "range(strip + strips, tl.cdiv(n, BLOCK_N), strips)", "range(strip + strips, 0, strips)",
    ),
    Named("a wide tile of 96 rows", "gemm.py", 'WIDE = {"BLOCK_M": 128', 'WIDE = {"BLOCK_M": 96'),
    Named(
        "products in TF32", "gemm.py",
        'total = tl.dot(left, right, total, input_precision="ieee")\n    return',
        'total = tl.dot(left, right, total, input_precision="tf32")\n    return',
    ),
    Named(
        "the last block of a product left out", "gemm.py",
        '"""total + X W of one tile."""\n    for inner in range(0, k, BLOCK_K)',
        '"""total + X W of one tile."""\n    for inner in range(0, k - BLOCK_K, BLOCK_K)',
    ),
    Named(
        "a mask of another width", "shrink.py", "row, column, k, threshold, BLOCK_M",
        "row, column, k + 4, threshold, BLOCK_M",
    ),
    Named(
        "dB without its scale", "skinny.py",
        "total *= tl.full((), scale, tl.float32)\n        store_tile", "store_tile",
    ),
    Named("a fold without the last chunk", "skinny.py", "for _ in range(chunks):", "for _ in range(chunks - 1):"),
    Named(
        "chunks that end late", "skinny.py",
        "last = min(first + chunk_rows, m)\n    workspace", "last = first + chunk_rows\n    workspace",
    ),
    Named("sums for sums of squares", "skinny.py", "strip, tl.sum(total * total)", "strip, tl.sum(total)"),
    Named(
        "a fold from the second chunk", "adamw.py",
        "h = tl.max(peak)\n    for start in range(first, last, FOLD)",
        "h = tl.max(peak)\n    for start in range(first + 1, last, FOLD)",
    ),
    Named(
        "a step that reads the buffer it writes", "adamw.py",
        "n_groups, 1 - turn, KIND, FOLD)\n        grad", "n_groups, turn, KIND, FOLD)\n        grad",
    ),
    Named(
        "a bias correction one step late", "adamw.py", "(1.0 - tl.exp(count.to(tl.float64) * log_beta1))",
        "(1.0 - tl.exp((count.to(tl.float64) + 1.0) * log_beta1))",
    ),
    Named("nothing clipped", "adamw.py", "grad *= tl.load(clip)", "pass"),
    Named("a sign of the series", "adamw.py", "0.5 + d * (1.0 / 6.0 + d", "0.5 + d * (1.0 / 6.0 - d"),
    Named(
        "alignment of parameters never checked", "fused_step.py",
        "aligned = self._vector and all(address % 16 == 0 for row in rows for address in row)", "aligned = True",
    ),
    Named(
        "a stale table of addresses", "fused_step.py",
        "if use not in self._tables or self._tables[use][0] != rows:", "if use not in self._tables:",
    ),
    Named(
        "products by way of memory without barriers", "retract_triton.py",
        "tl.debug_barrier()\n        found = tl.zeros((RANK, RANK), tl.float32)\n",
        "found = tl.zeros((RANK, RANK), tl.float32)\n",
    ),
    Named(
        "memory written again before all have read it", "retract_triton.py",
        "        tl.debug_barrier()\n    return found", "    return found",
    ),
    Named(
        "products by way of memory that read ahead", "retract_triton.py",
        '{"num_warps": 8, "num_stages": 1},\n', '{"num_warps": 8},\n',
    ),
    Named(
        "alignment of factors never checked", "retract_triton.py",
        "aligned = all(a % 16 == 0 for a in rows[::3]) and all(stride % 4 == 0 for stride in rows[1::3])",
        "aligned = True",
    ),
    Named(
        "rows of C beyond k", "retract_triton.py",
        "size, count, k - column, RANK, RANK)", "size, count, RANK, RANK, RANK)",
    ),
    Named(
        "the sign of C^T C", "retract_triton.py", "excess -= tl.dot(tl.trans(c), c", "excess += tl.dot(tl.trans(c), c"
    ),
    Named(
        "rows beyond the factor", "retract_triton.py",
        "last = tl.minimum(first + CHUNK_ROWS, n)\n    part =", "last = first + CHUNK_ROWS\n    part =",
    ),
    Named("the sign of Newton's correction", "retract_triton.py", "return e - 0.5 * (rest", "return e + 0.5 * (rest"),
    Named(
        "a step of C without the multiplier", "retract_triton.py", "d = at + multiplier * (d - at)", "d = at + (d - at)"
    ),
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
