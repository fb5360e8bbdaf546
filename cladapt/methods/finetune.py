"""Single evolving LoRA: each block goes on training the adapter of the block before, on its own data alone.

    v_t <- v_{t-1};   v_t <- argmin CE(D_t)

State: none. It is lambda = 0 of every proximal method and the baseline they must beat.
"""

from cladapt.methods._base import Method


class Finetune(Method):
    """Cross-entropy on the current block, nothing else."""
