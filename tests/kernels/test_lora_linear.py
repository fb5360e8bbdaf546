"""The LoRA linear by every route, against float64: values, gradients, dropout, odd shapes, registration."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cladapt_kernels import reference, tiles
from cladapt_kernels.lora import linear as op
from cladapt_kernels.lora.linear import backward_by, forward_by, lora_linear, lora_linear_dequantised
from cladapt_kernels.lora.routes import Factors, Route

pytest.importorskip("triton", reason="the kernels are written in triton")
from cladapt_kernels.descriptors import describable
from cladapt_kernels.lora import gemm, shrink, skinny
from cladapt_kernels.tiles import assuming

IMPLEMENTATIONS = ("addmm", "seeded", "strip")
FACTORS: dict[str, Factors] = {"addmm": "matmul", "described": "single"}  # "skinny" with all else
SCALE = 0.5
ON_GPU = torch.cuda.is_available()
# on a GPU each shape compiles some 40 kernels, a second each: two ranks are quick there, the others slow
OTHERS = pytest.mark.slow if ON_GPU else ()
SHAPES = [  # M, K, N, r
    pytest.param((63, 70, 90, 5), id="63-70-90-5"),
    pytest.param((100, 33, 17, 33), id="100-33-17-33"),
    pytest.param((0, 24, 40, 4), id="0-24-40-4"),
    pytest.param((1, 16, 16, 1), id="1-16-16-1", marks=OTHERS),
    pytest.param((130, 64, 200, 8), id="130-64-200-8", marks=OTHERS),
]
Check = Callable[..., None]


@dataclass
class Case:
    """Inputs of one call and their copies in float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    dy: Tensor
    seed: Tensor

    def truth(self, p: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Y, dX, dA, dB by the reference in `dtype`."""
        keep = reference.keep_mask(self.seed, *self.x.shape, p) if p else None
        bias = None if self.bias is None else self.bias.to(dtype)
        x, weight, a, b, dy = (t.to(dtype) for t in (self.x, self.weight, self.a, self.b, self.dy))
        scale = SCALE / (1 - p)
        y = reference.lora_linear(x, weight, bias, a, b, scale, keep)
        return y, *reference.lora_linear_backward(dy, x, weight, a, b, scale, keep)


def absolute(case: Case) -> Case:
    """The same sizes without signs: what a sum's order may cost."""
    return Case(**{name: None if t is None else t.abs() for name, t in vars(case).items()})


def make(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, factors: torch.dtype, bias: bool = True
) -> Case:
    m, k, n, r = shape
    generator = torch.Generator().manual_seed(m + k + n + r)

    def draw(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, of)

    seed = torch.tensor([2**40 + 12345], device=device)
    beside = draw(n) if bias else None
    return Case(draw(m, k), draw(n, k), beside, draw(r, k, of=factors), draw(n, r, of=factors), draw(m, n), seed)


def check_implementation(
    case: Case, impl: str, p: float, within_budget: Check, poisoned: Callable[[Tensor], Tensor]
) -> None:
    """Y, dX, dA and dB by this implementation are as near to float64 as torch is at the same dtype."""
    x, dy = poisoned(case.x), poisoned(case.dy)
    scale = SCALE / (1 - p)
    y, s = forward_by(impl, x, case.weight, case.bias, case.a, case.b, scale, p, case.seed)
    chosen = Route(impl, impl, FACTORS.get(impl, "skinny"), "asked for")
    grads = backward_by(chosen, dy, x, case.weight, case.a, case.b, s, scale, p, case.seed)
    results = zip((y, *grads), case.truth(p), case.truth(p, x.dtype), absolute(case).truth(p), strict=True)
    named = dict(zip(("y", "dx", "da", "db"), results, strict=True))
    for name in ("dx", "da", "db", "y"):
        found, truth, other, size = named[name]
        within_budget(f"{impl} {x.dtype} {name}", found, truth, other.to(found.dtype), size)


@pytest.mark.skipif(not ON_GPU, reason="full tiles, groups and strips of a real size need a GPU")
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "described"])
@pytest.mark.parametrize(("dtype", "r"), [(torch.bfloat16, 16), (torch.float32, 8)], ids=str)
def test_every_implementation_at_a_real_size_is_as_near_to_float64_as_torch(
    dtype: torch.dtype, r: int, impl: str, p: float, device: torch.device,
    within_budget: Check, poisoned: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    case = make((8200, 1040, 3088, r), dtype, device, torch.float32)
    check_implementation(case, impl, p, within_budget, poisoned)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_implementation_is_as_near_to_float64_as_torch(
    shape: tuple[int, int, int, int],
    impl: str,
    p: float,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    within_budget: Check,
    poisoned: Callable[[Tensor], Tensor],
) -> None:
    for dtype in dtypes:
        if impl == "addmm" and dtype == torch.float16 and device.type == "cpu":
            continue
        for factors in (torch.float32, dtype):
            check_implementation(make(shape, dtype, device, factors), impl, p, within_budget, poisoned)


@pytest.mark.skipif(
    ON_GPU and torch.cuda.get_device_capability() < (9, 0), reason="descriptors need compute capability 9.0"
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_tiles_by_descriptors_are_as_near_to_float64_as_torch(
    p: float, device: torch.device, dtypes: tuple[torch.dtype, ...], within_budget: Check,
    poisoned: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if not ON_GPU:  # several tiles each way, groups of two, steps beyond the end
        small = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4}
        monkeypatch.setattr(gemm, "_described_tile", lambda *_, **__: small)
        monkeypatch.setattr(gemm, "GROUP", 2)
        monkeypatch.setattr(skinny, "FEWEST_ROWS", 16)
    monkeypatch.setattr(gemm, "seeded", None)  # nothing is left to it
    case = make((100, 72, 136, 5), dtypes[1], device, torch.float32)
    check_implementation(case, "described", p, within_budget, poisoned)


def test_what_the_copy_engine_cannot_read_goes_by_pointers(device: torch.device) -> None:
    good = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert describable(good, torch.zeros(8, 128, dtype=torch.bfloat16)[:, :40])
    for name, bad in {
        "float32": good.float(),
        "a column of stride 2": torch.zeros(8, 128, dtype=torch.bfloat16)[:, ::2],
        "transposed": torch.zeros(64, 8, dtype=torch.bfloat16).T,
        "rows of 130 bytes": torch.zeros(8, 65, dtype=torch.bfloat16)[:, :64],
        "a start off 16 bytes": torch.zeros(8, 72, dtype=torch.bfloat16)[:, 1:65],
        "one row, expanded": torch.zeros(1, 64, dtype=torch.bfloat16).expand(8, 64),
        "no rows": torch.zeros(0, 64, dtype=torch.bfloat16),
    }.items():
        assert not describable(bad), name
        assert not describable(good, bad), name
    with assuming(80):
        assert not describable(good)
    case = make((20, 24, 39, 4), torch.float32, device, torch.float32)
    y, _ = forward_by("described", case.x, case.weight, case.bias, case.a, case.b, SCALE)
    expected, _ = forward_by("seeded", case.x, case.weight, case.bias, case.a, case.b, SCALE)
    assert torch.equal(y, expected)


def test_kernels_are_launched_on_the_device_of_their_tensors(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # triton launches on the current device, which with several GPUs may be another
    case = make((20, 24, 40, 4), torch.float32, device, torch.float32)
    inside: list[int] = []
    launched: list[str] = []
    guarded = tiles.on_device_of

    @contextmanager
    def on_device_of(tensor: Tensor) -> Iterator[None]:
        with guarded(tensor):
            inside.append(1)
            yield
            inside.pop()

    def watched(name: str, ordinary: Callable[..., Any], *args: Any, **more: Any) -> Any:
        assert inside, name
        launched.append(name)
        return ordinary(*args, **more)

    for module, names in ((gemm, ("seeded", "strip")), (shrink, ("shrink",)), (skinny, ("skinny", "single"))):
        for name in names:
            monkeypatch.setattr(module, name, partial(watched, name, getattr(module, name)))
    monkeypatch.setattr(tiles, "on_device_of", on_device_of)
    for impl, factors in (("seeded", "skinny"), ("strip", "single")):
        _, s = forward_by(impl, case.x, case.weight, None, case.a, case.b, SCALE)
        chosen = Route(impl, impl, factors, "asked for")
        backward_by(chosen, case.dy, case.x, case.weight, case.a, case.b, s, SCALE)
    assert {*launched} == {"seeded", "strip", "shrink", "skinny", "single"}


def test_without_a_gradient_of_x_only_the_factors_are_computed(device: torch.device) -> None:
    case = make((20, 24, 40, 4), torch.float32, device, torch.float32)
    for impl in IMPLEMENTATIONS:
        chosen = Route(impl, impl, "skinny", "asked for")
        _, s = forward_by(impl, case.x, case.weight, None, case.a, case.b, SCALE)
        dx, da, db = backward_by(chosen, case.dy, case.x, case.weight, case.a, case.b, s, SCALE, need_dx=False)
        assert dx is None
        torch.testing.assert_close(da.double(), case.truth(0.0)[2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(db.double(), case.truth(0.0)[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(33, 130), (5, 3), (0, 8)])
def test_the_mask_in_memory_is_that_of_the_reference(rows: int, columns: int, device: torch.device) -> None:
    from cladapt_kernels.lora.mask import keep_mask

    seed = torch.tensor([2**40 + 77], device=device)
    expected = reference.keep_mask(seed, rows, columns, 0.3)
    assert torch.equal(keep_mask(seed, rows, columns, 0.3, torch.float32), expected.float())


def test_the_mask_is_philox_and_its_share_is_p() -> None:
    # known answers of Salmon et al., philox4x32-10: key 0, counter 0
    seed = torch.tensor([0])
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for column, word in enumerate(words):
        edge = (word >> 8) / 2**24
        assert reference.keep_mask(seed, 1, 4, edge)[0, column]
        assert not reference.keep_mask(seed, 1, 4, edge + 2**-24)[0, column]
    kept = reference.keep_mask(torch.tensor([5]), 500, 401, 0.1).double().mean().item()
    assert abs(kept - 0.9) < 4 * (0.09 / 200_500) ** 0.5
    assert not torch.equal(reference.keep_mask(torch.tensor([5]), 9, 9, 0.5), reference.keep_mask(seed, 9, 9, 0.5))


def inputs(p: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    case = make((6, 10, 12, 5), dtype, device, dtype)
    for tensor in (case.x, case.a, case.b):
        tensor.requires_grad_()
    return case.x, case.weight, case.bias, case.a, case.b, case.seed  # type: ignore[return-value]


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_op_passes_gradcheck_in_float64_and_torch_s_own_checks(p: float, device: torch.device) -> None:
    x, weight, bias, a, b, seed = inputs(p, torch.float64, device)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, SCALE, p, seed), (x, a, b))
    keep = reference.keep_mask(seed, 6, 10, p) if p else None
    truth = reference.lora_linear(x, weight, bias, a, b, SCALE / (1 - p), keep)
    torch.testing.assert_close(lora_linear(x, weight, bias, a, b, SCALE, p, seed), truth, rtol=1e-12, atol=1e-12)
    torch.library.opcheck(torch.ops.cladapt.lora_linear, (x, weight, bias, a, b, SCALE, p, seed))


def test_leading_dimensions_strides_and_an_empty_batch(device: torch.device) -> None:
    x, weight, bias, a, b, _ = inputs(0.0, torch.float64, device)
    wide = torch.stack([x, x + 1], dim=1).transpose(0, 1)  # [2, 6, 10], not contiguous
    found = lora_linear(wide, weight, bias, a, b, SCALE)
    torch.testing.assert_close(found[1], lora_linear(x + 1, weight, bias, a, b, SCALE))
    empty = torch.zeros(3, 0, 10, dtype=torch.float64, device=device, requires_grad=True)
    lora_linear(empty, weight, bias, a, b, SCALE).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (3, 0, 10)
    assert a.grad is not None
    assert a.grad.abs().max() == 0


def test_the_same_seed_gives_the_same_mask_when_a_checkpoint_computes_again(device: torch.device) -> None:
    x, weight, bias, a, b, seed = inputs(0.5, torch.float64, device)

    def run(x: Tensor) -> Tensor:
        return lora_linear(x, weight, bias, a, b, SCALE, 0.5, seed)

    plain = torch.autograd.grad(run(x).square().sum(), (x, a, b))
    again = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    for one, two in zip(plain, torch.autograd.grad(again.square().sum(), (x, a, b)), strict=True):
        assert torch.equal(one, two)


def test_autocast_casts_x_and_weight_and_leaves_the_factors_their_precision(device: torch.device) -> None:
    x, weight, bias, a, b, _ = inputs(0.0, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = lora_linear(x, weight, bias, a, b, SCALE)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert {x.grad.dtype, a.grad.dtype, b.grad.dtype} == {torch.float32}  # type: ignore[union-attr]
    exact = lora_linear(x, weight, bias, a, b, SCALE)
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.1)


def test_compile_traces_through_the_op(device: torch.device) -> None:
    x, weight, bias, a, b, _ = inputs(0.0, torch.float32, device)
    traced = torch.compile(lambda x: lora_linear(x, weight, bias, a, b, SCALE), backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(x), lora_linear(x, weight, bias, a, b, SCALE))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_quantised_weight_is_made_for_each_pass_and_never_saved(p: float, device: torch.device) -> None:
    x, weight, bias, a, b, seed = inputs(p, torch.float64, device)
    made, saved = [], []

    def dequantise() -> Tensor:
        made.append(weight.clone())
        return made[-1]

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = lora_linear_dequantised(x.view(2, 3, 10), dequantise, bias, a, b, SCALE, p, seed)
    assert (12, 10) not in saved
    assert len(saved) >= 4
    expected = lora_linear(x.view(2, 3, 10), weight, bias, a, b, SCALE, p, seed)
    assert torch.equal(y, expected)
    ours, truth = (torch.autograd.grad(out.square().sum(), (x, a, b)) for out in (y, expected))
    assert len(made) == 2
    for one, two in zip(ours, truth, strict=True):
        assert torch.equal(one, two)


def test_float64_stays_under_autocast_as_in_torch(device: torch.device) -> None:
    x, weight, bias, a, b, _ = inputs(0.0, torch.float64, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = lora_linear(x, weight, bias, a, b, SCALE)
    assert torch.equal(y, lora_linear(x, weight, bias, a, b, SCALE))


def test_a_backward_pass_under_autocast_keeps_the_precision_of_its_forward_pass(device: torch.device) -> None:
    x, weight, bias, a, b, seed = inputs(0.25, torch.float32, device)
    expected = torch.autograd.grad(lora_linear(x, weight, bias, a, b, SCALE, 0.25, seed).sum(), (x, a, b))
    loss = lora_linear(x, weight, bias, a, b, SCALE, 0.25, seed).sum()
    with torch.autocast(device.type, torch.bfloat16):
        found = torch.autograd.grad(loss, (x, a, b))
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("quantised", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantised_weight_and_its_bias_take_autocast_s_dtype(quantised: torch.dtype, device: torch.device) -> None:
    x, weight, bias, a, b, _ = inputs(0.0, torch.float32, device)  # x in float32: norms are kept so
    stored = weight.to(quantised)
    with torch.autocast(device.type, torch.bfloat16):
        expected = lora_linear(x, weight, bias, a, b, SCALE)
        y = lora_linear_dequantised(x, lambda: stored, bias, a, b, SCALE)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    ours, theirs = (torch.autograd.grad(out.float().sum(), (x, a, b)) for out in (y, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)


def by_kernels(monkeypatch: pytest.MonkeyPatch, impl: str = "seeded") -> None:
    """Route everything to the kernels, on any device."""
    monkeypatch.setattr(op, "route", lambda *_: Route(impl, impl, "skinny", "asked for"))  # type: ignore[arg-type]


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "op"])
def test_kernels_run_below_autograd_and_the_registered_op_on_transposed_factors(
    traced: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make((20, 24, 40, 4), torch.float32, device, torch.float32)
    x, a, b = (t.clone().requires_grad_() for t in (case.x, case.a.T.contiguous(), case.b.T.contiguous()))
    by_kernels(monkeypatch)
    if traced:
        y, _ = torch.ops.cladapt.lora_linear(x, case.weight, case.bias, a.T, b.T, SCALE / 0.7, 0.3, case.seed)
    else:
        y = lora_linear(x, case.weight, case.bias, a.T, b.T, SCALE, 0.3, case.seed)
    dx, da, db = torch.autograd.grad(y, (x, a, b), case.dy)
    for found, truth in zip((y, dx, da.T, db.T), case.truth(0.3), strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)


def test_fake_tensors_of_transposed_factors_have_the_strides_of_real_ones(device: torch.device) -> None:
    x, weight, bias, a, b, _ = inputs(0.0, torch.float64, device)
    a, b = (t.detach().T.contiguous().T.requires_grad_() for t in (a, b))
    torch.library.opcheck(torch.ops.cladapt.lora_linear, (x, weight, bias, a, b, SCALE, 0.0, None))


@pytest.mark.parametrize("impl", ["addmm", "seeded"])
def test_fake_gradients_of_transposed_factors_have_the_strides_of_real_ones(
    impl: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float64 if impl == "addmm" else torch.float32
    case = make((6, 10, 12, 5), dtype, device, dtype)
    a, b = (t.T.contiguous().T for t in (case.a, case.b))
    if impl != "addmm":
        by_kernels(monkeypatch, impl)
    # a check of the forward op compares no strides of its gradients
    given = (case.dy, case.x, case.weight, a, b, case.x @ a.T, SCALE, 0.0, None, True, True, True)
    torch.library.opcheck(torch.ops.cladapt.lora_linear_backward, given, test_utils="test_faketensor")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_what_nobody_asked_for_is_neither_computed_nor_kept(
    impl: str, wanted: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make((20, 24, 40, 4), torch.float32, device, torch.float32)
    if impl != "addmm":
        by_kernels(monkeypatch, impl)
    trained = [case.x, case.a, case.b]
    for i in wanted:
        trained[i].requires_grad_()
    saved: list[tuple[int, ...]] = []
    products = Products()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = lora_linear(case.x, case.weight, case.bias, case.a, case.b, SCALE)
    assert ((20, 24) in saved) == (1 in wanted)  # X, for dA alone
    assert ((20, 4) in saved) == (2 in wanted)  # S, for dB alone
    with products:
        grads = torch.autograd.grad(y, [trained[i] for i in wanted], case.dy)
    made = {"dx": (20, 24), "da": (4, 24), "db": (40, 4)}
    if impl == "addmm":  # the interpreter of kernels copies what it reads
        assert {name for name, shape in made.items() if shape in products.shapes} == {list(made)[i] for i in wanted}
    for i, found in zip(wanted, grads, strict=True):
        torch.testing.assert_close(found.double(), case.truth(0.0)[1 + i].detach(), rtol=1e-4, atol=1e-4)


class Products(TorchDispatchMode):
    """Shapes of all that torch computes or allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        # a transposed or detached view is no computation
        if isinstance(found, Tensor) and not func.is_view:
            self.shapes.add(tuple(found.shape))
        return found


def test_a_second_derivative_is_an_error_and_a_graph_of_first_ones_is_not(device: torch.device) -> None:
    x, weight, bias, a, b, _ = inputs(0.0, torch.float64, device)
    dx, da, db = torch.autograd.grad(
        lora_linear(x, weight, bias, a, b, SCALE).square().sum(), (x, a, b), create_graph=True
    )
    assert da.isfinite().all()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (dx.sum() + da.sum() + db.sum()).backward()


def test_fake_tensors_see_the_op_and_not_its_route(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    by_kernels(monkeypatch)
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in inputs(0.0, torch.float32, device)[:5]]
        y = lora_linear(*fakes, SCALE)  # type: ignore[arg-type]
    assert y.shape == (6, 12)
    assert y.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(5, 11)}, r"a is \(5, 11\), expected \(5, 10\) for weight \(12, 10\)"),
        ({"x": torch.zeros(6, 9)}, r"x is \(6, 9\), expected \(6, 10\)"),
        ({"b": torch.zeros(12, 4)}, r"b is \(12, 4\), expected \(12, 5\)"),
        ({"bias": torch.zeros(10)}, r"bias is \(10,\), expected \(12,\)"),
        ({"a": torch.zeros(0, 10), "b": torch.zeros(12, 0)}, "rank 0"),
        ({"weight": torch.zeros(12, 10, requires_grad=True)}, "must be frozen"),
        ({"p": 1.0}, r"dropout p=1\.0, expected 0 <= p < 1"),
        ({"p": 0.1}, r"dropout p=0\.1 without a seed"),
        ({"frozen": (torch.zeros(3, 9), torch.zeros(12, 3))}, r"frozen a is \(3, 9\), expected \(3, 10\)"),
        ({"frozen": (torch.zeros(3, 10), torch.zeros(12, 2))}, r"frozen b is \(12, 2\), expected \(12, 3\)"),
        ({"frozen": (torch.zeros(3, 10, requires_grad=True), torch.zeros(12, 3))}, "frozen a requires a gradient"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "x": torch.zeros(6, 10),
        "weight": torch.zeros(12, 10),
        "bias": None,
        "a": torch.zeros(5, 10),
        "b": torch.zeros(12, 5),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        lora_linear(**{**given, **change})  # type: ignore[arg-type]


def test_the_mask_is_written_on_the_device_of_its_seed(device: torch.device, launched_inside: list[str]) -> None:
    from cladapt_kernels.lora.mask import keep_mask

    keep_mask(torch.tensor([77], device=device), 5, 3, 0.3, torch.float32)
    assert launched_inside == ["_mask"]
