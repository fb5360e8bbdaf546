"""Shares of phases: each second counts once, for the innermost phase, and nothing stays watched."""

import csv
from pathlib import Path

import pytest
import torch

from cladapt.config import SimulateConfig, TokensConfig
from cladapt.errors import ConfigError
from cladapt.pipeline import bench, bench_profile
from cladapt.pipeline.bench import Case
from cladapt.pipeline.bench_profile import DECODING, OTHER, STEP, Phases
from cladapt.train.sinks import MemorySink
from cladapt_kernels.timing import COLUMNS, WHERE

CPU = torch.device("cpu")


class Clock:
    """A clock that is told how late it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(bench_profile.time, "perf_counter", lambda: self.now)

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_a_second_counts_once_for_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with Phases(("outer", "inner"), CPU) as phases:
        phases.watch(clock, "work", "inner")
        clock.now = 100.0
        phases.begin()
        clock.now += 1
        with phases.during("outer"):
            clock.now += 2
            clock.work(4)
            clock.now += 8
        clock.work(16)
        clock.now += 32
        assert phases.end() == {"outer": 10.0, "inner": 20.0, OTHER: 33.0}
    clock.work(1)
    assert phases.end() == {"outer": 10.0, "inner": 20.0, OTHER: 34.0}


def test_a_phase_that_fails_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def fail() -> None:
        clock.work(3)
        raise ZeroDivisionError

    clock.fail = fail  # type: ignore[attr-defined]
    phases = Phases(("one",), CPU)
    phases.watch(clock, "fail", "one")
    with pytest.raises(ZeroDivisionError):
        clock.fail()  # type: ignore[attr-defined]
    clock.work(5)
    assert phases.end() == {"one": 3.0, OTHER: 5.0}


@pytest.fixture(scope="module")
def case() -> Case:
    return bench.make_case(
        SimulateConfig(users=40, items=60, topics=4, blocks=3),
        TokensConfig(dimensions=8, levels=2, codes=8, capacity=16),
    )


def test_every_phase_of_a_step_and_of_a_decoding_batch_is_seen(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_profile, "make_case", lambda *_: case)
    result = bench_profile.profile("peso", 3, None, None, tmp_path / "profile.csv", MemorySink())
    found = {(row["name"], row["provider"]): row for row in result["shares"]}
    assert list(found) == [
        *(("training step", phase) for phase in (*STEP, OTHER)),
        *(("decoding batch", phase) for phase in (*DECODING, OTHER)),
    ]
    assert all(0.0 < row["q20"] <= row["q50"] <= row["q80"] < 1.0 for row in found.values())
    for name in ("training step", "decoding batch"):
        assert sum(row["q50"] for (of, _), row in found.items() if of == name) == pytest.approx(1.0, abs=0.1)
    with (tmp_path / "profile.csv").open(newline="") as handle:
        reader = csv.DictReader(handle)
        assert tuple(reader.fieldnames or ()) == (*COLUMNS, *WHERE)
        assert [row["unit"] for row in reader] == ["share"] * len(found)
    backbone = getattr(case.base.model, case.base.model.base_model_prefix)
    assert "forward" not in vars(backbone)


def test_a_method_with_work_of_its_own_shows_it(case: Case) -> None:
    share = {}
    for method in ("finetune", "janus"):
        rows = bench_profile.profile_steps(case, "tiny", method, 3)
        (share[method],) = (row["q50"] for row in rows if row["provider"] == "method")
    assert share["janus"] > share["finetune"]


def test_a_base_of_one_s_own_is_measured_on_its_stream(growth: Path) -> None:
    case = bench_profile.open_case(growth / "base", growth / "short")
    assert case.split.block == 2
    assert {row["provider"] for row in bench_profile.profile_steps(case, "base", "finetune", 3)} == {*STEP, OTHER}


@pytest.mark.parametrize(
    ("method", "base", "out", "message"),
    [
        ("peso", Path("base"), None, "--base and --data belong together"),
        ("frozen", None, None, "--method frozen is not a method that trains"),
        ("nothing", None, None, "--method nothing is not a method that trains"),
        ("peso", None, Path("rows.txt"), "unknown kind of file"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    method: str, base: Path | None, out: Path | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_profile.profile(method, 3, base, None, out, MemorySink())
