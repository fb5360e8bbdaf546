"""What is measured: for each op, its providers on the same inputs, the first one the baseline.

An entry makes closures that run once; the runner interleaves them. `ROUTES` times every way of a LoRA linear part by
part, from which `write_routes` makes the table that the dispatcher reads; all else, new entries too, is in `REGISTRY`.
"""

import csv
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args
from xml.etree import ElementTree

import torch
from torch import Tensor
from torch.nn import functional

from cladapt_kernels import reference, registry_adamw, registry_retract
from cladapt_kernels.lora import routes
from cladapt_kernels.lora.linear import backward_by, forward_by, lora_linear
from cladapt_kernels.lora.routes import Factors, Gemm, Route
from cladapt_kernels.timing import COLD, HOST, HOT, MODELLED, TIME, WALL, Call, Entry, Providers, Row, Work

SCALE = 2.0
HALF = 2  # bytes of a bf16 entry
SUMMARY = ("over baseline", "us", "wall us", "host us", "% of roof", "rate", "H200 model us")
WAYS = {"forward": get_args(Gemm), "dx": get_args(Gemm), "factors": get_args(Factors)}
ROUTE_COLUMNS = (*"mknr", "dtype", *WAYS)
SKINNY_TESTS = ("tests/kernels/test_skinny.py",)
SHRINK_TESTS = ("tests/kernels/test_lora_linear.py",)
LORA_TESTS = (*SHRINK_TESTS, *SKINNY_TESTS)


class Size(NamedTuple):
    """A LoRA linear: tokens, inputs, outputs, rank."""

    m: int
    k: int
    n: int
    r: int

    def __str__(self) -> str:
        return f"{self.m} tokens, {self.k} to {self.n}, rank {self.r}"

    def passes(self, over_x: int, over_y: int) -> int:
        """Bytes of so many reads or writes of X [M, K] and of Y [M, N] in bf16."""
        return HALF * self.m * (over_x * self.k + over_y * self.n)


SIZES = (
    Size(8192, 1024, 1024, 16),
    Size(8192, 2048, 2048, 16),
    Size(8192, 4096, 4096, 16),
    Size(8192, 1024, 3072, 16),
)
SMALL = Size(512, 256, 256, 8)  # for a CPU

# Passes over X and over Y beside the two frozen products, forward and backward together. PEFT writes the low-rank
# term, reads and writes it to scale it, reads both terms and writes their sum, and comes back the same way; in
# float32 every one of these moves twice the bytes, and X and Y are converted on the way. Unsloth's is not timed.
PASSES = {
    "frozen linear": (0, 0),
    "PEFT, bf16 adapter": (1 + 5, 6 + 4),
    "PEFT, fp32 adapter": (5 + 10, 14 + 14),
    "Unsloth, dY B and S computed twice": (1 + 4, 2 + 3),
    "addmm, matmul": (1 + 3, 2 + 2),
    "addmm, skinny": (1 + 3, 2 + 2),
    "seeded, matmul": (1 + 1, 2),
    "seeded, skinny": (1 + 1, 2),
    "strip, matmul": (1, 1),
    "strip, skinny": (1, 1),
    "described, skinny": (1 + 1, 2),
    "described, single": (1 + 1, 2),
}


class Layer(NamedTuple):
    """A frozen linear with its adapter, an input and a gradient of the output."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """Autograd's gradients of x, a and b."""
        return torch.autograd.grad(y, (self.x, self.a, self.b), self.dy)


def layer(size: Size, device: torch.device, factors: torch.dtype | None = None) -> Layer:
    """Random values, bf16 on a GPU and float32 elsewhere; the adapter in its own dtype if one is given."""
    m, k, n, r = size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    a, b = (normal(*shape, std=0.02, dtype=factors or dtype).requires_grad_() for shape in ((r, k), (n, r)))
    return Layer(normal(m, k).requires_grad_(), normal(n, k, std=k**-0.5), a, b, normal(m, n))


def peft(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What PEFT's `Linear.forward` does with one active adapter and no dropout."""
    y = functional.linear(x, weight)
    y = y + functional.linear(functional.linear(x.to(a.dtype), a), b) * SCALE
    return y.to(x.dtype)


def _trained(size: Size, device: torch.device) -> Providers:
    """Forward and backward of a whole layer, by everyone's arithmetic and by each way of ours."""
    on_gpu = device.type == "cuda"
    own = layer(size, device)
    x, weight, a, b, dy = (t.detach() for t in own)

    def frozen() -> None:
        functional.linear(x, weight)
        dy @ weight

    def by(way: Gemm, factors: Factors) -> None:
        _, s = forward_by(way, x, weight, None, a, b, SCALE)
        backward_by(Route(way, way, factors, ""), dy, x, weight, a, b, s, SCALE)

    def autograd(function: Callable[..., Tensor], own: Layer) -> None:
        own.backward(function(own.x, own.weight, own.a, own.b))

    adapter = "bf16" if on_gpu else "fp32"
    calls: dict[str, Call] = {"frozen linear": frozen, f"PEFT, {adapter} adapter": partial(autograd, peft, own)}
    if on_gpu:
        calls["PEFT, fp32 adapter"] = partial(autograd, peft, layer(size, device, torch.float32))
    calls["addmm, matmul"] = partial(by, "addmm", "matmul")  # Unsloth's products, none twice
    if on_gpu and routes.has_triton():
        ways = itertools.product(get_args(Gemm), get_args(Factors))
        calls |= {f"{way}, {by_}": partial(by, way, by_) for way, by_ in ways if f"{way}, {by_}" in PASSES}
    ours = partial(autograd, lambda x, weight, a, b: lora_linear(x, weight, None, a, b, SCALE), own)
    return {**calls, "cladapt, as dispatched": ours}


def _compiled(size: Size, device: torch.device) -> Providers:
    """PEFT's arithmetic as it is and as Inductor compiles it; the compilation takes longer than all else together."""
    own = layer(size, device)
    compiled = torch.compile(peft, dynamic=False)

    def run(function: Callable[..., Tensor]) -> None:
        own.backward(function(own.x, own.weight, own.a, own.b))

    return {"PEFT, bf16 adapter": partial(run, peft), "PEFT, bf16 adapter, torch.compile": partial(run, compiled)}


def _compiled_entry(size: Size) -> Entry:
    frozen = Work(4 * size.m * size.k * size.n)
    make = partial(_compiled, size)
    return Entry("lora_linear, compiled", str(size), LORA_TESTS, make, frozen, gpu_only=True)


def _part(size: Size, part: str, device: torch.device) -> Providers:
    """One part of a layer by each way, the rest of what is timed with it the same."""
    x, weight, a, b, dy = (t.detach() for t in layer(size, device))
    _, s = forward_by("addmm", x, weight, None, a, b, SCALE)

    def run(way: str) -> None:
        if part == "forward":
            forward_by(way, x, weight, None, a, b, SCALE)  # type: ignore[arg-type]
        elif part == "dx":
            backward_by(Route("addmm", way, "skinny", ""), dy, x, weight, a, b, s, SCALE)  # type: ignore[arg-type]
        else:
            route = Route("addmm", "addmm", way, "")  # type: ignore[arg-type]
            backward_by(route, dy, x, weight, a, b, s, SCALE, need_dx=False)

    return {way: partial(run, way) for way in WAYS[part]}


def _skinny(size: Size, device: torch.device) -> Providers:
    from cladapt_kernels.lora.skinny import single, skinny

    x, _, a, b, dy = (t.detach() for t in layer(size, device, torch.float32))
    s, ds = x @ a.T.to(x.dtype), SCALE * (dy @ b.to(dy.dtype))
    da, db = torch.empty_like(a), torch.empty_like(b)
    return {
        "matmul": lambda: ((ds.T @ x).to(a.dtype), (SCALE * (dy.T @ s)).to(b.dtype)),
        "skinny": lambda: skinny(ds, x, s, dy, SCALE, da, db),
        "single": lambda: single(ds, x, s, dy, SCALE, da, db),
    }


def _shrink(size: Size, device: torch.device) -> Providers:
    from cladapt_kernels.lora.shrink import shrink

    x, _, a, _, _ = (t.detach() for t in layer(size, device))
    return {"matmul": lambda: x @ a.T, "shrink": lambda: shrink(x, a)}


def _lora_entry(size: Size) -> Entry:
    frozen = 4 * size.m * size.k * size.n
    work = {name: Work(frozen, size.passes(*passes)) for name, passes in PASSES.items()}
    return Entry("lora_linear", str(size), LORA_TESTS, partial(_trained, size), Work(frozen), work, gpu_only=True)


def _skinny_entry(size: Size) -> Entry:
    factors = 4 * size.r * (size.k + size.n)
    floor = Work(bytes=size.passes(1, 1) + 2 * HALF * size.m * size.r + factors)
    return Entry("skinny", str(size), SKINNY_TESTS, partial(_skinny, size), floor, gpu_only=True)


def _shrink_entry(size: Size) -> Entry:
    floor = Work(bytes=size.passes(1, 0) + HALF * size.r * (size.m + size.k))
    return Entry("shrink", str(size), SHRINK_TESTS, partial(_shrink, size), floor, gpu_only=True)


def _adapter(groups: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    anchor = (0.02 * torch.randn(groups * size, generator=generator)).to(device)
    value = anchor + 1e-3 * torch.randn(groups * size, generator=generator).to(device)
    lengths = torch.full((groups,), size, dtype=torch.int64, device=device)
    return value, anchor, reference.group_softmax(anchor, lengths), lengths


def _proximal(groups: int, size: int, device: torch.device) -> Providers:
    value, anchor, p, lengths = _adapter(groups, size, device)
    ones = torch.ones(groups, device=device)
    values, anchors = list(value.view(groups, size)), list(anchor.view(groups, size))

    def autograd_loop() -> None:
        leaves = [v.detach().requires_grad_() for v in values]
        total = torch.zeros((), device=device)
        for v, a in zip(leaves, anchors, strict=True):
            log_p, log_q = v.log_softmax(0), a.log_softmax(0)
            total = total + (log_p.exp() * (log_p - log_q)).sum()
        total.backward()

    return {
        "autograd, one group at a time": autograd_loop,
        "closed form, all groups at once": lambda: reference.proximal_kl(value, anchor, p, lengths, ones),
    }


def _proximal_entry(groups: int, size: int) -> Entry:
    floor = Work(bytes=4 * 4 * groups * size)  # v, a and q are read, the gradient is written
    make = partial(_proximal, groups, size)
    return Entry("proximal_kl", f"{groups} groups of {size}", ("tests/kernels/test_reference.py",), make, floor)


ROUTES = tuple(
    Entry(f"lora_linear {part}", str(size), LORA_TESTS, partial(_part, size, part), gpu_only=True)
    for size in SIZES
    for part in WAYS
)
# in the order of importance: what is killed in between has the rows of all before it
REGISTRY = (
    *map(_lora_entry, SIZES),
    *registry_adamw.ENTRIES,
    *map(_skinny_entry, SIZES),
    *map(_shrink_entry, SIZES[:3]),
    *registry_retract.ENTRIES,
    _proximal_entry(28, 1024),
    _proximal_entry(224, 16384),
    Entry("lora_linear", str(SMALL), LORA_TESTS, partial(_trained, SMALL)),
    *map(_compiled_entry, SIZES),
)


def checkout() -> Path | None:
    """The source tree this package lies in, if its tests and pytest are there to say what is right."""
    root = Path(__file__).resolve().parents[2]
    found = (root / SHRINK_TESTS[0]).is_file() and importlib.util.find_spec("pytest") is not None
    return root if found else None


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


def write_routes(rows: Sequence[Row], gpu: str, folder: Path = routes.TABLES) -> Path:
    """The dispatcher's table of this GPU: for each size, the way of each part whose median with cold L2 is least.

    A size of which a part was not timed has no row.
    """
    best: dict[tuple[object, object], tuple[float, str]] = {}
    for row in rows:
        if row["metric"] == TIME + COLD:
            key, found = (row["name"], row["shape"]), (float(str(row["q50"])), str(row["provider"]))
            best[key] = min(best.get(key, found), found)
    folder.mkdir(exist_ok=True)
    path = folder / f"{gpu.lower().replace(' ', '-')}.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(ROUTE_COLUMNS)
        for size in SIZES:
            keys = [(f"lora_linear {part}", str(size)) for part in WAYS]
            if all(key in best for key in keys):
                writer.writerow([*size, "bfloat16", *(best[key][1] for key in keys)])
    routes.forget()
    return path


def summary(rows: Sequence[Row]) -> list[dict[str, object]]:
    """For people: one line per provider of an entry, medians, with cold L2 where that was measured."""
    lines: dict[tuple[object, ...], dict[str, object]] = {}
    for row in rows:
        column = _column(str(row["metric"]), str(row["unit"]))
        if column:
            key = tuple(row[name] for name in ("name", "shape", "provider"))
            empty: Mapping[str, object] = dict.fromkeys(SUMMARY)
            line = lines.setdefault(key, {**dict(zip(("op", "shape", "provider"), key, strict=True)), **empty})
            line[column] = f"{row['q50']:.0f} {row['unit']}" if column == "rate" else row["q50"]
    return list(lines.values())


def _column(metric: str, unit: str) -> str | None:
    if metric.endswith(HOT):
        return None
    name = metric.removesuffix(COLD)
    known = {"speed at the roof": "% of roof", "useful work": "rate", TIME: "us", MODELLED: "H200 model us"}
    known |= {WALL: "wall us", HOST: "host us"}
    return "over baseline" if unit == "ratio" else known.get(name)
