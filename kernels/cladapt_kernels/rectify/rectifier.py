"""Many LoRA steps rectified at once: B X + Y A leaves protected inputs V [n, k] alone, whatever the optimiser did.

    dA A^T, A A^T, B^T dB, B^T B, A V, dA V                          one pass over factors, steps and V
    K = B^+ dB, R, Z                                                 r x r, see `solve`
    A <- A + dA + (K + Z) A - (dA V + K A V) V^T                     one pass more, while they lie in the cache
    B <- B + dB R - B (K R + Z)

which is `reference.rectify` of the steps, so that neither T [m, n] nor a full gradient is made. What the optimiser
scales elementwise leaves every subspace, so this comes after it. Of the form `invariant` A <- A - A V V^T besides.
Products are in the factors' precision, r x r algebra in float64. With orthonormal factors and A V = 0 all of it is
projections: X = dA (I - V V^T) + B^T dB A, Y = (I - B B^T) dB.

Damping leaves B X + Y A of the form `invariant` as it is, since there K is a gauge too, and the constraint of `exact`.
Of the forms with R it takes optimality: a direction of B or A that has a share c of the mean eigenvalue tr / r of its
Gram matrix loses about damping / c of its part. In float32 shares below 1e-7 r are rounding, which a damping of that
size keeps out of K. Janus-LoRA (arXiv 2605.28495) says what it rectifies without a formula; the algebra is our own.
"""

from collections.abc import Sequence
from typing import Protocol, get_args

import torch
from torch import Tensor

from cladapt_kernels.rectify.options import Factors, Form, Gauge, Subspaces
from cladapt_kernels.rectify.solve import Products, solve

CHUNK_BYTES = 8 << 20  # factors, steps and V that are worked on together: they stay in the cache between the passes
HIGHEST_KERNEL_RANK = 64


class _Part(Protocol):
    """Modules that one implementation rectifies; what its methods do `Rectifier` says."""

    def remember(self, downs: Factors, ups: Factors) -> None: ...
    def rectify_(self, downs: Factors, ups: Factors) -> None: ...


class Rectifier:
    """LoRA factors of many modules whose steps are rectified together.

    Args:
        downs: A [r, n] of each module, float32 or float64, any strides.
        ups: B [m, r] of each. Shapes of modules may all differ; what is given later must have the same, its addresses
            may change.
        subspaces: orthonormal V [n, k] or None for each; of the form `invariant` A V = 0.
        form: how far steps keep out of the subspaces, see `reference.rectify`. Where A V = 0 take `invariant`: `exact`
            lets rounding add up, and holds B by it when it passes AV_ROUNDING, after some 10,000 steps in float32.
        gauge: how the factors share a step, see `reference.rectify`. From B = 0 `sylvester` alone keeps A's size.
        damping: what is added to B^T B and A A^T, a share of their mean eigenvalue; 0 where they have inverses.
            Where they have none it is a ValueError that torch's way raises, and NaN of the kernels.
        kernel: take Triton for float32 and ranks to 64, torch for the rest.

    Raises:
        ValueError: factors or subspaces that do not fit.
    """

    def __init__(
        self,
        downs: Factors,
        ups: Factors,
        subspaces: Subspaces | None = None,
        form: Form = "invariant",
        gauge: Gauge = "zero",
        damping: float = 1e-6,
        kernel: bool = False,
    ) -> None:
        subspaces = [None] * len(downs) if subspaces is None else subspaces
        _check(downs, ups, subspaces, form, gauge, damping)
        self._downs, self._ups = [a.shape for a in downs], [b.shape for b in ups]
        self._known = False
        alike: dict[tuple[object, ...], list[int]] = {}
        for i, (a, b, v) in enumerate(zip(downs, ups, subspaces, strict=True)):
            if kernel and a.dtype == torch.float32 and a.shape[0] <= HIGHEST_KERNEL_RANK:
                key: tuple[object, ...] = ("kernel", a.device)
            else:
                key = (a.shape, b.shape, 0 if v is None else v.shape[1], a.dtype, a.device)
            alike.setdefault(key, []).append(i)
        self._parts: list[tuple[list[int], _Part]] = []
        for key, own in alike.items():
            given = (_of(downs, own), _of(ups, own), [subspaces[i] for i in own])
            self._parts.append((own, _part(key[0] == "kernel", *given, form, gauge, damping)))

    @torch.no_grad()
    def remember(self, downs: Factors, ups: Factors) -> None:
        """Take the factors as the points that the next step leaves from."""
        self._fit(downs, ups)
        for own, part in self._parts:
            part.remember(_of(downs, own), _of(ups, own))
        self._known = True

    @torch.no_grad()
    def rectify_(self, downs: Factors, ups: Factors) -> None:
        """Factors <- points + `reference.rectify` of (factors - points), in place.

        `RuntimeError` where no points are known: each step needs its own.
        """
        if not self._known:
            raise RuntimeError("rectify_ does not know where the step began: call remember before it")
        self._fit(downs, ups)
        for own, part in self._parts:
            part.rectify_(_of(downs, own), _of(ups, own))
        self._known = False

    def _fit(self, downs: Factors, ups: Factors, what: str = "") -> None:
        for name, given, shapes in ((f"downs{what}", downs, self._downs), (f"ups{what}", ups, self._ups)):
            if len(given) != len(shapes):
                raise ValueError(f"{len(given)} {name} for {len(shapes)} modules")
            for i, (tensor, shape) in enumerate(zip(given, shapes, strict=True)):
                if tensor.shape != shape:
                    raise ValueError(f"{name}[{i}] is {tuple(tensor.shape)}, expected {tuple(shape)}")


@torch.no_grad()
def rectify(
    downs: Factors,
    ups: Factors,
    down_steps: Factors,
    up_steps: Factors,
    subspaces: Subspaces | None = None,
    form: Form = "invariant",
    gauge: Gauge = "zero",
    damping: float = 1e-6,
) -> tuple[list[Tensor], list[Tensor]]:
    """`reference.rectify` of every module and its steps: all X [r, n], all Y [m, r]; `Rectifier` says what fits."""
    rectifier = Rectifier(downs, ups, subspaces, form, gauge, damping)
    rectifier._fit(down_steps, up_steps, "' steps")
    rectifier.remember(downs, ups)
    xs, ys = ([step.clone() for step in steps] for steps in (down_steps, up_steps))
    for own, part in rectifier._parts:
        assert isinstance(part, _Stack)
        part.steps_(_of(xs, own), _of(ys, own))
    return xs, ys


def _of(given: Sequence[Tensor], own: Sequence[int]) -> list[Tensor]:
    return [given[i] for i in own]


def _check(downs: Factors, ups: Factors, subspaces: Subspaces, form: str, gauge: str, damping: float) -> None:
    if not len(downs) == len(ups) == len(subspaces):
        raise ValueError(f"{len(downs)} downs, {len(ups)} ups and {len(subspaces)} subspaces: expected one per module")
    if form not in get_args(Form) or gauge not in get_args(Gauge):
        raise ValueError(f"form {form!r}, gauge {gauge!r}: expected one of {get_args(Form)}, of {get_args(Gauge)}")
    if not 0.0 <= damping < float("inf"):
        raise ValueError(f"damping {damping}: expected a share of the mean eigenvalue, such as 1e-6, 0 for none")
    for i, (a, b, v) in enumerate(zip(downs, ups, subspaces, strict=True)):
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"module {i} has A {tuple(a.shape)}, B {tuple(b.shape)}: expected [r, n] and [m, r]")
        if a.dtype not in (torch.float32, torch.float64) or b.dtype != a.dtype or b.device != a.device:
            raise ValueError(
                f"module {i} has A of {a.dtype} on {a.device}, B of {b.dtype} on {b.device}: expected float32 or"
                " float64, both alike: rounding to halves would undo what spares V"
            )
        if v is not None and (v.dim() != 2 or v.shape[0] != a.shape[1] or v.shape[1] > v.shape[0]):
            raise ValueError(f"subspace {i} is {tuple(v.shape)}, expected [{a.shape[1]}, k] with orthonormal columns")


def _part(
    kernel: bool, downs: Factors, ups: Factors, subspaces: Subspaces, form: Form, gauge: Gauge, damping: float
) -> _Part:
    if kernel:
        from cladapt_kernels.rectify.kernels import FusedRectifier

        return FusedRectifier(downs, ups, subspaces, form, gauge, damping)
    return _Stack(downs, ups, subspaces, form, gauge, damping)


class _Stack:
    """Modules of one shape as stacks [M, r, n] and [M, m, r], with V [M, n, k]; all memory is made once."""

    def __init__(
        self, downs: Factors, ups: Factors, subspaces: Subspaces, form: Form, gauge: Gauge, damping: float
    ) -> None:
        self._form, self._gauge, self._damping = form, gauge, damping
        (a, b), count = (downs[0], ups[0]), len(downs)
        self._a, self._b = _Stacked(a, count), _Stacked(b, count)
        self._eye = torch.eye(len(a), dtype=torch.float64, device=a.device)
        given = [v.to(a) for v in subspaces if v is not None]
        self._v = torch.stack(given) if given else a.new_zeros(count, a.shape[1], 0)
        # more than a share of the cache pays where there is none to speak of
        each = a.element_size() * (3 * (a.numel() + b.numel()) + self._v[0].numel())
        size = max(1, CHUNK_BYTES // each) if a.device.type == "cpu" else count
        self._chunks = [slice(i, i + size) for i in range(0, count, size)]

    def remember(self, downs: Factors, ups: Factors) -> None:
        self._a.remember(downs)
        self._b.remember(ups)

    def rectify_(self, downs: Factors, ups: Factors) -> None:
        self._a.gather(downs)
        self._b.gather(ups)
        for chunk in self._chunks:
            for stacked in (self._a, self._b):
                torch.sub(stacked.new[chunk], stacked.points[chunk], out=stacked.steps[chunk])
            self._turn(chunk, self._a.new[chunk])
        self._a.scatter(downs)
        self._b.scatter(ups)

    def steps_(self, downs: Factors, ups: Factors) -> None:
        """Steps themselves in place of factors that have made them."""
        self._a.gather(downs)
        self._b.gather(ups)
        self._a.steps.copy_(self._a.new)
        self._b.steps.copy_(self._b.new)
        for chunk in self._chunks:
            self._turn(chunk, self._a.new[chunk], self._a.points[chunk])
        self._a.scatter(downs)
        self._b.scatter(ups)

    def _turn(self, chunk: slice, new: Tensor, points: Tensor | None = None) -> None:
        """Add what rectifies them to new A and B; where these are steps alone, A is `points` and what is new."""
        a, b, db, v = self._a.points[chunk], self._b.points[chunk], self._b.steps[chunk], self._v[chunk]
        products = self._products(chunk)
        k, r, z = solve(products, self._form, self._gauge, self._damping)
        new.baddbmm_((k + z).to(a.dtype), a)
        self._b.new[chunk].baddbmm_(b, (k @ r + z).to(a.dtype), alpha=-1)
        if self._form == "invariant":
            along_v = torch.bmm(new if points is None else points + new, v)
        else:
            along_v = (products.dav + k @ products.av).to(a.dtype)
            self._b.new[chunk].baddbmm_(db, (r - self._eye).to(a.dtype))
        if v.shape[2]:
            new.baddbmm_(along_v, v.mT, alpha=-1)

    def _products(self, chunk: slice) -> Products:
        """What form and gauge need; of what they do not, products of nothing, which are 0."""
        a, both, b, db = self._a.points[chunk], self._a.both[chunk], self._b.points[chunk], self._b.steps[chunk]
        inputs = slice(0 if self._form == "invariant" and self._gauge == "zero" else a.shape[2])
        v = self._v[chunk][..., :0] if self._form == "invariant" else self._v[chunk]
        of_a, of_v = torch.bmm(both[..., inputs], a[..., inputs].mT).double(), torch.bmm(both, v).double()
        (gram_a, inner_a), (av, dav) = of_a.chunk(2, 1), of_v.chunk(2, 1)
        return Products(gram_a, torch.bmm(b.mT, b).double(), inner_a, torch.bmm(b.mT, db).double(), av, dav)


class _Stacked:
    """Points, steps and new values of factors of one shape [M, ., .]; points and steps also as one stack."""

    def __init__(self, like: Tensor, count: int) -> None:
        pairs = like.new_zeros(count, 2, *like.shape)
        self.points, self.steps, self.both = pairs[:, 0], pairs[:, 1], pairs.flatten(1, 2)
        self.new = like.new_zeros(count, *like.shape)
        self._points, self._new = list(self.points.unbind()), list(self.new.unbind())

    def remember(self, factors: Factors) -> None:
        torch._foreach_copy_(self._points, list(factors))

    def gather(self, factors: Factors) -> None:
        torch._foreach_copy_(self._new, list(factors))

    def scatter(self, factors: Factors) -> None:
        torch._foreach_copy_(list(factors), self._new)
