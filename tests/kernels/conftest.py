"""How kernels are judged: the device, the dtypes, the budget of errors, buffers that tell who touched them."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch import Tensor

GUARD = 64


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """The interpreter patches triton's language at every call of a function; once a launch takes a third less time."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    ordinary, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()

    def launch(grid: Any, *args: Any, **more: Any) -> Any:
        patched.clear()
        return ordinary(grid, *args, **more)

    def patch_once(function: Any) -> Any:
        own = id(function.__globals__)
        if own not in patched:
            patched.add(own)
            return patch(function)

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang = patch_once


@pytest.fixture
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def dtypes() -> tuple[torch.dtype, ...]:
    """What kernels are tested in: bf16 on a GPU, float16 where the interpreter would multiply bf16 wrongly."""
    return (torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16)


def error_of(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest and root mean square error."""
    error = found.double() - truth
    return error.abs().max().item(), error.square().mean().sqrt().item()


@pytest.fixture
def within_budget() -> Callable[..., None]:
    """Fails where a kernel is further from the float64 truth than `times` what torch is at the same dtype.

    Free are two units in the last place of the largest value, since torch may be exact where a kernel rounds once, and
    four float32 units of `size`, the same expression of absolute values, since another order of a sum is no error.
    """

    def check(
        name: str, found: Tensor, truth: Tensor, torch_result: Tensor, size: Tensor | None = None, times: float = 2.0
    ) -> None:
        assert found.shape == truth.shape, f"{name} is {tuple(found.shape)}, expected {tuple(truth.shape)}"
        assert found.dtype == torch_result.dtype, f"{name} is {found.dtype}, expected {torch_result.dtype}"
        if truth.numel() == 0:
            return
        assert found.isfinite().all(), f"{name} has {int((~found.isfinite()).sum())} values that are not finite"
        free = 2 * torch.finfo(found.dtype).eps * truth.abs().max().item()
        free += 0.0 if size is None else 4 * torch.finfo(torch.float32).eps * size.max().item()
        ours, theirs = error_of(found, truth), error_of(torch_result, truth)
        for kind, own, other in zip(("largest", "mean square"), ours, theirs, strict=True):
            limit = times * other + free
            assert own <= limit, f"{name}: {kind} error {own:.3g}, budget {limit:.3g} ({times} x torch's {other:.3g})"

    return check


@pytest.fixture
def poisoned() -> Callable[[Tensor], Tensor]:
    """A tensor's values inside a larger buffer of NaN, not contiguous: what is read around them shows in the result."""

    def make(tensor: Tensor) -> Tensor:
        rows, columns = tensor.shape
        buffer = torch.full((rows + 2, columns + GUARD), float("nan"), dtype=tensor.dtype, device=tensor.device)
        view = buffer[1 : rows + 1, GUARD // 2 : GUARD // 2 + columns]
        return view.copy_(tensor)

    return make


class Guarded:
    """Buffers of NaN around the views that kernels write: nothing but the views may change.

    Each buffer has its own NaN, so that the poison of one that is copied to another shows as well.
    """

    BAND = 4096
    BITS: ClassVar = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []
        self.bands: list[tuple[int, int]] = []
        """Addresses around the views, first and one beyond the last."""

    def __call__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strides: tuple[int, ...] | None = None
    ) -> Tensor:
        """A view of NaN of this shape, contiguous unless strides are given, its start aligned as an allocation's."""
        strides = torch.empty(shape, device="meta").stride() if strides is None else strides
        extent = 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
        buffer = torch.full((extent + 2 * self.BAND,), float("nan"), dtype=dtype, device=device)
        bits = buffer.view(self.BITS[buffer.element_size()])
        bits += 1 + len(self._held) % 60
        outside = torch.ones(buffer.shape, dtype=torch.bool, device=device)
        outside.as_strided(shape, strides, self.BAND).fill_(False)
        self._held.append((bits, bits.clone(), outside))
        size, start = buffer.element_size(), buffer.data_ptr()
        first, last, end = (start + size * at for at in (self.BAND, self.BAND + extent, buffer.numel()))
        self.bands += [(start, first), (last, end)]
        return buffer.as_strided(shape, strides, self.BAND)

    def check(self) -> None:
        """Fail where anything around a view changed, and forget the buffers."""
        held, self._held, self.bands = self._held, [], []
        for index, (bits, before, outside) in enumerate(held):
            places = ((bits != before) & outside).nonzero().flatten() - self.BAND
            assert not places.numel(), (
                f"buffer {index}: {places.numel()} values were written outside the view, the first {int(places[0])}"
                " elements from its start"
            )


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    """Makes views to write to, and checks at the end of the test that nothing around them was written."""
    made = Guarded()
    yield made
    made.check()


class Observer:
    """What a GPU does and the interpreter of kernels does not, told as an error where it would go wrong.

    Products of float32 that are not asked for in IEEE precision are TF32; what is said to be a multiple is read as one;
    threads of a program see what others wrote after a barrier alone, and memory that was written before may be written
    again only once all have read it; nothing is read or written outside of the tensors that a launch is given, nor
    around views of `guarded`, even if it is not used.
    """

    TABLES = ("addresses", "moving")
    """Arguments that hold addresses: such a launch is given more than its tensors."""

    def __init__(self, interpreter: Any, language: Any, guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
        self._language, self._builder, self._guarded = language, interpreter.InterpreterBuilder, guarded
        self._storages: list[tuple[int, int]] = []
        self._forget()
        launch = interpreter.GridExecutor.__call__

        def launched(grid: Any, *args: Any, **more: Any) -> Any:
            known = not {*self.TABLES} & {*grid.arg_names}
            tensors = (getattr(arg, "base", arg) for arg in (*args, *more.values())) if known else ()
            self._storages = [
                (s.data_ptr(), s.data_ptr() + s.nbytes())
                for s in (t.untyped_storage() for t in tensors if isinstance(t, Tensor))
            ]
            return launch(grid, *args, **more)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
        monkeypatch.setattr(interpreter.TensorHandle, "set_attr", self._promise)
        for name in ("dot", "masked_load", "masked_store", "atomic_rmw", "barrier"):
            before, whole = getattr(self, f"_{name}"), f"create_{name}"
            monkeypatch.setattr(self._builder, whole, self._with(before, getattr(self._builder, whole)))
        begin = self._builder.set_grid_idx
        monkeypatch.setattr(self._builder, "set_grid_idx", self._with(lambda *_: self._forget(), begin))

    @staticmethod
    def _with(before: Callable[..., None], ordinary: Callable[..., Any]) -> Callable[..., Any]:
        def observed(builder: Any, *args: Any, **more: Any) -> Any:
            before(*args)
            return ordinary(builder, *args, **more)

        return observed

    def _forget(self) -> None:
        self._ever: set[int] = set()
        self._barrier()

    def _barrier(self) -> None:
        self._written: set[int] = set()
        self._read: set[int] = set()

    def _dot(self, left: Any, right: Any, total: Any, precision: Any, *_: Any) -> None:
        if left.dtype.scalar == self._language.float32:
            assert precision.name == "IEEE", f"a product of float32 in {precision.name}"

    def _places(self, place: Any, mask: Any) -> set[int]:
        own = numpy.asarray(mask.data, dtype=bool)
        places = {*map(int, place.data[own if own.shape == place.data.shape else own.all()].flat)}  # or one mask of all
        if places:
            low, high = min(places), max(places)
            if self._storages:
                assert any(a <= low and high < b for a, b in self._storages), "outside of the tensors of the launch"
            for first, end in self._guarded.bands:
                if low < end and first <= high:
                    assert not any(first <= at < end for at in places), "outside of a view"
        return places

    def _masked_load(self, place: Any, mask: Any, *_: Any) -> None:
        own = self._places(place, mask)
        assert not own & self._written, "read before a barrier: another thread may have written it"
        self._read |= own

    def _masked_store(self, place: Any, value: Any, mask: Any, *_: Any) -> None:
        own = self._places(place, mask)
        assert not own & self._ever & (self._read | self._written), "written again before a barrier"
        self._written |= own
        self._ever |= own

    def _atomic_rmw(self, *_: Any) -> None:
        assert not self._written, "one thread says that all have written, before a barrier"

    @staticmethod
    def _promise(handle: Any, name: str, values: Any) -> None:
        assert name == "tt.divisibility", name
        first = int(handle.data.flat[0])
        assert first % values[0] == 0, f"{first} is no multiple of {values[0]}"


@pytest.fixture
def observer(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> Observer | None:
    """Tells what would go wrong on a GPU alone; on a GPU, None."""
    if torch.cuda.is_available():
        return None
    language = pytest.importorskip("triton.language")
    from triton.runtime import interpreter

    return Observer(interpreter, language, guarded, monkeypatch)


@pytest.fixture
def outputs(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """What launchers allocate are views of NaN, around which nothing may be written."""
    ordinary = torch.empty

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **more: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        kind = dtype or torch.get_default_dtype()
        if more or not kind.is_floating_point or torch.device(device or "cpu").type == "meta":
            return ordinary(*size, dtype=dtype, device=device, **more)
        return guarded(shape, kind, torch.device(device or "cpu"))

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def launched_inside(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run; it is an error where one runs outside of `torch.cuda.device_of`."""
    if torch.cuda.is_available():
        pytest.skip("what is launched is seen where kernels are interpreted")
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    inside: list[Tensor] = []
    launched: list[str] = []
    run = interpreter.GridExecutor.__call__

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    def watched(grid: Any, *args: Any, **more: Any) -> Any:
        assert inside, f"{grid.fn.__name__} is launched on whichever device is the current one"
        launched.append(grid.fn.__name__)
        return run(grid, *args, **more)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched)
    return launched


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Gives the names of the linear's kernels that ran since it was last called."""
    pytest.importorskip("triton")
    from cladapt_kernels.lora import by_item, gemm, mask, shrink, skinny

    ran: set[str] = set()

    def noting(name: str, run: Callable[..., object]) -> Callable[..., object]:
        def noted(*args: object, **more: object) -> object:
            ran.add(name)
            return run(*args, **more)

        return noted

    for module in (by_item, gemm, mask, shrink, skinny):
        for name, kernel in vars(module).items():
            if hasattr(kernel, "run") and hasattr(kernel, "arg_names"):
                monkeypatch.setattr(kernel, "run", noting(name, kernel.run))

    def taken() -> set[str]:
        names = {*ran}
        ran.clear()
        return names

    return taken


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The dispatcher takes any device for a GPU that our kernels know, and any number of rows for enough."""
    from cladapt_kernels.lora import routes

    routes.forget()
    for name, value in (("_obstacle", ""), ("_capability", (9, 0)), ("_name", "Interpreted")):
        monkeypatch.setattr(routes, name, lambda _, value=value: value)
    monkeypatch.setattr(routes, "FEWEST_ROWS", 1)

    def forget() -> None:
        routes._route.cache_clear()
        routes._table.cache_clear()

    monkeypatch.setattr(routes, "forget", forget)  # what the real one forgets besides is replaced here
    yield
    forget()
