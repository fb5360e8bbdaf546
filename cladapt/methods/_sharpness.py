"""What a method may ask of the loop's backward pass: item-wise weights, and a second pass at perturbed factors."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sharpness:
    """Losses l of items i, averaged over N targets, at the factors theta and in a direction of each item's own:

        J = (1 / N) sum_b l_b(theta) + weight_i [l_b(theta + eps_i) - l_b(theta)],   eps_i = radius_i g_i / |g_i|
        J = (1 / N) sum_b weight_i l_b(theta)                                        where not `perturbed`

    with g_i the sum of the gradients of item i's losses in a micro-batch, and eps held constant in the gradient. Where
    the direction is `shared`, g is sum_i weight_i g_i for all.
    """

    weight: Tensor
    """float32 [items]."""
    radius: Tensor
    """float32 [items]."""
    shared: bool = False
    perturbed: bool = True
    exact: bool = False
    """Whether every target has an example of its own, so that no target's tokens serve another's."""
    warmup: float = 0.0
    """Share of a block's steps that come before the first with it."""
