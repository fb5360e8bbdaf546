"""What a retraction can be asked for, and what it moves."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Kind = Literal["symmetric", "canonical"]
"""The tangent map, see `reference.tangent`."""
Gauge = Literal["polar", "qr"]
"""Which orthonormal basis of a step's end, see `reference.retract`."""
Factors = Sequence[Tensor]
"""X, D or gradients, each [n, r]."""
Subspaces = Sequence[Tensor | None]
"""F [n, k] of each factor, where it has one."""

MOST_ITERATIONS = 40  # of Newton-Schulz; 25 are enough for a step of norm 1,000
