"""Routes: the table that measured rows make, how the dispatcher reads it, and the rule where there is none."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cladapt_kernels import routes
from cladapt_kernels.registry import SIZES, WAYS, write_routes
from cladapt_kernels.routes import Route
from cladapt_kernels.timing import COLD, HOT, Row

GPU = "Some Maker G9"
FASTEST = {1024: ("strip", "seeded", "skinny"), 2048: ("seeded", "strip", "matmul"), 4096: ("addmm", "addmm", "skinny")}


def rows() -> list[Row]:
    """For each width its own fastest ways when L2 is cold; hot, and by the ratio, other ways."""
    made: list[Row] = []
    for size in SIZES:
        for part, fastest in zip(WAYS, FASTEST[size.k], strict=True):
            for way in WAYS[part]:
                common = {"name": f"lora_linear {part}", "shape": str(size), "provider": way}
                cold = 10.0 if way == fastest else 11.0
                made.append({**common, "metric": f"time{COLD}", "unit": "us", "q50": cold})
                made.append({**common, "metric": f"time{HOT}", "unit": "us", "q50": 20.0 - cold})
                made.append({**common, "metric": f"time over 'addmm'{COLD}", "unit": "ratio", "q50": 20.0 - cold})
    return made


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The table of made-up rows, in a folder of its own."""
    monkeypatch.setattr(routes, "TABLES", tmp_path / "routes")
    routes._table.cache_clear()
    yield write_routes(rows(), GPU, routes.TABLES)
    routes._table.cache_clear()


def test_the_table_holds_the_fastest_way_of_every_part_with_cold_l2(table: Path) -> None:
    assert table.name == "some-maker-g9.csv"
    assert table.read_text().splitlines() == [
        "m,k,n,r,dtype,forward,dx,factors",
        "8192,1024,1024,16,bfloat16,strip,seeded,skinny",
        "8192,2048,2048,16,bfloat16,seeded,strip,matmul",
        "8192,4096,4096,16,bfloat16,addmm,addmm,skinny",
        "8192,1024,3072,16,bfloat16,strip,seeded,skinny",
    ]
    found = routes._table(GPU, "bfloat16")
    assert set(found) == set(SIZES)
    assert found[8192, 2048, 2048, 16] == Route("seeded", "strip", "matmul", f"measured on {GPU}")
    assert routes._table(GPU, "float16") == {}


@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((8000, 1024, 1000, 8), 1024),
        ((100, 2048, 2048, 32), 2048),
        ((10**6, 9000, 3000, 1), 4096),
        ((0, 1, 1, 1), 1024),
    ],
)
def test_a_shape_takes_the_ways_of_the_nearest_one(table: Path, shape: tuple[int, int, int, int], width: int) -> None:
    found = routes._nearest(GPU, "bfloat16", *shape)
    assert found is not None
    assert found[:3] == FASTEST[width]


def x_on_gpu(rows: int, k: int, dtype: torch.dtype) -> Any:
    """What the dispatcher asks of a tensor on a GPU."""
    size = torch.finfo(dtype).bits // 8
    return SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype, shape=(rows, k), element_size=lambda: size)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with that GPU and triton."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    monkeypatch.setattr(routes, "has_triton", lambda: True)


@pytest.mark.usefixtures("table", "on_gpu")
def test_the_dispatcher_follows_the_table_of_its_gpu_and_dtype() -> None:
    assert routes.route(x_on_gpu(8192, 1024, torch.bfloat16), 1024, 16)[:3] == FASTEST[1024]
    other = routes.route(x_on_gpu(8192, 1024, torch.float16), 1024, 16)
    assert other == Route("seeded", "seeded", "skinny", "no table of this GPU: the rule for shapes")
    dropped = routes.route(x_on_gpu(8192, 4096, torch.bfloat16), 4096, 16, p=0.1)
    assert dropped[:3] == ("seeded", "seeded", "skinny")
    assert dropped.reason.endswith("; dropout")


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("dtype", "k", "r", "expected", "reason"),
    [
        (torch.bfloat16, 2048, 16, ("seeded", "seeded", "skinny"), "the rule"),
        (torch.bfloat16, 4096, 16, ("addmm", "addmm", "skinny"), "the rule"),
        (torch.float32, 1024, 16, ("addmm", "addmm", "skinny"), "the rule"),
        (torch.float64, 1024, 16, ("addmm", "addmm", "matmul"), "float64"),
        (torch.bfloat16, 1024, 129, ("addmm", "addmm", "matmul"), "rank 129"),
    ],
)
def test_the_rule_stands_where_no_table_does(
    dtype: torch.dtype, k: int, r: int, expected: tuple[str, ...], reason: str
) -> None:
    found = routes.route(x_on_gpu(8192, k, dtype), k, r)
    assert found[:3] == expected
    assert reason in found.reason


def test_a_cpu_and_a_gpu_without_triton_take_torch_s_products(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ("addmm", "addmm", "matmul")
    assert routes.route(torch.zeros(4, 8), 8, 2) == Route(*plain, "no kernels on cpu")
    monkeypatch.setattr(routes, "has_triton", lambda: False)
    assert routes.route(x_on_gpu(4, 8, torch.bfloat16), 8, 2) == Route(*plain, "triton is not installed")
