"""Small errors that `mutants` puts into a kernel: generated from its syntax tree, or made by hand."""

import ast
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

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
        "later tiles of a strip without the low-rank term", "lora/gemm.py",
        "BLOCK_R, DROP_Y\n        )\n        total = _product(",
        "BLOCK_R, DROP_Y\n        ) * 0.0\n        total = _product(",
    ),
    Named(
        "later tiles of a strip skipped", "lora/gemm.py",
        "range(strip + strips, tl.cdiv(n, BLOCK_N), strips)", "range(strip + strips, 0, strips)",
    ),
    Named("a wide tile of 96 rows", "lora/gemm.py", 'WIDE = {"BLOCK_M": 128', 'WIDE = {"BLOCK_M": 96'),
    Named(
        "products in TF32", "lora/gemm.py",
        'total = tl.dot(left, right, total, input_precision="ieee")\n    return',
        'total = tl.dot(left, right, total, input_precision="tf32")\n    return',
    ),
    Named(
        "the last block of a product left out", "lora/gemm.py",
        '"""total + X W of one tile."""\n    for inner in range(0, k, BLOCK_K)',
        '"""total + X W of one tile."""\n    for inner in range(0, k - BLOCK_K, BLOCK_K)',
    ),
    Named(
        "a mask of another width", "lora/shrink.py", "row, column, k, threshold, BLOCK_M",
        "row, column, k + 4, threshold, BLOCK_M",
    ),
    Named(
        "dB without its scale", "lora/skinny.py",
        "total *= tl.full((), scale, tl.float32)\n        store_tile", "store_tile",
    ),
    Named("a fold without the last chunk", "lora/skinny.py", "for _ in range(chunks):", "for _ in range(chunks - 1):"),
    Named(
        "chunks that end late", "lora/skinny.py",
        "last = min(first + chunk_rows, m)\n    workspace", "last = first + chunk_rows\n    workspace",
    ),
    Named("sums for sums of squares", "lora/by_item.py", "strip, tl.sum(total * total)", "strip, tl.sum(total)"),
    Named(
        "an item's last run alone", "lora/by_item.py",
        "total = _plus_rows(\n            narrow, wide, total, seed",
        "total = _plus_rows(\n            narrow, wide, total * 0.0, seed",
    ),
    Named(
        "the runs of the item before", "lora/by_item.py",
        "tl.load(offsets + item), tl.load(offsets + item + 1)", "tl.load(offsets + item - 1), tl.load(offsets + item)",
    ),
    Named(
        "G_B by item without its scale", "lora/by_item.py",
        "total *= tl.full((), scale, tl.float32)\n        store_tile", "store_tile",
    ),
    Named(
        "a perturbation added to the factor in 16 bits", "lora/by_item.py",
        "moved = tl.dot(wide, step, moved",
        "moved = tl.dot(wide, down + (tl.load(kappa + item) * step).to(wide.dtype), moved",
    ),
    Named(
        "the whole term as strong as its perturbation", "lora/by_item.py",
        "total = tl.dot(low, up, total, input_precision=\"ieee\") *",
        "total = tl.load(kappa + item) * tl.dot(low, up, total, input_precision=\"ieee\") *",
    ),
    Named(
        "tiles of another height than the kernel's", "lora/by_item.py",
        "dtype=x.dtype, device=x.device), table(tile[\"BLOCK_M\"])",
        "dtype=x.dtype, device=x.device), table(2 * tile[\"BLOCK_M\"])",
    ),
    Named(
        "a fold from the second chunk", "optim/adamw.py",
        "h = tl.max(peak)\n    for start in range(first, last, FOLD)",
        "h = tl.max(peak)\n    for start in range(first + 1, last, FOLD)",
    ),
    Named(
        "a step that reads the buffer it writes", "optim/adamw.py",
        "n_groups, 1 - turn, KIND, FOLD)\n        grad", "n_groups, turn, KIND, FOLD)\n        grad",
    ),
    Named(
        "a bias correction one step late", "optim/adamw.py", "(1.0 - tl.exp(count.to(tl.float64) * log_beta1))",
        "(1.0 - tl.exp((count.to(tl.float64) + 1.0) * log_beta1))",
    ),
    Named("nothing clipped", "optim/adamw.py", "grad *= tl.load(clip)", "pass"),
    Named("a sign of the series", "optim/adamw.py", "0.5 + d * (1.0 / 6.0 + d", "0.5 + d * (1.0 / 6.0 - d"),
    Named(
        "alignment of parameters never checked", "optim/fused_step.py",
        "all(address % 16 == 0 for address in found[name])", "True",
    ),
    Named(
        "a stale table of addresses", "optim/fused_step.py",
        "if row != self._rows.get(name)", "if name not in self._rows",
    ),
    Named(
        "products by way of memory without barriers", "factors.py",
        "tl.debug_barrier()\n        found = tl.zeros((RANK, RANK), tl.float32)\n",
        "found = tl.zeros((RANK, RANK), tl.float32)\n",
    ),
    Named(
        "memory written again before all have read it", "factors.py",
        "        tl.debug_barrier()\n    return found", "    return found",
    ),
    Named(
        "products by way of memory that read ahead", "retract/kernels.py",
        '{"num_warps": 8, "num_stages": 1},\n', '{"num_warps": 8},\n',
    ),
    Named(
        "alignment of factors never checked", "factors.py",
        "aligned = all(a % 16 == 0 for a in rows[::3]) and all(stride % 4 == 0 for stride in rows[1::3])",
        "aligned = True",
    ),
    Named(
        "rows of C beyond k", "retract/kernels.py",
        "size, count, k - column, RANK, RANK)", "size, count, RANK, RANK, RANK)",
    ),
    Named(
        "the sign of C^T C", "retract/kernels.py", "excess -= tl.dot(tl.trans(c), c", "excess += tl.dot(tl.trans(c), c"
    ),
    Named(
        "rows beyond the factor", "retract/kernels.py",
        "last = tl.minimum(first + CHUNK_ROWS, n)\n    part =", "last = first + CHUNK_ROWS\n    part =",
    ),
    Named("the sign of Newton's correction", "retract/kernels.py", "return e - 0.5 * (rest", "return e + 0.5 * (rest"),
    Named(
        "a step of C without the multiplier", "retract/kernels.py",
        "d = at + multiplier * (d - at)", "d = at + (d - at)",
    ),
    Named(
        "rectified products that read ahead by way of memory", "rectify/kernels.py",
        '{"num_warps": 8, "num_stages": 1},\n        {"ROWS": 16,', '{"num_warps": 8},\n        {"ROWS": 16,',
    ),
    Named(
        "the ridge of B for A", "rectify/kernels.py",
        "ridge = _ridge(gram, eye, damping, r)\n        factor", "factor",
    ),
    Named(
        "pivots below the ridge", "rectify/kernels.py",
        "eye, eye, r, ridge, RANK)\n    s =", "eye, eye, r, 0.0, RANK)\n    s =",
    ),
    Named("steps that are not multiplied", "rectify/kernels.py", 'STEPS=self._form != "invariant"', "STEPS=False"),
    Named("dA A^T for its transpose", "rectify/kernels.py", "gram_b, inner_a.mT,", "gram_b, inner_a,"),
    Named("one rank for all that is solved outside", "rectify/kernels.py", "setdefault(b.shape[1]", "setdefault(5"),
    Named(
        "columns of V beyond what a module has", "rectify/kernels.py",
        "c, row, 0, k, RANK, RANK, 1", "c, row, 0, row + BLOCK_K, RANK, RANK, 1",
    ),
)  # fmt: skip
