"""The registry: its models against published figures, its providers against each other, what it needs and refuses."""

import csv
import dataclasses
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from cladapt_kernels.timing import COLD, FLOOR, HOST, HOT, MODELLED, WALL, Entry, Row, modelled
from registry import REGISTRY, ROUTES, lora, rectify, red, red_by_report, summary, write_routes
from registry.lora import IMPLEMENTATIONS, SIZES, SMALL, Layer, Size, layer, peft

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# kernels of others and of ours, in us on an H200, from the same model worked out by hand: frozen, PEFT, Unsloth, strip
BY_HAND = {1024: (43.5, 106, 82.5, 51), 2048: (174, 299, 252, 190), 4096: (696, 946, 852, 727)}
FOREIGN = (
    "hypothesis",
    "polars",
    "peft",
    "transformers",
    "numpy",
    "pydantic",
    "typer",
    "rich",
    "cladapt",
    "cladapt_cli",
)
BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"{{name}} is absent", name=name)
sys.meta_path.insert(0, Absent())
{code}
"""


def python(code: str, names: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run code where these packages are not installed."""
    text = BLOCKED.format(names=set(names), code=code)
    roots = os.pathsep.join(str(ROOT / name) for name in ("kernels", "bench"))
    environment = {**os.environ, "PYTHONPATH": roots, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("width", BY_HAND)
def test_the_model_is_the_one_worked_out_by_hand(width: int) -> None:
    (entry,) = [e for e in REGISTRY if e.name == "lora_linear" and f"{width} to {width}" in e.shape and e.gpu_only]
    found = {str(row["provider"]): row["q50"] for row in modelled(entry)}
    ours = ("frozen linear", "PEFT, bf16 adapter", "Unsloth, dY B and S computed twice", "strip, skinny")
    assert [found[name] for name in ours] == pytest.approx(BY_HAND[width], rel=0.01)
    assert found[FLOOR] == found["frozen linear"]


def test_every_entry_has_tests_and_a_place_of_its_own() -> None:
    entries = (*ROUTES, *REGISTRY)
    assert len({(entry.name, entry.shape) for entry in entries}) == len(entries)
    assert [file for entry in entries for file in entry.tests if not (ROOT / file).is_file()] == []
    assert {(entry.name, entry.shape) for entry in ROUTES} == {
        (f"lora_linear {p}", str(s)) for p in IMPLEMENTATIONS for s in SIZES
    }


def test_peft_s_arithmetic_is_peft_s() -> None:
    own = layer(SMALL, CPU)
    linear = pytest.importorskip("peft.tuners.lora").Linear
    base = torch.nn.Linear(SMALL.k, SMALL.n, bias=False)
    base.weight.data = own.weight
    config = pytest.importorskip("peft").LoraConfig(r=SMALL.r, lora_alpha=int(lora.SCALE * SMALL.r))
    theirs = linear(base, "default", config=config, r=SMALL.r, lora_alpha=int(lora.SCALE * SMALL.r))
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = own.a.data, own.b.data
    assert torch.equal(theirs(own.x), peft(own.x, own.weight, own.a, own.b))


def test_providers_of_the_layer_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    backward, gradients = lora.backward_by, Layer.backward

    def by_hand(*arguments: Any, **more: Any) -> Any:
        found["addmm, matmul"] = backward(*arguments, **more)
        return found["addmm, matmul"]

    def by_autograd(self: Layer, y: torch.Tensor) -> Any:
        found[name] = gradients(self, y)
        return found[name]

    monkeypatch.setattr(lora, "backward_by", by_hand)
    monkeypatch.setattr(Layer, "backward", by_autograd)
    (entry,) = [e for e in REGISTRY if e.name == "lora_linear" and not e.gpu_only]
    providers = entry.make(CPU)
    assert list(providers) == ["frozen linear", "PEFT, fp32 adapter", "addmm, matmul", "cladapt, as dispatched"]
    for name, call in providers.items():  # noqa: B007 - the wrappers read the name
        call()
    expected = found.pop("PEFT, fp32 adapter")
    assert set(found) == {"addmm, matmul", "cladapt, as dispatched"}
    for ours in found.values():
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("part", IMPLEMENTATIONS)
def test_every_implementation_of_a_part_runs(part: str) -> None:
    pytest.importorskip("triton", reason="the kernels are written in triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls = lora._part(Size(64, 32, 48, 8), part, device)
    assert tuple(calls) == IMPLEMENTATIONS[part]
    for call in calls.values():
        call()


def test_the_providers_of_skinny_and_shrink_agree() -> None:
    pytest.importorskip("triton", reason="the kernels are written in triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = Size(64, 32, 48, 8)
    matmul, shrunk = (call() for call in lora._shrink(size, device).values())
    torch.testing.assert_close(matmul, shrunk, rtol=2e-2, atol=2e-2)
    for call in lora._skinny(size, device).values():
        call()


def test_the_passes_of_items_by_a_loop_are_those_of_all_at_once() -> None:
    (entry,) = [e for e in REGISTRY if e.name == "item_sam" and not e.gpu_only]
    plain, *others = (call() for call in entry.make(CPU).values())
    assert len(others) == 3
    for found in others[1:]:
        for ours, loop, first in zip(found, others[0], plain, strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(ours, loop, rtol=1e-3, atol=1e-3)
            assert (loop - first).norm() > 0.01 * first.norm()  # the perturbation shows


def test_the_loops_over_modules_rectify_as_all_at_once() -> None:
    providers = rectify._rectify(3, 40, 30, 4, 6, CPU)
    modules = rectify._modules(3, 40, 30, 4, 6, CPU)
    for ours in (rectify.LEAST, rectify.OURS, rectify.EXACT):
        moved = providers[ours]()
        for loop in (rectify.LSTSQ, rectify.PINV, rectify.FACTORS):
            for (a, b, *_), (x, y), (down, up) in zip(modules, providers[loop](), moved, strict=True):  # type: ignore[call-overload]
                torch.testing.assert_close(down, a + x, rtol=0, atol=1e-5)
                torch.testing.assert_close(up, b + y, rtol=0, atol=1e-5)


def test_a_red_test_is_named_and_a_green_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "green.py").write_text("def test_it(): pass\n")
    (tmp_path / "red.py").write_text("def test_it(): assert False\n")
    green, broken = (Entry("op", "s", (name,), lambda _: {}) for name in ("green.py", "red.py"))
    assert red([green, green], tmp_path) == ()
    assert red([green, broken, broken], tmp_path) == ("red.py",)


def test_a_report_of_pytest_says_which_files_are_red_unread_or_never_ran(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    texts = {
        "green": "import pytest\ndef test_it(): pass\n@pytest.mark.skip\ndef test_other(): assert False\n",
        "red": "def test_it(): assert False\ndef test_other(): pass\n",
        "unread": "import no_such_module\n",
        "setup": "import pytest\n@pytest.fixture\ndef x(): raise OSError\ndef test_it(x): pass\n",
        "last": "def test_it(): raise KeyboardInterrupt\n",
    }
    for name, text in texts.items():
        (folder / f"test_{name}.py").write_text(text)
    files = {name: f"tests/test_{name}.py" for name in texts}
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", f"--junitxml={report}"]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", *files.values()]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    entries = [Entry(name, "s", (file,), lambda _: {}) for name, file in files.items()]
    both = Entry("both", "s", (files["green"], files["red"]), lambda _: {})
    absent = Entry("absent", "s", ("tests/test_absent.py",), lambda _: {})
    expected = {files[name] for name in ("red", "unread", "setup", "last")} | {"tests/test_absent.py"}
    assert set(red_by_report([*entries, both, absent], report)) == expected


def test_the_summary_has_a_line_per_provider_with_what_was_measured_cold() -> None:
    common: Row = {"name": "op", "shape": "s", "provider": "x", "runs": 5}
    figures = [("time over 'y'", "ratio", 0.5), ("time", "us", 2.0), ("speed at the roof", "%", 50.0)]
    figures += [("useful work", "GB/s", 1500.0), ("speed of the baseline", "%", 200.0)]
    rows = [{**common, "metric": m + COLD, "unit": unit, "q50": v} for m, unit, v in figures]
    rows += [{**common, "metric": m + HOT, "unit": unit, "q50": -v} for m, unit, v in figures]
    rows += [{**common, "metric": m, "unit": "us", "q50": v} for m, v in ((WALL, 9.0), (HOST, 7.0))]
    rows.append({**common, "provider": "floor", "metric": MODELLED, "unit": "us", "q50": 1.0})
    cold, floor = summary(rows)
    assert cold == {
        "op": "op", "shape": "s", "provider": "x", "over baseline": 0.5, "us": 2.0, "wall us": 9.0, "host us": 7.0,
        "% of roof": 50.0, "rate": "1500 GB/s", "H200 model us": None,
    }  # fmt: skip
    assert (floor["provider"], floor["us"], floor["H200 model us"]) == ("floor", None, 1.0)


@pytest.fixture
def bench() -> Any:
    """bench/run.py as a module."""
    spec = spec_from_file_location("bench_run", ROOT / "bench" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gate_on_a_gpu_runs_the_tests_of_every_entry_the_gradients_first() -> None:
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("GPU_TESTS"))
    names = line.partition("%.py,")[2].rstrip(")").split()
    assert names[0] == "lora_linear"
    files = {file for entry in (*ROUTES, *REGISTRY) for file in entry.tests}
    assert files <= {f"tests/kernels/test_{name}.py" for name in names}


def test_the_script_writes_a_whole_run_and_nothing_of_a_part(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--runs", "3", "--tested", "--only", "shrink"], tmp_path) == 0
    assert list(tmp_path.iterdir()) == []
    assert "floor" in capsys.readouterr().out
    for arguments, message in (
        (["--runs", "2"], "--runs 2 is too few"),
        (["--seconds", "0"], "a time above 0"),
        (["--only", "x y"], "no entry has"),
    ):
        with pytest.raises(SystemExit, match="2"):
            bench.main(arguments, tmp_path)
        assert message in capsys.readouterr().err


def test_on_a_gpu_the_routes_are_written_before_anything_is_dispatched(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def measure(
        entry: Entry, device: torch.device, runs: int, roofs: object, budget: float, failed: object
    ) -> list[Row]:
        assert (device, runs, roofs, budget) == (torch.device("cuda", 0), 3, "roofs", 7.0)
        done.append(entry.name)
        common: Row = {"name": entry.name, "shape": entry.shape, "metric": f"time{COLD}", "unit": "us", "runs": runs}
        impls = IMPLEMENTATIONS.get(entry.name.removeprefix("lora_linear "), ("x",))
        return [{**common, "provider": impl, "q20": n, "q50": n, "q80": n} for n, impl in enumerate(impls)]

    def write_routes_here(rows: list[Row], gpu: str) -> Path:
        done.append(f"table of {gpu}")
        return write_routes(rows, gpu, tmp_path / "routes")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Maker G9")
    for name, fake in (
        ("measure", measure),
        ("measure_roofs", lambda _: ("roofs", [])),
        ("write_routes", write_routes_here),
    ):
        monkeypatch.setattr(bench, name, fake)
    assert bench.main(["--runs", "3", "--seconds", "7", "--tested", "--device", "cuda"], tmp_path) == 0
    assert done.index("table of Some Maker G9") == len(ROUTES) == done.index("lora_linear") - 1
    table = (tmp_path / "routes" / "some-maker-g9.csv").read_text().splitlines()
    assert table[1] == "8192,1024,1024,16,bfloat16,addmm,addmm,matmul"
    written = (tmp_path / "some-maker-g9" / "registry.csv").read_text().splitlines()
    assert len(written) == 1 + sum(map(len, IMPLEMENTATIONS.values())) * len(SIZES) + len(REGISTRY)
    assert (tmp_path / "some-maker-g9" / "routes.csv").read_text().splitlines() == table


@pytest.fixture
def three_entries(bench: Any, monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """A registry of three ops on a CPU, each of one test file and of two providers that do nothing."""
    made = [
        Entry(name, "s", (f"tests/test_{name}.py",), lambda _: {"a": lambda: None, "b": lambda: None})
        for name in ("first", "second", "third")
    ]
    monkeypatch.setattr(bench, "ROUTES", ())
    monkeypatch.setattr(bench, "REGISTRY", made)
    return made


def names_in(path: Path) -> list[str]:
    with path.open(newline="") as handle:
        return [row["name"] for row in csv.DictReader(handle)]


def test_an_op_with_red_tests_is_refused_by_name_and_the_others_are_timed(
    bench: Any, three_entries: list[Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "tests.xml"
    cases = ['<testcase classname="tests.test_first"/>', '<testcase classname="tests.test_third"><skipped/></testcase>']
    cases += ['<testcase classname="tests.test_second"><failure/></testcase>']
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    out = tmp_path / "out"
    assert bench.main(["--runs", "3", "--report", str(report), "--results", str(out)]) == 5
    assert "refused second, s: tests/test_second.py red or not run" in capsys.readouterr().err
    assert names_in(out / "registry.csv") == ["first", "first", "third", "third"]
    assert not (out / "registry.csv.partial").exists()
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--report", str(tmp_path / "none.xml")])
    assert "none.xml: no such file" in capsys.readouterr().err


def test_an_entry_that_raises_is_told_and_a_kill_keeps_what_was_timed(
    bench: Any, three_entries: list[Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def raises(_: torch.device) -> Any:
        raise RuntimeError("out of memory")

    three_entries[1] = dataclasses.replace(three_entries[1], make=raises)
    assert bench.main(["--runs", "3", "--tested", "--results", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "failed second, s:\n" in told
    assert "RuntimeError: out of memory" in told
    assert names_in(tmp_path / "registry.csv") == ["first", "first", "third", "third"]

    def killed(_: torch.device) -> Any:
        raise KeyboardInterrupt

    three_entries[1] = dataclasses.replace(three_entries[1], make=killed)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--runs", "3", "--tested", "--only", "", "--results", str(tmp_path)])
    assert names_in(tmp_path / "registry.csv") == ["first", "first"]


def test_importing_the_benchmarks_needs_torch_alone() -> None:
    done = python("import registry", (*FOREIGN, "triton", "pytest"))
    assert done.returncode == 0, done.stderr[-2000:]


def test_kernel_tests_and_benchmarks_need_the_checkout_torch_triton_numpy_and_pytest_alone() -> None:
    pytest.importorskip("triton", reason="the kernels are written in triton")
    collect = ["-q", "--collect-only", "-m", "not slow", "-p", "no:cacheprovider", "tests/kernels"]
    code = f"import pytest; sys.exit(pytest.main({collect}))"
    done = python(code, tuple(name for name in FOREIGN if name != "numpy"))  # the interpreter of triton needs numpy
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_every_kernel_stays_within_its_budget" not in done.stdout
    assert "test_the_model_is_the_one_worked_out_by_hand" in done.stdout


def test_both_halves_of_make_gpu_end_within_ten_minutes() -> None:
    makefile = Path(__file__).resolve().parents[2].joinpath("Makefile").read_text(encoding="utf-8")
    (seconds,) = re.findall(r"^GPU_SECONDS \?= (\d+)$", makefile, re.MULTILINE)
    grace = re.findall(r"timeout --signal=INT --kill-after=(\d+) \$\(GPU_SECONDS\)", makefile)
    assert len(grace) == 2
    assert 2 * int(seconds) + sum(map(int, grace)) < 600
