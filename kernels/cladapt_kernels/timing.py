"""How anything is timed here: providers interleaved in one process, medians of ratios to the first, one csv schema.

Kernels are timed on a GPU by events behind a backlog, with cold and with hot L2, against the roofs of that GPU, and by
the host's clock in a loop that never waits, which shows the host's part that the backlog hides. On a CPU ratios are
measured, and what a model of bytes and FLOPs says of an H200 is told apart. Imports torch alone.
"""

import csv
import datetime
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

Call = Callable[[], object]
Providers = Mapping[str, Call]
Row = dict[str, object]

COLUMNS = ("name", "shape", "provider", "metric", "unit", "q20", "q50", "q80", "runs")
WHERE = ("device", "torch", "commit", "time")
WARMUP = 2
FEWEST_RUNS = 3  # below, the quantiles say nothing
SLOW = 0.05  # seconds of a call from which it is timed FEWEST_RUNS times and by the host's clock

COLD, HOT = ", cold L2", ", hot L2"
TIME = "time"
HOST, WALL = "host time", "wall time"
BACK_TO_BACK = 10  # calls; the launch queue of a GPU holds about a thousand launches
MODELLED = "modelled time on an H200"
FLOOR = "floor"
FLUSH_BYTES = 1 << 28
COPY_BYTES = 1 << 30
GEMM_SIDE = 8192
ROOF_RUNS = 21
LONGEST_BACKLOG = 0.05  # seconds


@dataclass(frozen=True)
class Roofs:
    """What a GPU reaches at best: bytes read and written per second by a copy, FLOP per second by a bf16 GEMM."""

    bandwidth: float
    flops: float


H200 = Roofs(4.3e12, 790e12)


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products, and bytes that other launches move; launches follow one another, so times add."""

    flops: float = 0.0
    bytes: float = 0.0

    def seconds(self, roofs: Roofs) -> float:
        """The time this takes at the roofs."""
        return self.flops / roofs.flops + self.bytes / roofs.bandwidth

    def rate(self, seconds: float) -> float:
        """TFLOP/s, or GB/s where nothing is multiplied."""
        return 1e-12 * self.flops / seconds if self.flops else 1e-9 * self.bytes / seconds

    @property
    def unit(self) -> str:
        """The unit of `rate`."""
        return "TFLOP/s" if self.flops else "GB/s"


@dataclass(frozen=True)
class Entry:
    """A benchmark: `tests` must be green before it is timed, `make(device)` gives its providers, the baseline first."""

    name: str
    shape: str
    tests: tuple[str, ...]
    make: Callable[[torch.device], Providers]
    floor: Work | None = None
    """What no implementation can do without."""
    work: Mapping[str, Work] = field(default_factory=dict)
    """What providers do, where there is a model of them."""
    gpu_only: bool = False


def timed(call: Call, device: torch.device) -> float:
    """Seconds of one call by the host's clock, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


class Stopwatch:
    """Seconds of one call on the current GPU, by an event pair.

    The GPU is kept busy while the host launches, so that no gap between launches is timed. Before the call a buffer
    larger than L2 is written (cold), or the same call is made (hot).
    """

    def __init__(self, device: torch.device, cold: bool) -> None:
        self._device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if cold else None
        self._host_seconds: dict[Call, float] = {}
        cycles = 10_000_000
        self._events(lambda: torch.cuda._sleep(cycles))
        self._cycles_per_second = cycles / self._events(lambda: torch.cuda._sleep(cycles))

    def __call__(self, call: Call) -> float:
        if call not in self._host_seconds:
            self._host_seconds[call] = self._launching(call)
        backlog = min(4 * self._host_seconds[call], LONGEST_BACKLOG)  # two calls, and as much to be safe
        torch.cuda._sleep(int(backlog * self._cycles_per_second))
        if self._flush is None:
            call()
        else:
            self._flush.zero_()
        return self._events(call)

    def _events(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self._device)
        return 1e-3 * start.elapsed_time(end)

    def _launching(self, call: Call) -> float:
        """Seconds that the host takes to launch it; the first call, which compiles, does not count."""
        call()
        torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        call()
        elapsed = time.perf_counter() - began
        torch.cuda.synchronize(self._device)
        return elapsed


class BackToBack:
    """Seconds of one of `BACK_TO_BACK` calls in a row, by the host's clock: what a loop that never waits would see.

    `launching` is the part in which the host was busy; where it is all of the time, the GPU waited for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.launching: dict[Call, list[float]] = {}

    def __call__(self, call: Call) -> float:
        torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        for _ in range(BACK_TO_BACK):
            call()
        launched = time.perf_counter()
        torch.cuda.synchronize(self._device)
        self.launching.setdefault(call, []).append((launched - began) / BACK_TO_BACK)
        return (time.perf_counter() - began) / BACK_TO_BACK


def interleaved(
    providers: Providers,
    watch: Callable[[Call], float],
    runs: int,
    few: Collection[str] = (),
    budget: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of `runs` calls of each provider, in turn, the order turned around every time; two calls warm up.

    Those named in `few` are called `FEWEST_RUNS` times, without a warm-up. After `budget` seconds no further turn
    begins, but each provider has `FEWEST_RUNS` calls.
    """
    names = list(providers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    until = time.perf_counter() + budget
    for turn in range(runs + WARMUP):
        past_fewest = turn >= WARMUP + FEWEST_RUNS
        if past_fewest and time.perf_counter() > until:
            break
        for name in names if turn % 2 else reversed(names):
            if name in few and (past_fewest or turn < WARMUP):
                continue
            elapsed = watch(providers[name])
            if turn >= WARMUP:
                seconds[name].append(elapsed)
    return seconds


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """20, 50 and 80 % quantiles."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"q20": cuts[1], "q50": statistics.median(values), "q80": cuts[7]}


def compare(
    name: str, shape: str, providers: Providers, device: torch.device, runs: int, counted: str = ""
) -> list[Row]:
    """One row per provider: the ratio to the first one, pair by pair; absolute times beside it on a GPU alone.

    The ratio is of times, or of speeds where `counted` says what each call does equally much of.
    """
    seconds = interleaved(providers, lambda call: timed(call, device), runs)
    baseline, *_ = seconds
    metric = f"{counted} per second over '{baseline}'" if counted else f"time over '{baseline}'"
    rows: list[Row] = []
    for provider, values in seconds.items():
        pairs = zip(values, seconds[baseline], strict=True)
        common: Row = {"name": name, "shape": shape, "provider": provider, "runs": runs}
        ratios = [b / a if counted else a / b for a, b in pairs]
        rows.append({**common, "metric": metric, "unit": "ratio", **quantiles(ratios)})
        if device.type == "cuda":
            rows.append({**common, "metric": TIME, "unit": "us", **quantiles([1e6 * v for v in values])})
    return rows


def measure(
    entry: Entry,
    device: torch.device,
    runs: int,
    roofs: Roofs,
    budget: float = math.inf,
    failed: Callable[[str, Exception], None] | None = None,
) -> list[Row]:
    """All rows of an entry: on a GPU by events against `roofs`; elsewhere ratios, and what is modelled, with 0 runs.

    Args:
        entry: what is timed; nothing is, where the entry is for GPUs alone and `device` is none.
        device: where the providers run.
        runs: calls of each provider whose call takes less than `SLOW` seconds; of the others, `FEWEST_RUNS`.
        roofs: the GPU's, by which times are judged.
        budget: seconds after which fewer calls than `runs` do, compilation not counted; no less than `FEWEST_RUNS`.
        failed: is given a provider that raises in its first two calls, and what it raised; the others are timed, the
            first of them as the baseline. Without it the exception is raised.
    """
    if device.type != "cuda":
        measured = [] if entry.gpu_only else compare(entry.name, entry.shape, entry.make(device), device, runs)
        return [*measured, *modelled(entry)]
    providers = dict(entry.make(device))
    few: set[str] = set()
    for name, call in list(providers.items()):
        try:
            call()  # compiles
            if timed(call, device) > SLOW:
                few.add(name)
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)
            del providers[name]
    fast = {name: call for name, call in providers.items() if name not in few}
    rows: list[Row] = []
    if providers:
        cold = Stopwatch(device, cold=True)
        slow_calls = {providers[name] for name in few}
        share = budget / 3

        def watch(call: Call) -> float:
            return timed(call, device) if call in slow_calls else cold(call)

        rows += _against_roofs(entry, interleaved(providers, watch, runs, few, share), roofs, COLD)
    if fast:
        hot = Stopwatch(device, cold=False)
        rows += _against_roofs(entry, interleaved(fast, hot, runs, budget=share), roofs, HOT)
        rows += _with_the_host(entry, fast, device, runs, share)
    return rows


def _against_roofs(entry: Entry, seconds: Mapping[str, Sequence[float]], roofs: Roofs, state: str) -> list[Row]:
    """Rows of each provider beside the first, as many calls of both as the one with fewer has."""
    baseline, *_ = seconds
    rows: list[Row] = []
    for provider, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[baseline], strict=False)]
        figures = [
            (f"time over '{baseline}'", "ratio", ratios),
            ("speed of the baseline", "%", [100 / ratio for ratio in ratios]),
            (TIME, "us", [1e6 * v for v in values]),
        ]
        if entry.floor is not None:
            ideal = entry.floor.seconds(roofs)
            figures += [
                ("speed at the roof", "%", [100 * ideal / v for v in values]),
                ("useful work", entry.floor.unit, [entry.floor.rate(v) for v in values]),
            ]
        rows += [_row(entry, provider, metric + state, unit, of) for metric, unit, of in figures]
    return rows


def _with_the_host(entry: Entry, providers: Providers, device: torch.device, runs: int, budget: float) -> list[Row]:
    """Rows of what a call takes in a loop that never waits, and of what the host is busy for it."""
    watch = BackToBack(device)
    rows: list[Row] = []
    turns = max(FEWEST_RUNS, runs // BACK_TO_BACK)
    for provider, values in interleaved(providers, watch, turns, budget=budget).items():
        launching = watch.launching[providers[provider]][WARMUP:]
        figures = ((WALL, values), (HOST, launching))
        rows += [_row(entry, provider, metric, "us", [1e6 * v for v in of]) for metric, of in figures]
    return rows


def _row(entry: Entry, provider: str, metric: str, unit: str, values: Sequence[float]) -> Row:
    common: Row = {"name": entry.name, "shape": entry.shape, "provider": provider, "metric": metric, "unit": unit}
    return {**common, "runs": len(values), **quantiles(values)}


def modelled(entry: Entry) -> list[Row]:
    """Times on an H200 by the model of bytes and FLOPs, never measured: 0 runs."""
    works = {**({} if entry.floor is None else {FLOOR: entry.floor}), **entry.work}
    common: Row = {"name": entry.name, "shape": entry.shape, "metric": MODELLED, "unit": "us", "runs": 0}
    return [
        {**common, "provider": provider, **dict.fromkeys(("q20", "q50", "q80"), 1e6 * work.seconds(H200))}
        for provider, work in works.items()
    ]


def measure_roofs(device: torch.device) -> tuple[Roofs, list[Row]]:
    """The roofs of this GPU and their rows; those of an H200 and no rows on a CPU."""
    if device.type != "cuda":
        return H200, []
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(GEMM_SIDE, GEMM_SIDE, device=device).bfloat16() for _ in range(2))
    calls: Providers = {"copy": lambda: target.copy_(source), "bf16 GEMM": lambda: left @ right}
    works = {"copy": Work(bytes=2 * COPY_BYTES), "bf16 GEMM": Work(flops=2 * GEMM_SIDE**3)}
    seconds = interleaved(calls, Stopwatch(device, cold=True), ROOF_RUNS)
    rows: list[Row] = []
    for name, shape in (("copy", f"{COPY_BYTES} bytes"), ("bf16 GEMM", f"{GEMM_SIDE} cubed")):
        work = works[name]
        common: Row = {"name": "roof", "shape": shape, "provider": name, "metric": "useful work" + COLD}
        rates = [work.rate(v) for v in seconds[name]]
        rows.append({**common, "unit": work.unit, "runs": ROOF_RUNS, **quantiles(rates)})
    copy, gemm = (statistics.median(seconds[name]) for name in calls)
    return Roofs(works["copy"].bytes / copy, works["bf16 GEMM"].flops / gemm), rows


def where(device: torch.device) -> dict[str, str]:
    """On which device, with which torch, at which commit of this source and when: the columns WHERE."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {platform.machine()}",
        "torch": torch.__version__,
        "commit": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as csv with the columns COLUMNS and WHERE, nothing more and nothing less, at once."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, (*COLUMNS, *WHERE), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def _commit() -> str:
    """Commit of the checkout that tracks this package, marked when it has changes; empty for an installed package."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    # an environment inside someone's own repository is not under that repository's commits
    tracked = git("ls-files", "__init__.py")
    return git("describe", "--always", "--dirty", "--exclude=*") if tracked else ""
