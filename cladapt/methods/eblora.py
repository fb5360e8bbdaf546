"""EBLoRA: every singular value of a block's update is equal, and its input side avoids what earlier blocks use.

    delta W_t = (alpha / r) s U V^T,   U^T U = V^T V = I_r,   F^T V = 0,   A = V^T, B = s U        (arXiv 2602.00722)
    start    G = mean gradient of W on the block, (I - F F^T) G^T ~ V S U^T, s = -(start + start_slope l / (L - 1))
    step     tangents of the gradients, the optimiser, D = step_multiplier (new - old), polar factor of old + tangent(D)
    end      F <- [F, leading left singular vectors of (I - F F^T) G^T] until F holds `energy` of ||G||^2

Earlier blocks stay in the model as frozen factors in float32; saved as one adapter of rank r t, relative to the
unchanged base. F has at most in - r columns, so that V has room. Weight decay acts on s alone: the projection undoes
it on U and V. The released code is tangent=canonical, step_multiplier=released, gradients=base.
Log: `eblora/scale` = mean |s|, `eblora/protected` = mean share of the input side that F holds.
State: min(k, in - k) columns of 4 in bytes for each module, the smaller of F and its complement, and the frozen
factors, 4 bytes per adapter parameter and block.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cladapt import ops
from cladapt.config import Settings
from cladapt.errors import ConfigError
from cladapt.methods._base import Context
from cladapt.methods._history import WithHistory
from cladapt.methods._subspace import Subspaces, most_protected_bytes, outside
from cladapt.model.anchors import factor_pairs, is_learned, is_up, joined, module_of, scales

RELEASED_WIDTH = 4096.0
NOISE = 1e-6  # relative size from which a singular value of a float32 gradient is rounding


class EbloraConfig(Settings):
    """Options of EBLoRA."""

    energy: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99
    """Share of the mean gradient's energy that the protected subspace takes in after a block; 0 protects nothing."""
    sample: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the block's examples behind a mean gradient."""
    gradients: Literal["adapted", "base"] = "adapted"
    """Whether gradients are those of the model with its adapters or of the base alone."""
    tangent: Literal["symmetric", "canonical"] = "symmetric"
    """The metric projection, or the map of the released code, which doubles rotations."""
    step_multiplier: Annotated[float, Field(gt=0.0)] | Literal["released"] = 1.0
    """Factor on the steps of U and V beside the learning rate; `released` is sqrt(4096 / r)."""
    start: float = 0.0
    """All singular values of the first module's update start at minus this."""
    start_slope: float = 0.0
    """What `start` is raised by at the last module; those between lie on a line."""


class Eblora(WithHistory):
    """Balanced low-rank updates on the restricted Stiefel manifold."""

    Config = EbloraConfig
    config: EbloraConfig
    parameters = "directions"
    recasts = True
    weight_gradients = True

    def __init__(self, config: EbloraConfig | None = None) -> None:
        super().__init__(config)
        self.subspaces = Subspaces()
        self._stiefel: ops.Stiefel | None = None

    def check(self, ctx: Context) -> None:
        for module, (a, u) in factor_pairs(ctx.parameters).items():
            rank, inputs, outputs = *a.shape, len(u)
            if rank > min(inputs, outputs):
                raise ConfigError(
                    f"adapter.rank={rank} exceeds {module} of {inputs} inputs and {outputs} outputs",
                    f"eblora needs orthonormal factors: use a rank of at most {min(inputs, outputs)}, or other targets",
                )

    @torch.no_grad()
    def begin_block(self, ctx: Context) -> None:
        last = ctx.factors()
        if is_learned(last):
            self.frozen = joined(self.frozen, last)
        for scale in scales(ctx.parameters).values():  # what it held is in the history now
            scale.zero_()
        self.install(ctx)
        self._start(ctx)
        self._make_stiefel(ctx)

    def _start(self, ctx: Context) -> None:
        """U, V and s of every module, from the gradient's leading directions that are not protected."""
        factors, own_scales = factor_pairs(ctx.parameters), scales(ctx.parameters)
        last = max(len(factors) - 1, 1)
        for number, (module, gradient) in enumerate(self._gradients(ctx).items()):
            a, u = factors[module]
            right, left = leading_directions(gradient, self.subspaces.directions.get(module), len(a))
            a.copy_(right.T)
            u.copy_(left)
            own_scales[module].fill_(-(self.config.start + self.config.start_slope * number / last))

    def _gradients(self, ctx: Context) -> dict[str, Tensor]:
        with ctx.base_alone() if self.config.gradients == "base" else nullcontext(), torch.enable_grad():
            return ctx.mean_gradient(ctx.weights, self.config.sample)

    def _make_stiefel(self, ctx: Context) -> None:
        points = _points(ctx)
        subspaces = [None if is_up(name) else self.subspaces.directions.get(module_of(name)) for name in points]
        kernel = ops.uses_kernel("retract", ctx.kernels)
        self._stiefel = ops.Stiefel(list(points.values()), subspaces, self.config.tangent, kernel=kernel)

    @torch.no_grad()
    def edit_grads(self, ctx: Context) -> None:
        if self._stiefel is None:
            raise RuntimeError("begin_block comes before edit_grads")
        points = _points(ctx)
        grads = {name: ctx.parameters[name].grad for name in points}
        self._stiefel.tangent_(list(points.values()), [_tall(name, g) for name, g in grads.items() if g is not None])

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        if self._stiefel is None:
            raise RuntimeError("begin_block comes before after_step")
        points = _points(ctx)
        multiplier = self.config.step_multiplier
        if multiplier == "released":
            multiplier = (RELEASED_WIDTH / next(iter(points.values())).shape[1]) ** 0.5
        self._stiefel.retract_(list(points.values()), multiplier)
        sizes = torch.cat(list(scales(ctx.parameters).values())).abs()
        ctx.log["eblora/scale"] = sizes.mean().item()
        ctx.log["eblora/protected"] = self._protected_share(ctx)

    def _protected_share(self, ctx: Context) -> float:
        return sum(f.shape[1] / f.shape[0] for f in self.subspaces.directions.values()) / len(ctx.weights)

    @torch.no_grad()
    def end_block(self, ctx: Context) -> None:
        rank = {module: len(a) for module, (a, _) in factor_pairs(ctx.parameters).items()}
        for module, gradient in self._gradients(ctx).items():
            self.subspaces.grow(module, gradient.mT, self.config.energy, rank[module])

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), **self.subspaces.state_dict()}

    def block_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        return super().block_bytes(parameters) + most_protected_bytes(parameters)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.subspaces.load_state_dict(state)
        super().load_state_dict(state)
        if self._ctx is not None:
            self._make_stiefel(self._ctx)


def _points(ctx: Context) -> dict[str, Tensor]:
    """Every U and V as a tall matrix, by its parameter's name."""
    return {name: _tall(name, p.detach()) for name, p in ctx.parameters.items() if p.dim() == 2}


def _tall(name: str, tensor: Tensor) -> Tensor:
    return tensor if is_up(name) else tensor.mT


def leading_directions(gradient: Tensor, protected: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Leading left [in, r] and right [out, r] singular vectors of (I - F F^T) G^T, by a randomised SVD, in float64.

    Where G has fewer directions, random ones that are orthogonal to these and to F take their place.
    """
    projected = outside(protected, gradient.double().mT)
    left, values, right = (
        t[..., :rank] for t in torch.svd_lowrank(projected, min(rank + 8, *projected.shape), niter=4)
    )
    poor = values <= NOISE * values.max().clamp_min(torch.finfo(values.dtype).tiny)
    for vectors in (left, right):
        noise = torch.randn(vectors.shape, dtype=vectors.dtype).to(vectors.device)
        vectors[:, poor] = noise[:, poor] / len(vectors) ** 0.5
    for _ in range(2):  # what the first pass leaves of F is rounding of a small remainder
        left = _orthonormal(outside(protected, left))
    # a pair of vectors has one sign, which must not hang on an entry that is rounding, as those of unused tokens are
    sign = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
    return left * sign, _orthonormal(right) * sign


def _orthonormal(vectors: Tensor) -> Tensor:
    """Q of vectors = Q R with a positive diagonal of R: orthonormal vectors stay as they are, sign included."""
    q, r = torch.linalg.qr(vectors)
    return torch.where(r.diagonal() < 0, -q, q)
