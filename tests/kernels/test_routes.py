"""Routes: the table that measured rows make, how the dispatcher reads it, and the rule where there is none."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cladapt_kernels.lora import routes
from cladapt_kernels.lora.routes import Route
from cladapt_kernels.timing import COLD, HOT, Row
from registry import write_routes
from registry.lora import IMPLEMENTATIONS, SIZES
from registry.tables import ROUTE_COLUMNS

GPU = "Some Maker G9"
FASTEST = {
    1024: ("strip", "described", "single"),
    2048: ("seeded", "strip", "matmul"),
    4096: ("addmm", "addmm", "skinny"),
}


def rows() -> list[Row]:
    """For each width its own fastest implementations when L2 is cold; hot, and by the ratio, other implementations."""
    made: list[Row] = []
    for size in SIZES:
        for part, fastest in zip(IMPLEMENTATIONS, FASTEST[size.k], strict=True):
            for impl in IMPLEMENTATIONS[part]:
                common = {"name": f"lora_linear {part}", "shape": str(size), "provider": impl}
                cold = 10.0 if impl == fastest else 11.0
                made.append({**common, "metric": f"time{COLD}", "unit": "us", "q50": cold})
                made.append({**common, "metric": f"time{HOT}", "unit": "us", "q50": 20.0 - cold})
                made.append({**common, "metric": f"time over 'addmm'{COLD}", "unit": "ratio", "q50": 20.0 - cold})
    return made


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """Routes are looked up anew in each test, and what a test pretends is forgotten."""
    routes.forget()
    yield
    routes.forget()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The table of made-up rows, in a folder of its own."""
    monkeypatch.setattr(routes, "TABLES", tmp_path / "routes")
    return write_routes(rows(), GPU, routes.TABLES)


def test_the_table_holds_the_fastest_way_of_every_part_with_cold_l2(table: Path) -> None:
    assert table.name == "some-maker-g9.csv"
    assert table.read_text().splitlines() == [
        "m,k,n,r,dtype,forward,dx,factors",
        "8192,1024,1024,16,bfloat16,strip,described,single",
        "8192,2048,2048,16,bfloat16,seeded,strip,matmul",
        "8192,4096,4096,16,bfloat16,addmm,addmm,skinny",
        "8192,1024,3072,16,bfloat16,strip,described,single",
    ]
    found = routes._table(GPU, "bfloat16")
    assert set(found) == set(SIZES)
    assert found[8192, 2048, 2048, 16] == Route("seeded", "strip", "matmul", f"measured on {GPU}")
    assert routes._table(GPU, "float16") == {}


@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((8000, 1024, 1000, 8), 1024),
        ((4096, 2048, 2048, 32), 2048),
        ((10**6, 9000, 3000, 4), 4096),
        ((8192, 16384, 16384, 64), 4096),
        ((8192, 256, 256, 16), 1024),
    ],
)
def test_a_shape_takes_the_ways_of_the_nearest_one(table: Path, shape: tuple[int, int, int, int], width: int) -> None:
    found = routes._nearest(GPU, "bfloat16", *shape)
    assert found is not None
    assert found[:3] == FASTEST[width]


@pytest.mark.parametrize(
    "shape",
    [
        (4095, 1024, 1024, 16),
        (1, 1024, 1024, 16),
        (8192, 240, 1024, 16),
        (8192, 4096, 32000, 16),
        (8192, 1024, 1024, 65),
    ],
)
def test_no_row_speaks_for_fewer_rows_or_a_far_shape(table: Path, shape: tuple[int, int, int, int]) -> None:
    assert routes._nearest(GPU, "bfloat16", *shape) is None


def on_gpu_of(rows: int, dtype: torch.dtype, index: int = 0) -> Any:
    """What the dispatcher asks of a tensor on a GPU."""
    return SimpleNamespace(device=torch.device("cuda", index), dtype=dtype, shape=(rows, 8))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with that GPU, of a name and a capability that a test may change, and triton."""
    told = SimpleNamespace(name=GPU, capability=(9, 0), asked=0)

    def name(_: torch.device) -> str:
        told.asked += 1
        return told.name

    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: told.capability)
    monkeypatch.setattr(routes, "has_triton", lambda: True)
    return told


@pytest.mark.usefixtures("table", "gpu")
def test_the_dispatcher_follows_the_table_of_its_gpu_and_dtype() -> None:
    assert routes.route(on_gpu_of(8192, torch.bfloat16), 1024, 1024, 16)[:3] == FASTEST[1024]
    other = routes.route(on_gpu_of(8192, torch.float16), 1024, 1024, 16)
    assert other == Route("seeded", "seeded", "skinny", "no table near this shape: the rule")
    assert routes.route(on_gpu_of(8192, torch.bfloat16), 4096, 4096, 16)[:3] == FASTEST[4096]
    dropped = routes.route(on_gpu_of(8192, torch.bfloat16), 4096, 4096, 16, p=0.1)
    assert dropped[:3] == ("seeded", "seeded", "skinny")
    assert dropped.reason.endswith("; dropout")


@pytest.mark.usefixtures("table", "gpu")
def test_a_table_of_even_sizes_says_nothing_of_odd_ones_and_of_float32() -> None:
    assert routes.route(on_gpu_of(8192, torch.bfloat16), 1025, 1024, 16)[:2] == ("addmm", "addmm")
    assert routes.route(on_gpu_of(8192, torch.float32), 1024, 1024, 16)[:3] == ("addmm", "addmm", "skinny")


@pytest.mark.parametrize(
    ("rows", "dtype", "width", "r", "p", "expected", "reason"),
    [
        (8192, torch.bfloat16, 2048, 16, 0.0, ("seeded", "seeded", "skinny"), "the rule"),
        (8192, torch.bfloat16, 4096, 16, 0.0, ("seeded", "seeded", "skinny"), "the rule"),
        (8192, torch.bfloat16, 8192, 16, 0.0, ("addmm", "addmm", "skinny"), "the rule"),
        (8192, torch.bfloat16, 8192, 16, 0.1, ("seeded", "seeded", "skinny"), "; dropout"),
        (8192, torch.bfloat16, 1001, 16, 0.1, ("addmm", "addmm", "skinny"), "the rule"),
        (4096, torch.bfloat16, 1024, 16, 0.0, ("seeded", "seeded", "skinny"), "the rule"),
        (4095, torch.bfloat16, 1024, 16, 0.1, ("addmm", "addmm", "matmul"), "fewer than 4096 rows"),
        (0, torch.bfloat16, 1024, 16, 0.0, ("addmm", "addmm", "matmul"), "fewer than 4096 rows"),
        (8192, torch.float32, 1024, 16, 0.1, ("addmm", "addmm", "skinny"), "float32"),
        (8192, torch.float32, 1024, 65, 0.0, ("addmm", "addmm", "matmul"), "float32"),
        (8192, torch.float64, 1024, 16, 0.0, ("addmm", "addmm", "matmul"), "float64"),
        (8192, torch.bfloat16, 1024, 129, 0.0, ("addmm", "addmm", "matmul"), "rank 129"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_the_rule_stands_where_no_table_does(
    rows: int, dtype: torch.dtype, width: int, r: int, p: float, expected: tuple[str, ...], reason: str
) -> None:
    found = routes.route(on_gpu_of(rows, dtype), width, width, r, p)
    assert found[:3] == expected
    assert reason in found.reason


def test_narrower_products_are_left_to_kernels_before_warp_group_instructions(gpu: SimpleNamespace) -> None:
    gpu.capability = (8, 0)
    assert routes.route(on_gpu_of(8192, torch.bfloat16), 2048, 2048, 16)[:2] == ("seeded", "seeded")
    assert routes.route(on_gpu_of(8192, torch.bfloat16), 4096, 2048, 16)[:2] == ("addmm", "addmm")


def test_a_gpu_before_ampere_and_rocm_take_torch_s_products(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, x = ("addmm", "addmm", "matmul"), on_gpu_of(8192, torch.float16)
    gpu.capability = (7, 5)  # no bf16, and float16 products that spill
    assert routes.route(x, 1024, 1024, 16) == Route(*plain, "compute capability 7.5 is below 8.0")
    assert not routes.runs_kernels(x.device)
    routes.forget()
    gpu.capability = (8, 0)
    assert routes.runs_kernels(x.device)
    assert routes.route(x, 1024, 1024, 16)[:3] == ("seeded", "seeded", "skinny")
    routes.forget()
    monkeypatch.setattr(torch.version, "hip", "6.2")  # whose devices are called cuda, too
    assert routes.route(x, 1024, 1024, 16) == Route(*plain, "no kernels measured on ROCm")


def test_a_cpu_and_a_gpu_without_triton_take_torch_s_products(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ("addmm", "addmm", "matmul")
    assert routes.route(torch.zeros(4, 8), 8, 8, 2) == Route(*plain, "no kernels on cpu")
    monkeypatch.setattr(routes, "has_triton", lambda: False)
    assert routes.route(on_gpu_of(8192, torch.bfloat16), 8, 8, 2) == Route(*plain, "triton is not installed")


def test_a_route_is_looked_up_once_for_all_rows_of_an_octave(gpu: SimpleNamespace) -> None:
    first = routes.route(on_gpu_of(8192, torch.bfloat16), 1024, 1024, 16)
    assert gpu.asked == 1
    assert routes.route(on_gpu_of(16383, torch.bfloat16), 1024, 1024, 16) is first
    assert routes.route(on_gpu_of(8192, torch.bfloat16), 1024, 1024, 16, 0.1) is not first
    assert gpu.asked == 1
    routes.route(on_gpu_of(8192, torch.bfloat16, index=1), 1024, 1024, 16)
    assert gpu.asked == 2  # another device may be another model


def test_the_table_of_an_h200_is_read_and_only_near_what_was_measured(gpu: SimpleNamespace) -> None:
    gpu.name = "NVIDIA H200"
    best = ("seeded", "seeded", "skinny")
    for size in SIZES:
        x = on_gpu_of(size.m, torch.bfloat16)
        assert routes.route(x, size.k, size.n, size.r) == Route(*best, "measured on NVIDIA H200")
    assert routes.route(on_gpu_of(65536, torch.bfloat16), 2048, 8192, 32).reason == "measured on NVIDIA H200"
    few = routes.route(on_gpu_of(4095, torch.bfloat16), 1024, 1024, 16)
    assert few == Route("addmm", "addmm", "matmul", "fewer than 4096 rows, which no table has")
    wide = routes.route(on_gpu_of(8192, torch.bfloat16), 4096, 32000, 16)
    assert wide == Route("addmm", "addmm", "skinny", "no table near this shape: the rule")
    assert routes.route(on_gpu_of(8192, torch.float32), 1024, 1024, 16).reason == "float32"


@pytest.mark.parametrize("path", sorted(routes.TABLES.glob("*.csv")), ids=lambda path: path.stem)
def test_every_table_that_comes_along_is_well_formed(path: Path) -> None:
    lines = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
    assert tuple(lines[0]) == ROUTE_COLUMNS
    assert len(lines) > 1
    for line in lines[1:]:
        assert all(int(side) > 0 for side in line[:4])
        assert line[4] in ("bfloat16", "float16")
        for impl, known in zip(line[5:], IMPLEMENTATIONS.values(), strict=True):
            assert impl in known


@pytest.mark.parametrize("count", [108, 144])
def test_a_strip_has_as_many_programs_as_its_gpu_has_processors(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernels are written in triton")
    from cladapt_kernels import tiles
    from cladapt_kernels.lora import gemm

    grids: list[int] = []

    class Launcher:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            grids.append(*grid)
            return lambda *args, **more: None

    gpu = SimpleNamespace(multi_processor_count=count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(gemm, "_strip", Launcher())
    for remembered in (tiles._processors, tiles._capability):
        monkeypatch.setattr(tiles, remembered.__name__, remembered.__wrapped__)
    with FakeTensorMode():  # tensors of a GPU where there is none
        sizes = ((64, 32), (32, 512 * 128), (4, 32), (4, 512 * 128))  # a block of rows, more of columns than processors
        gemm.strip(*(torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in sizes))
    assert grids == [count]
