"""Tensor descriptors: matrices whose tiles the copy engine of sm_90 and later (TMA) loads and stores.

One thread asks for a whole tile, hardware computes the addresses, and what lies outside the matrix is zero: main loops
have neither masks nor pointers. Descriptors are made on the host for each launch.
"""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cladapt_kernels.tiles import capability

ALIGNMENT = 16  # bytes, of a start and of a row


def describable(*matrices: Tensor) -> bool:
    """Whether the copy engine can read all of these: 2-byte entries, rows contiguous and aligned, none empty."""
    return (
        all(
            matrix.dtype in (torch.bfloat16, torch.float16)
            and matrix.stride(1) == 1
            and matrix.stride(0) % (ALIGNMENT // 2) == 0
            and matrix.stride(0) >= matrix.shape[1] > 0
            and matrix.shape[0] > 0
            and (matrix.is_meta or matrix.data_ptr() % ALIGNMENT == 0)
            for matrix in matrices
        )
        and capability(matrices[0].device) >= 90
    )


def describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The descriptor of a `describable` matrix for tiles [rows, columns], without the checks of its constructor."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = matrix, list(matrix.shape), list(matrix.stride())
    descriptor.block_shape = [rows, columns]
    descriptor.padding = "zero"
    return descriptor
