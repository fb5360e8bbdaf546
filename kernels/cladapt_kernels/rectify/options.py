"""What a rectification can be asked for, and what it moves."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Form = Literal["least_squares", "exact", "invariant"]
"""How far the step of B A keeps out of the protected subspace, see `reference.rectify`."""
Gauge = Literal["zero", "balanced", "sylvester"]
"""How the factors share what both can make, see `reference.rectify`."""
Factors = Sequence[Tensor]
"""A [r, n] or B [m, r] of every module, or their steps."""
Subspaces = Sequence[Tensor | None]
"""V [n, k] of each module, where it has one."""
