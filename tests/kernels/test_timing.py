"""Timing: the order of calls, ratios known by construction, the GPU's protocol, the one csv schema."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cladapt_kernels import timing
from cladapt_kernels.timing import (
    COLUMNS,
    FEWEST_RUNS,
    H200,
    HOST,
    MODELLED,
    SLOW,
    WALL,
    WHERE,
    BackToBack,
    Entry,
    Roofs,
    Stopwatch,
    Work,
    compare,
    interleaved,
    measure,
    measure_roofs,
    quantiles,
    timed,
    where,
    write_rows,
)

CPU = torch.device("cpu")
LAUNCH = 0.001  # seconds of the host for one call
CLOCK = 1e9  # cycles per second


def test_every_call_of_one_provider_has_one_of_each_other_beside_it_in_both_orders() -> None:
    calls: list[str] = []
    providers = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = interleaved(providers, lambda call: timed(call, CPU), 4)
    assert "".join(calls) == "cbaabc" * 3  # one pair of turns warms up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_quantiles_of_known_values() -> None:
    assert quantiles([float(v) for v in range(11)]) == {"q20": 2.0, "q50": 5.0, "q80": 8.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that calls move by hand."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("counted", "metric", "ratio"), [("", "time over 'slow'", 0.25), ("users", "users per second over 'slow'", 4.0)]
)
def test_ratios_are_of_times_or_of_speeds(clock: list[float], counted: str, metric: str, ratio: float) -> None:
    def takes(seconds: float) -> None:
        clock[0] += seconds

    providers = {"slow": lambda: takes(8.0), "fast": lambda: takes(2.0)}
    slow, fast = compare("op", "a shape", providers, CPU, 5, counted)
    common = {"name": "op", "shape": "a shape", "runs": 5, "metric": metric, "unit": "ratio"}
    assert slow == {**common, "provider": "slow", "q20": 1.0, "q50": 1.0, "q80": 1.0}
    assert fast == {**common, "provider": "fast", "q20": ratio, "q50": ratio, "q80": ratio}


class FakeGpu:
    """A GPU whose queue, clock and L2 are a list of what was put on it: a launch costs the host `LAUNCH`.

    A gap that the host leaves is time on the GPU's clock, as it is on a real one.
    """

    def __init__(self, host: list[float]) -> None:
        self.host, self.free = host, 0.0
        self.done: list[str] = []

    def launch(self, name: str, seconds: float) -> None:
        self.host[0] += LAUNCH
        self.free = max(self.free, self.host[0]) + seconds
        self.done.append(name)

    def sleep(self, cycles: int) -> None:
        self.free = max(self.free, self.host[0]) + cycles / CLOCK
        self.done.append("sleep")

    def synchronize(self, _: object) -> None:
        self.host[0] = max(self.host[0], self.free)

    def event(self, enable_timing: bool) -> Any:
        gpu = self

        class Event:
            def record(self) -> None:
                self.at = max(gpu.free, gpu.host[0])

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.at - self.at)

        return Event()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> FakeGpu:
    """torch.cuda with a fake behind it; tensors stay on the CPU."""
    fake = FakeGpu(clock)
    monkeypatch.setattr(torch.cuda, "_sleep", fake.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 16)
    return fake


@pytest.mark.parametrize("cold", [True, False])
def test_the_host_s_launches_are_hidden_behind_the_backlog(gpu: FakeGpu, cold: bool) -> None:
    def three_launches() -> None:
        for _ in range(3):
            gpu.launch("kernel", 10e-6)

    watch = Stopwatch(CPU, cold)
    assert [watch(three_launches) for _ in range(3)] == pytest.approx([30e-6] * 3)
    once = ["sleep", *["kernel"] * (3 if cold else 6)]  # hot: the same call comes before
    assert gpu.done[-len(once) :] == once


def test_without_a_backlog_the_fake_shows_the_gaps(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONGEST_BACKLOG", 0.0)
    watch = Stopwatch(CPU, cold=True)
    assert watch(lambda: [gpu.launch("kernel", 10e-6) for _ in range(3)]) > 2 * LAUNCH


def test_a_cold_call_comes_after_the_flush_is_written(gpu: FakeGpu) -> None:
    watch = Stopwatch(CPU, cold=True)
    buffer = watch._flush
    assert buffer is not None
    seen = []

    def call() -> None:
        seen.append(bool(buffer.any()))
        buffer.fill_(1)

    buffer.fill_(1)
    for _ in range(2):
        watch(call)
    assert seen[-2:] == [False, False]
    assert Stopwatch(CPU, cold=False)._flush is None


class GpuDevice:
    """Passes for a GPU where only its kind is asked."""

    type = "cuda"


def entry(make: Callable[[Any], dict[str, Callable[[], object]]], **facts: Any) -> Entry:
    return Entry("op", "a shape", ("tests/none.py",), make, **facts)


@pytest.fixture
def seconds_by_call(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Watches that believe what a call returns, a tenth of it with hot L2, and note which of them was asked."""
    asked: dict[str, list[str]] = {"cold": [], "hot": [], "timed": [], "loop": []}

    def watch(kind: str, factor: float) -> Callable[[Any], float]:
        def seconds(call: Any) -> float:
            asked[kind].append(call.__name__)
            return factor * call()

        return seconds

    class Loop:
        def __init__(self, _: object) -> None:
            self.launching: dict[Any, list[float]] = {}

        def __call__(self, call: Any) -> float:
            asked["loop"].append(call.__name__)
            self.launching.setdefault(call, []).append(3 * call())
            return 4 * call()

    monkeypatch.setattr(timing, "timed", lambda call, _: watch("timed", 1.0)(call))
    monkeypatch.setattr(timing, "Stopwatch", lambda _, cold: watch("cold", 1.0) if cold else watch("hot", 0.5))
    monkeypatch.setattr(timing, "BackToBack", Loop)
    return asked


@pytest.mark.usefixtures("seconds_by_call")
def test_rows_of_a_gpu_are_against_its_roofs_and_the_baseline() -> None:
    work = Work(bytes=3e6)
    made = entry(lambda _: {"slow": lambda: 4e-6, "fast": lambda: 2e-6}, floor=work, work={"slow": work})
    rows = measure(made, GpuDevice(), 5, Roofs(3e12, 1e15))  # type: ignore[arg-type]
    fast = {row["metric"]: (row["unit"], row["q50"]) for row in rows if row["provider"] == "fast"}
    for state, factor in (("cold", 1), ("hot", 2)):
        unit = {kind: fast[f"{kind}, {state} L2"] for kind in ("time", "speed at the roof", "useful work")}
        assert fast[f"time over 'slow', {state} L2"] == ("ratio", 0.5)
        assert fast[f"speed of the baseline, {state} L2"] == ("%", 200.0)
        assert unit["time"] == ("us", pytest.approx(2.0 / factor))
        assert unit["speed at the roof"] == ("%", pytest.approx(50 * factor))  # 3 MB at 3 TB/s: 1 us
        assert unit["useful work"] == ("GB/s", pytest.approx(1500 * factor))
    assert (fast[WALL], fast[HOST]) == (("us", 8.0), ("us", 6.0))
    assert not [row for row in rows if row["metric"] == MODELLED]
    assert {row["runs"] for row in rows if row["metric"] not in (WALL, HOST)} == {5}
    assert {row["runs"] for row in rows if row["metric"] in (WALL, HOST)} == {FEWEST_RUNS}


def test_a_slow_provider_is_called_few_times_and_by_the_host_s_clock(seconds_by_call: dict[str, list[str]]) -> None:
    def slow() -> float:
        return 2 * SLOW

    def fast() -> float:
        return 2e-6

    rows = measure(entry(lambda _: {"slow": slow, "fast": fast}), GpuDevice(), 40, H200)  # type: ignore[arg-type]
    calls = {kind: {name: names.count(name) for name in ("slow", "fast")} for kind, names in seconds_by_call.items()}
    assert calls["timed"] == {"slow": 1 + FEWEST_RUNS, "fast": 1}
    assert calls["cold"] == {"slow": 0, "fast": 42}
    assert (calls["hot"]["slow"], calls["loop"]["slow"]) == (0, 0)
    runs = {(row["provider"], row["metric"]): row["runs"] for row in rows}
    assert runs["slow", "time, cold L2"] == runs["fast", "time over 'slow', cold L2"] == FEWEST_RUNS
    assert runs["fast", "time, cold L2"] == runs["fast", "time over 'fast', hot L2"] == 40
    assert ("slow", "time, hot L2") not in runs


@pytest.mark.usefixtures("seconds_by_call")
def test_a_provider_that_raises_is_given_to_the_caller_and_the_others_are_timed() -> None:
    def raises() -> float:
        raise RuntimeError("no shared memory")

    made = entry(lambda _: {"base": raises, "fast": lambda: 2e-6})
    told: list[tuple[str, str]] = []
    rows = measure(made, GpuDevice(), 3, H200, failed=lambda name, error: told.append((name, str(error))))  # type: ignore[arg-type]
    assert told == [("base", "no shared memory")]
    assert {row["provider"] for row in rows} == {"fast"}
    with pytest.raises(RuntimeError, match="no shared memory"):
        measure(made, GpuDevice(), 3, H200)  # type: ignore[arg-type]
    nothing = entry(lambda _: {"base": raises})
    assert measure(nothing, GpuDevice(), 3, H200, failed=lambda *_: None) == []  # type: ignore[arg-type]


def test_no_turn_begins_after_the_budget_but_the_fewest_are_done(clock: list[float]) -> None:
    def takes(seconds: float) -> None:
        clock[0] += seconds

    providers = {"a": lambda: takes(1.0), "b": lambda: takes(3.0)}
    for budget, expected in ((1.0, FEWEST_RUNS), (27.0, 5), (1e9, 50)):
        found = interleaved(providers, lambda call: timed(call, CPU), 50, budget=budget)
        assert {name: len(values) for name, values in found.items()} == {"a": expected, "b": expected}


def test_a_loop_that_never_waits_shows_the_host_where_the_host_is_slower(gpu: FakeGpu) -> None:
    watch = BackToBack(CPU)
    calls = {"short": lambda: gpu.launch("short", LAUNCH / 10), "long": lambda: gpu.launch("long", 10 * LAUNCH)}
    assert watch(calls["short"]) == pytest.approx(LAUNCH, rel=0.02)
    assert watch(calls["long"]) == pytest.approx(10 * LAUNCH, rel=0.02)
    assert [watch.launching[call] for call in calls.values()] == [[pytest.approx(LAUNCH)]] * 2


def test_on_a_cpu_modelled_times_have_no_runs_and_stand_beside_ratios() -> None:
    works: dict[str, Any] = {"floor": Work(flops=790e6), "work": {"x": Work(flops=790e6, bytes=4.3e6)}}
    ratio, floor, x = measure(entry(lambda _: {"x": lambda: None}, **works), CPU, 5, H200)
    assert (ratio["unit"], ratio["runs"]) == ("ratio", 5)
    assert [(row["provider"], row["metric"], row["unit"], row["runs"]) for row in (floor, x)] == [
        ("floor", MODELLED, "us", 0),
        ("x", MODELLED, "us", 0),
    ]
    assert [row["q50"] for row in (floor, x)] == pytest.approx([1.0, 2.0])


def test_an_entry_for_gpus_alone_makes_nothing_on_a_cpu() -> None:
    def refuse(_: torch.device) -> dict[str, Callable[[], object]]:
        raise AssertionError("made")

    assert measure(entry(refuse, gpu_only=True), CPU, 5, H200) == []
    assert measure_roofs(CPU) == (H200, [])


def test_the_csv_has_the_schema_and_refuses_other_columns(tmp_path: Path) -> None:
    rows = [{**row, **where(CPU)} for row in compare("op", "s", {"x": lambda: None}, CPU, 3)]
    write_rows(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open(newline="") as handle:
        reader = csv.DictReader(handle)
        assert tuple(reader.fieldnames or ()) == (*COLUMNS, *WHERE)
        (row,) = reader
    assert (row["name"], row["provider"], row["runs"], row["torch"]) == ("op", "x", "3", torch.__version__)
    with pytest.raises(ValueError, match="surprise"):
        write_rows(tmp_path / "rows.csv", [{**rows[0], "surprise": 1}])


def test_an_installed_package_names_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "timing.py"))
    assert where(CPU)["commit"] == ""
