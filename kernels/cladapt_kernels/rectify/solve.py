"""The r x r algebra of a rectification in float64, of a stack of modules at once: what multiplies A, B and steps."""

from typing import NamedTuple

import torch
from torch import Tensor

from cladapt_kernels.rectify.options import Form, Gauge
from cladapt_kernels.reference import AV_ROUNDING

SINGULAR = 1e-15
"""Share of the trace below which an eigenvalue of a Gram matrix is rounding of float64."""


class Products(NamedTuple):
    """What is known of a stack of modules, float64: products [M, r, r] of factors and steps, and [M, r, k] with V."""

    gram_a: Tensor
    """A A^T"""
    gram_b: Tensor
    """B^T B"""
    inner_a: Tensor
    """dA A^T"""
    inner_b: Tensor
    """B^T dB"""
    av: Tensor
    """A V"""
    dav: Tensor
    """dA V"""


def solve(products: Products, form: Form, gauge: Gauge, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """K, R and Z [M, r, r] of `reference.rectify`.

    `ValueError` where damping is 0 and a Gram matrix has no inverse.
    """
    gram_a, gram_b, inner_a, inner_b, av, dav = products
    eye = torch.eye(gram_a.shape[-1], dtype=gram_a.dtype, device=gram_a.device)
    ridge_a, ridge_b = ridge(gram_a, damping), ridge(gram_b, damping)
    inverse_b = _inverse(gram_b, ridge_b, eye)
    k = inverse_b @ inner_b
    if form == "invariant" and gauge == "zero":
        return k, eye.expand_as(k), torch.zeros_like(k)
    protected, n, r, gram = av @ av.mT, eye, eye, gram_a
    if form == "exact":
        n = _unconstrained(protected, gram_a)
        gram = n @ gram_a @ n
    inverse_a = eye  # has no use where A V = 0 and Z = 0
    if form != "invariant" or gauge == "balanced":
        inverse_a = n @ _inverse(gram + _trace(gram_a) * (eye - n), ridge_a, eye) @ n
    if form == "least_squares":
        r = eye - protected @ inverse_a
    elif form == "exact":
        r = n + (eye - n) @ gram_a @ inverse_a
    if gauge == "zero":
        return k, r.expand_as(k), torch.zeros_like(k)
    d = inner_a - dav @ av.mT  # D A^T
    d = d - ridge_b * (inverse_b @ d)  # B^+ B D A^T
    if gauge == "balanced":
        return k, r.expand_as(k), -0.5 * (d @ inverse_a + k @ r)
    right = ridge_b * (k @ r) - d - k @ (gram_a - protected)
    return k, r.expand_as(k), _sylvester(gram_b, ridge_b, gram, ridge_a, right @ n) @ n


def ridge(gram: Tensor, damping: float) -> Tensor:
    """damping tr(G) / r [M, 1, 1]; 1 where G = 0, so that it has an inverse."""
    trace = _trace(gram)
    return torch.where(trace > 0, damping / gram.shape[-1] * trace, 1.0)


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _inverse(gram: Tensor, ridge: Tensor, eye: Tensor) -> Tensor:
    """(G + ridge I)^{-1}; where rounding has left G eigenvalues below 0, these are taken for 0."""
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
    least = torch.maximum(0.5 * ridge, SINGULAR * _trace(gram)).squeeze(-1)
    # but for rounding no pivot is below the ridge
    if not (failed.any() or (factor.diagonal(dim1=-2, dim2=-1).square() < least).any()):
        return torch.cholesky_inverse(factor)
    values, vectors = _eigh(gram)
    values = values.clamp_(min=0.0).unsqueeze(-2) + ridge
    if (values < SINGULAR * _trace(gram)).any():
        raise ValueError("damping=0 needs factors of full rank, and B^T B or A A^T has no inverse: use 1e-6")
    return (vectors / values) @ vectors.mT


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; `ValueError` where entries are not finite, by which a solver may not converge."""
    try:
        values, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError as error:
        raise ValueError("factors, steps or subspaces hold values that are not finite: expected finite ones") from error
    return values, vectors


def _unconstrained(protected: Tensor, gram_a: Tensor) -> Tensor:
    """N: onto the complement of the columns of A V, whose singular values below AV_ROUNDING ||A||_F are 0."""
    values, vectors = _eigh(protected)
    free = values.unsqueeze(-2) <= AV_ROUNDING**2 * _trace(gram_a)
    return (vectors * free) @ vectors.mT


def _sylvester(left: Tensor, left_ridge: Tensor, right: Tensor, right_ridge: Tensor, c: Tensor) -> Tensor:
    """Z of (left + ridge I) Z + Z (right + ridge I) = C, both symmetric."""
    (first, p), (second, q) = _eigh(left), _eigh(right)
    sums = first.clamp_(min=0.0).unsqueeze(-1) + second.clamp_(min=0.0).unsqueeze(-2) + left_ridge + right_ridge
    return p @ ((p.mT @ c @ q) / sums) @ q.mT
