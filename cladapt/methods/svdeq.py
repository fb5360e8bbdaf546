"""SVD equalisation: after a block every module's spectrum is set to its root mean square (a control for EBLoRA).

    B A = U S V^T,   rms = ||S|| / sqrt(k),   k the singular values above 0
    B <- sqrt(rms) U,   A <- sqrt(rms) V^T,   so that B A <- rms U V^T and ||B A||_F stays

What is equalised is the evolving adapter as it stands after the block, all it has kept of earlier ones included; with a
method that keeps earlier blocks beside it, the block's own factors. Nothing else is EBLoRA's: steps are plain, the
factors leave the manifold, and no subspace is protected. From the factors alone, in float64.
A direction of singular value 0 gets none: its column of B is 0, and A keeps a row for it, by which it can be learned. A
module with B A = 0 stays as it is. The factors come out balanced, in other coordinates than those that were learned.
State: none.
"""

import torch
from torch import Tensor

from cladapt.errors import ConfigError
from cladapt.methods._base import Context, Method
from cladapt.model.anchors import is_up, module_of, scales
from cladapt.model.spectrum import product_svd


class Svdeq(Method):
    """Fine-tuning, then all singular values of a module made equal."""

    recasts = True
    alters = True

    def check(self, ctx: Context) -> None:
        ups = sum(map(is_up, ctx.parameters))
        if scales(ctx.parameters) or 2 * ups != len(ctx.parameters):
            raise ConfigError(
                "svdeq sets A and B of every module, and this adapter learns other tensors",
                "use it with methods that learn low-rank factors, not with full or eblora",
            )

    @torch.no_grad()
    def end_block(self, ctx: Context) -> None:
        up_of = {module_of(name): p for name, p in ctx.parameters.items() if is_up(name)}
        for name, down in ctx.parameters.items():
            if not is_up(name):
                up = up_of[module_of(name)]
                for factor, equalised in zip((down, up), equalise(down, up), strict=True):
                    factor.copy_(equalised)


def equalise(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] whose product has the nonzero singular values of `up @ down` at their root mean square.

    In float64 and of the shapes given; the factors themselves where the product is 0.
    """
    left, values, right = product_svd(down, up)
    count = int((values > 0).sum())
    if not count:
        return down, up
    root = (values.square().sum() / count) ** 0.25
    a, b = torch.zeros_like(down, dtype=torch.float64), torch.zeros_like(up, dtype=torch.float64)
    a[: len(values)] = root * right
    b[:, :count] = root * left[:, :count]
    return a, b
