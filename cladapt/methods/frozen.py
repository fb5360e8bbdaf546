"""No adaptation: the base, or the adapter it starts from, is used on every block.

State: none. What every method must beat to be worth its training.
"""

from cladapt.methods._base import Method


class Frozen(Method):
    """Blocks are evaluated but never learned."""

    trains = False
