"""What a method may ask of the loop's backward pass: weights of losses, and a second pass at perturbed factors."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Groups = Literal["item", "sample", "batch"]
"""Whose losses are perturbed together: those of an item, those of an example (a history or an image), or all."""


@dataclass(frozen=True)
class Sharpness:
    """N losses l_b in groups g, averaged over N, at the factors theta and where every group has moved its own way:

        J = (1 / N) sum_b l_b(theta) + weight_g [l_b(theta + eps_g) - l_b(theta)],   eps_g = radius_g d_g / |d_g|
        J = (1 / N) sum_b weight_i l_b(theta)                                        where not `perturbed`

    with d_g the sum of the gradients of the group's losses in a micro-batch, and eps held constant in the gradient. An
    item's group has the item's weight and radius, an example's the means over its targets. Where all are one group, a
    loss keeps its item's weight, and d is sum_b weight_i(b) grad l_b. Where an example holds targets of several items,
    an item's group is the tokens that come before its targets, and d_g the gradient of all losses at these tokens.
    Losses of several weights after one history take one more backward.
    """

    weight: Tensor
    """float32 [items]."""
    radius: Tensor
    """float32 [items]."""
    groups: Groups = "item"
    perturbed: bool = True
    exact: bool = False
    """Whether every target has an example of its own, so that no target's tokens serve another's."""
    warmup: float = 0.0
    """Share of a block's steps that come before the first with it."""
    share: float = 1.0
    """Groups of the largest weights are perturbed until they hold this share of a micro-batch's targets."""
    layers: int = 0
    """How many of the last layers are perturbed; 0: all."""
    refresh: int = 1
    """Steps from one with two passes to the next; those between have one, and reuse what the second pass changed."""
