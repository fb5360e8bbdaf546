"""Every branch of the linear's kernels on tiles so small that a few rows have many of them: exact orders and places.

What a launcher reads from the device or fixes (processors, groups, limits of rows, tiles) is a parameter here. Where no
GPU is, `observer` tells what the interpreter lets pass, and what launchers allocate has NaN in it and around it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in triton")
import triton
import triton.language as tl

from cladapt_kernels import reference, tiles
from cladapt_kernels.lora import gemm, linear, mask, routes, shrink, skinny
from cladapt_kernels.lora.routes import Gemm, Route

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4}
SMALL_FACTORS = {"BLOCK_M": 16, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2}
SEED, SCALE = 2**40 + 7, 0.5
Poison = Callable[[Tensor], Tensor]

pytestmark = pytest.mark.usefixtures("observer", "outputs")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names, tile in (
        (gemm, ("WIDE", "SQUARE", "SMALL", "NARROW", "EXACT", "EXACT_STRIP"), SMALL),
        (skinny, ("WIDE", "HIGH", "EXACT"), SMALL_FACTORS),
    ):
        for name in names:
            monkeypatch.setattr(module, name, tile)
    for module, name, value in (
        (gemm, "GROUP", 2), (shrink, "BLOCK_M", 16), (skinny, "BLOCK_M", 16), (skinny, "BLOCK_FOLD", 32),
        (skinny, "FEWEST_ROWS", 16), (skinny, "CHUNKS", 3),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


def drawn(device: torch.device, *sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, sizes)))
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def keep(rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    return reference.keep_mask(torch.tensor([SEED], device=device), rows, columns, p).double()


def close(found: Tensor, truth: Tensor, atol: float = 1e-5) -> None:
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=atol)


@triton.jit
def _visit(order, m_tiles, n_tiles, GROUP: tl.constexpr):
    tile_m, tile_n = tiles.grouped_tile(tl.program_id(0), m_tiles, n_tiles, GROUP)
    tl.store(order + 2 * tl.program_id(0), tile_m)
    tl.store(order + 2 * tl.program_id(0) + 1, tile_n)


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 1), (5, 3), (6, 2), (2, 4)])
def test_grouped_order_goes_down_a_group_of_rows_column_by_column(
    rows: int, columns: int, group: int, device: torch.device
) -> None:
    expected = [
        (m, n)
        for first in range(0, rows, group)
        for n in range(columns)
        for m in range(first, min(first + group, rows))
    ]
    found = torch.full((rows * columns, 2), -1, dtype=torch.int32, device=device)
    _visit[(rows * columns,)](found, rows, columns, GROUP=group)
    assert [tuple(pair) for pair in found.tolist()] == expected


@triton.jit
def _addresses(at, found, row, column, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    place = tiles.tile_pointers(at, row, column, row_stride, column_stride, ROWS, COLUMNS)
    own = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(found + own, place.to(tl.int64) - at.to(tl.int64))


@pytest.mark.parametrize(
    ("row", "column", "strides"),
    [(3, 5, (7, 2)), (2**20, 3, (2**13, 1)), (3, 2**20, (1, 2**13)), (2**16, 2**16, (2**15 - 1, 2**15 + 1))],
)
def test_a_tile_of_a_matrix_of_more_than_2_to_the_31_entries_lies_where_it_should(
    row: int, column: int, strides: tuple[int, int], device: torch.device
) -> None:
    found = torch.zeros(4, 8, dtype=torch.int64, device=device)
    _addresses[(1,)](torch.zeros(1, device=device), found, row, column, *strides, ROWS=4, COLUMNS=8)
    expected = [[4 * ((row + i) * strides[0] + (column + j) * strides[1]) for j in range(8)] for i in range(4)]
    assert found.tolist() == expected


@pytest.mark.usefixtures("small")
def test_the_workspace_of_many_chunks_has_more_than_2_to_the_31_entries(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda":
        pytest.skip("on a GPU such a workspace takes 8 GiB")
    from triton.runtime.interpreter import InterpreterBuilder

    places: list[int] = []

    def store(builder: object, place: Any, value: object, *_: object) -> None:
        places.append(int(place.data.flat[0]))

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)  # nothing is written, and none is held
    m, k, n, chunks = 3, 8, 2**30, 3
    sums = torch.zeros(1)
    x, ds = drawn(device, (m, k), (m, 1))
    skinny._partial[(1, chunks)](
        ds, x, ds, x, sums, None, m, k, n, 1, 1, *x.stride(), *x.stride(), 1.0, 0,
        BLOCK_M=16, BLOCK_C=16, BLOCK_R=16, DROPOUT=False,
    )  # fmt: skip
    assert places == [sums.data_ptr() + 4 * chunk * (k + n) for chunk in range(chunks)]


@triton.jit
def _load(matrix, found, row, column, rows, columns, row_stride, column_stride, R: tl.constexpr, C: tl.constexpr):
    own = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(found + own, tiles.load_tile(matrix, row, column, rows, columns, row_stride, column_stride, R, C))


@triton.jit
def _store(matrix, given, row, column, rows, columns, row_stride, column_stride, R: tl.constexpr, C: tl.constexpr):
    own = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tiles.store_tile(matrix, tl.load(given + own), row, column, rows, columns, row_stride, column_stride, R, C)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 8), (4, 0), (4, 8), (8, 16)])
def test_tiles_end_where_the_matrix_ends(
    row: int, column: int, transposed: bool, device: torch.device, guarded: Callable[..., Tensor]
) -> None:
    rows, columns = 6, 13  # no multiples of the tile [4, 8], and one tile lies outside
    strides = (1, rows + 2) if transposed else (columns + 3, 1)
    matrix, written = (guarded((rows, columns), torch.float32, device, strides) for _ in range(2))
    (values,) = drawn(device, (rows, columns))
    matrix.copy_(values)
    found = torch.full((4, 8), float("nan"), device=device)
    _load[(1,)](matrix, found, row, column, rows, columns, *strides, R=4, C=8)
    padded = torch.zeros(12, 24, device=device)
    padded[:rows, :columns] = values
    assert torch.equal(found, padded[row : row + 4, column : column + 8])
    _store[(1,)](written, found, row, column, rows, columns, *strides, R=4, C=8)
    inside = written[row : row + 4, column : column + 8]
    assert torch.equal(inside, values[row : row + 4, column : column + 8])
    assert int((~written.isnan()).sum()) == inside.numel()


@pytest.mark.parametrize(("rows", "columns"), [(33, 22), (5, 3)])
@pytest.mark.parametrize("p", [0.3, 0.7])
def test_the_mask_of_many_tiles_is_that_of_the_reference(
    p: float, rows: int, columns: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask, "TILE", {"BLOCK_M": 16, "BLOCK_N": 8, "num_warps": 4})
    seed = torch.tensor([SEED], device=device)
    assert torch.equal(mask.keep_mask(seed, rows, columns, p, torch.float32).double(), keep(rows, columns, p, device))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("r", "p", "scale"), [(5, 0.0, 1.0), (5, 0.3, 0.5), (17, 0.0, 2.0)])
def test_shrink(
    r: int, p: float, scale: float, device: torch.device, poisoned: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, k = 35, 150  # three blocks of rows, two or three of columns
    x, a = drawn(device, (m, k), (k, r))
    truth = scale * (x.double() * (keep(m, k, p, device) if p else 1.0)) @ a.double()
    close(shrink.shrink(poisoned(x), poisoned(a).T, scale, p, torch.tensor([SEED], device=device)), truth, 5e-5)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize(("p", "biased"), [(0.0, True), (0.3, False)])
def test_seeded_in_any_order_of_tiles(
    p: float, biased: bool, group: int, device: torch.device, poisoned: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "GROUP", group)
    m, k, n, r = 40, 37, 25, 5  # three tiles by two, three steps
    x, w, s, u, bias = drawn(device, (m, k), (n, k), (m, r), (n, r), (n,))
    low = s.double() @ u.double().T * (keep(m, n, p, device) if p else 1.0)
    truth = SCALE * low + x.double() @ w.double().T + (bias.double() if biased else 0.0)
    seed = torch.tensor([SEED], device=device)
    found = gemm.seeded(poisoned(x), poisoned(w).T, s, poisoned(u).T, SCALE, bias if biased else None, p, seed)
    close(found, truth)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("p", "biased"), [(0.0, True), (0.3, False)])
def test_described(
    p: float, biased: bool, transposed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors need compute capability 9.0")
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    monkeypatch.setattr(gemm, "seeded", None)  # nothing is left to it
    m, k, n, r = 40, 40, 24, 5
    x, w, s, u, bias = drawn(device, (m, k), (n, k) if transposed else (k, n), (m, r), (r, n), (n,), dtype=half)
    w = w.T if transposed else w
    low = s.double() @ u.double() * (keep(m, n, p, device) if p else 1.0)
    truth = SCALE * low + x.double() @ w.double() + (bias.double() if biased else 0.0)
    seed = torch.tensor([SEED], device=device)
    found = gemm.described(x, w, s, u, SCALE, bias if biased else None, p, seed)
    assert (found.double() - truth).abs().max() <= torch.finfo(half).eps * truth.abs().max()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("processors", [1, 6, 132])  # all tiles of a block of rows, three and two of them, one each
@pytest.mark.parametrize(("drop_x", "drop_y", "biased"), [(0.0, 0.0, True), (0.3, 0.0, False), (0.0, 0.3, False)])
def test_strips_of_one_tile_and_of_many(
    drop_x: float, drop_y: float, biased: bool, processors: int, device: torch.device, poisoned: Poison,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gemm, "processors", lambda _: processors)
    m, k, n, r = 40, 37, 70, 5  # three blocks of rows, five tiles of columns
    x, w, a, u, bias = drawn(device, (m, k), (n, k), (r, k), (n, r), (n,))
    kept = x.double() * (keep(m, k, drop_x, device) if drop_x else 1.0)
    low = 0.25 * kept @ a.double().T
    term = low @ u.double().T * (keep(m, n, drop_y, device) if drop_y else 1.0)
    truth = SCALE * term + x.double() @ w.double().T + (bias.double() if biased else 0.0)
    seed, own = torch.tensor([SEED], device=device), bias if biased else None
    y, s = gemm.strip(
        poisoned(x), poisoned(w).T, poisoned(a), poisoned(u).T, SCALE, 0.25, own, drop_x, drop_y, seed
    )  # fmt: skip
    close(s, low)
    close(y, truth)


@pytest.mark.parametrize(
    ("name", "few", "capability", "r", "p", "impl"),
    [
        ("SMALL", 2048, 90, 5, 0.0, "seeded"),
        ("WIDE", 0, 90, 5, 0.0, "seeded"),
        ("SQUARE", 0, 80, 5, 0.0, "seeded"),
        ("SQUARE", 0, 90, 65, 0.0, "seeded"),
        ("SQUARE", 0, 90, 5, 0.3, "seeded"),
        ("SQUARE", 0, 90, 5, 0.3, "strip"),
        ("NARROW", 0, 80, 5, 0.0, "strip"),
        ("WIDE", 0, 90, 5, 0.0, "described"),
        ("SQUARE", 0, 90, 5, 0.3, "described"),
    ],
)
def test_every_tile_of_the_tables_is_chosen_and_multiplies(
    name: str, few: int, capability: int, r: int, p: float, impl: Gemm, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if device.type == "cuda":
        pytest.skip("the capability is the GPU's")
    monkeypatch.setattr(gemm, "FEW_ROWS", few)
    monkeypatch.setattr(gemm, "processors", lambda _: 1)
    m, k, n = 136, 72, 264  # two tiles each way of the largest
    x, weight, a, b = drawn(device, (m, k), (n, k), (r, k), (n, r), dtype=torch.float16)
    b *= 0.1
    given = {"seeded": (x, r, p > 0), "strip": (x, False), "described": (x, n, r, p > 0)}[impl]
    with tiles.assuming(capability):
        assert getattr(gemm, f"_{impl}_tile")(*given) is getattr(gemm, name)
        if impl == "strip":
            y, s = gemm.strip(x, weight.T, a, b.T, SCALE, 1.0)
        else:  # the mask is that of the result here, as in the gradient of x
            s = shrink.shrink(x, a)
            y = getattr(gemm, impl)(x, weight.T, s, b.T, SCALE, None, p, torch.tensor([SEED]))
    dropped = keep(m, n, p, device) if p and impl != "strip" else 1.0
    truth = SCALE * dropped * (s.double() @ b.double().T) + x.double() @ weight.double().T
    assert (y.double() - truth).abs().max() <= torch.finfo(torch.float16).eps * truth.abs().max()
    close(s, x.double() @ a.double().T, 2e-2)


def test_fewer_wide_tiles_than_processors_are_square_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(257, 8, dtype=torch.float16)
    for count, expected in ((6, gemm.WIDE), (7, gemm.SQUARE)):  # 3 x 2 tiles
        monkeypatch.setattr(gemm, "processors", lambda _, count=count: count)
        assert gemm._described_tile(x, 257, 8, False) is expected


def parts(device: torch.device, m: int, k: int, n: int, r: int) -> list[Tensor]:
    """dS, X, S, dY."""
    return drawn(device, (m, r), (m, k), (m, r), (m, n))


def factors(given: list[Tensor], p: float) -> tuple[Tensor, Tensor]:
    """dA and dB in float64."""
    ds, x, s, dy = (t.double() for t in given)
    return ds.T @ (x * (keep(*x.shape, p, x.device) if p else 1.0)), SCALE * dy.T @ s


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("k", "n"), [(24, 37), (37, 24)])
def test_skinny(
    k: int, n: int, p: float, device: torch.device, guarded: Callable[..., Tensor], poisoned: Poison
) -> None:  # fmt: skip
    m, r = 70, 5  # three chunks
    given, seed = parts(device, m, k, n, r), torch.tensor([SEED], device=device)
    da, db = (guarded(shape, torch.float32, device) for shape in ((r, k), (n, r)))
    ds, x, s, dy = given
    skinny.skinny(ds, poisoned(x), s, poisoned(dy), SCALE, da, db, p, seed)
    truth = factors(given, p)
    close(da, truth[0])
    close(db, truth[1])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["kl", "l2"])
@pytest.mark.parametrize(("k", "n"), [(24, 37), (37, 24)])
def test_skinny_adds_the_proximal_gradient(
    k: int, n: int, kind: str, device: torch.device, guarded: Callable[..., Tensor]
) -> None:
    m, r = 20, 5
    given = parts(device, m, k, n, r)
    values = drawn(device, (r, k), (n, r))
    anchors = [v + 0.3 * torch.sin(10.0 * v) for v in values]
    lengths = torch.tensor([r * k, n * r], device=device)
    inverse_tau, weight = torch.tensor([0.7, 1.3], device=device), torch.tensor(500.0, device=device)
    value, anchor = (torch.cat([t.reshape(-1) for t in pair]) for pair in (values, anchors))
    exact, fixed = value.double(), anchor.double()
    scaled = fixed * reference.group_expand(inverse_tau.double(), lengths, len(fixed))
    q = reference.group_softmax(scaled, lengths)
    statistics = reference.proximal_statistics(
        exact, fixed, q, lengths, inverse_tau.double(), weight.double()
    ).float()  # fmt: skip
    if kind == "kl":
        _, pull = reference.proximal_kl(exact, fixed, q, lengths, inverse_tau.double())
    else:
        _, pull = reference.proximal_l2(exact, fixed, lengths)
    rows = torch.full((2, 8), float("nan"), device=device)
    rows[:, :6] = statistics
    da, db = (guarded(tuple(t.shape), torch.float32, device) for t in values)
    term = skinny.Proximal(kind, *values, *anchors, rows[:, :6])
    skinny.skinny(*given, SCALE, da, db, proximal=term)
    split = (500.0 * pull).split([r * k, n * r])
    for found, task, own in zip((da, db), factors(given, 0.0), split, strict=True):
        assert own.abs().max() > 0.5  # it shows
        close(found, task + own.view(task.shape), 2e-5)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("processors", [2, 8, 14])  # chunks: one, three, five of which the last four-fold is not full
def test_single_folds_any_number_of_chunks(
    processors: int, p: float, device: torch.device, guarded: Callable[..., Tensor], poisoned: Poison,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(skinny, "processors", lambda _: processors)
    m, k, n, r = 70, 24, 37, 5
    given, seed = parts(device, m, k, n, r), torch.tensor([SEED], device=device)
    da, db = (guarded(shape, torch.float32, device) for shape in ((r, k), (n, r)))
    ds, x, s, dy = given
    for _ in range(2):  # with the counters that the first left
        skinny.single(ds, poisoned(x), s, poisoned(dy), SCALE, da, db, p, seed)
        assert not skinny.counters(device, 5).any()
        truth = factors(given, p)
        close(da, truth[0])
        close(db, truth[1])


ROWS, WIDTH_IN, WIDTH_OUT, RANK = 40, 32, 48, 5
SKINNY, SINGLE = {"_partial", "_fold"}, {"_single"}


@pytest.mark.usefixtures("dispatched", "small")
@pytest.mark.parametrize(
    ("by", "table", "widest", "exact", "p", "forward", "backward"),
    [
        pytest.param(by, *rest, id=f"{name}, {by}")
        for name, impls, *rest in (
            ("rule", ("op", "eager"), "", 2048, False, 0.0, {"_shrink", "_seeded"}, {"_shrink", "_seeded", *SKINNY}),
            ("rule, wide", ("op",), "", 16, False, 0.0, set(), SKINNY),
            ("rule, dropout", ("op", "compiled"), "", 16, False, 0.3, {"_shrink", "_seeded"},
             {"_shrink", "_seeded", *SKINNY}),
            ("rule, float32", ("op",), "", 2048, True, 0.3, {"_mask"}, {"_mask", *SKINNY}),
            ("strip", ("op",), "strip,strip,single", 16, False, 0.3, {"_strip"}, {"_strip", *SINGLE}),
            ("described", ("op",), "described,described,matmul", 16, False, 0.0, {"_shrink", "_described"},
             {"_shrink", "_described"}),
        )
        for by in impls
    ],
)  # fmt: skip
def test_the_dispatcher_s_choice_runs_below_the_registered_op(
    by: str, table: str, widest: int, exact: bool, p: float, forward: set[str], backward: set[str],
    device: torch.device, within_budget: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    launches: Callable[[], set[str]], tmp_path: Path,
) -> None:  # fmt: skip
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    dtype = torch.float32 if exact else half
    if table:
        (tmp_path / "interpreted.csv").write_text(
            f"m,k,n,r,dtype,forward,dx,factors\n{ROWS},{WIDTH_IN},{WIDTH_OUT},{RANK},{str(half)[6:]},{table}\n"
        )
    monkeypatch.setattr(routes, "TABLES", tmp_path)
    monkeypatch.setattr(routes, "WIDEST", {True: widest})
    monkeypatch.setattr(gemm, "processors", lambda _: 6)
    x, weight, bias, dy = drawn(device, (ROWS, WIDTH_IN), (WIDTH_OUT, WIDTH_IN), (WIDTH_OUT,), (ROWS, WIDTH_OUT),
                                dtype=dtype)  # fmt: skip
    a, b = drawn(device, (RANK, WIDTH_IN), (WIDTH_OUT, RANK))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    seed = torch.tensor([SEED], device=device)
    chosen = routes.route(x, WIDTH_IN, WIDTH_OUT, RANK, p)
    assert isinstance(chosen, Route)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if by == "op":
            return torch.ops.cladapt.lora_linear(x, weight, bias, a, b, SCALE / (1 - p), p, seed)[0]
        return linear.lora_linear(x, weight, bias, a, b, SCALE, p, seed)

    y = (torch.compile(run, backend="aot_eager", fullgraph=True) if by == "compiled" else run)(*leaves)
    assert launches() == forward
    grads = torch.autograd.grad(y, leaves, dy)
    assert launches() == backward
    kept = keep(ROWS, WIDTH_IN, p, device) if p else None

    def expected(dtype: torch.dtype, sign: Callable[[Tensor], Tensor]) -> list[Tensor]:
        given = [sign(t.detach()).to(dtype) for t in (x, weight, bias, a, b, dy)]
        own = None if kept is None else kept.to(dtype)
        y = reference.lora_linear(*given[:5], SCALE / (1 - p), own)
        rest = reference.lora_linear_backward(given[5], *given[:2], *given[3:5], SCALE / (1 - p), own)
        return [y, *rest]

    truth, plain = expected(torch.float64, lambda t: t), expected(dtype, lambda t: t)
    sizes = expected(torch.float64, torch.abs)
    for name, found, right, other, size in zip(("y", "dx", "da", "db"), (y, *grads), truth, plain, sizes, strict=True):
        within_budget(name, found.detach(), right, other.to(found.dtype), size)
