"""Curvature, lengths and neighbours of an item table against autograd and brute force."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cladapt.model import geometry
from cladapt.model.geometry import Graphs, conditioning, hessians, norm_dispersion


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_hessian_is_that_of_autograd(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    h, table = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((3, 4), (9, 4)))
    found = hessians(h / temperature, table, temperature)
    for row, target, own in zip(h, (0, 5, 8), found, strict=True):
        label = torch.tensor(target)
        wanted = torch.autograd.functional.hessian(lambda v, y=label: F.cross_entropy(table @ v / temperature, y), row)
        torch.testing.assert_close(own, wanted)


def test_unit_rows_bound_the_largest_eigenvalue() -> None:
    generator = torch.Generator().manual_seed(0)
    h, table = (torch.randn(*size, generator=generator) for size in ((5, 4), (30, 4)))
    found = conditioning(hessians(h / 0.5, F.normalize(table, dim=1), 0.5))
    assert found["largest_eigenvalue"] <= 1 / 0.5**2


def test_a_singular_matrix_counts_by_its_directions_that_are_not_flat() -> None:
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    whole, flat = (
        rotation @ torch.diag(torch.tensor(v, dtype=torch.float64)) @ rotation.T for v in ([8.0, 4, 2], [9.0, 3, 0])
    )
    found = conditioning(torch.stack([whole, flat]))
    assert found["largest_eigenvalue"] == pytest.approx(8.5)
    assert found["condition"] == pytest.approx((4 + 3) / 2)
    assert found["condition_log10"] == pytest.approx(np.log10([4, 3]).mean())
    assert found["rank"] == 2.5
    assert conditioning(torch.zeros(1, 3, 3)) == {
        "largest_eigenvalue": 0.0,
        "condition": 1.0,
        "condition_log10": 0.0,
        "rank": 0.0,
    }


def test_lengths_disperse_by_their_coefficient_of_variation() -> None:
    assert norm_dispersion(torch.tensor([[3.0, 4.0], [0.0, 5.0], [5.0, 0.0]])) == 0.0
    assert norm_dispersion(torch.tensor([[1.0, 0.0], [0.0, 3.0]])) == pytest.approx(0.5)
    assert norm_dispersion(torch.zeros(2, 2)) == 0.0


def test_what_is_near_by_text_or_by_users_is_counted_among_the_nearest_rows() -> None:
    vectors = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    vectors[7] = 0.0
    items = np.array([0, 5, 7])
    cosine = F.normalize(vectors, dim=1) @ F.normalize(vectors, dim=1).T
    cosine.fill_diagonal_(-2.0)
    cosine[:, 7] = -2.0
    near = cosine.topk(geometry.NEIGHBOURS).indices.numpy()[items]
    half = np.where(np.arange(geometry.NEIGHBOURS) < 5, near, -1)
    far = np.argsort(cosine.numpy(), axis=1)[items, 2 : 2 + geometry.NEIGHBOURS]
    asked = Graphs(items[:2], half[:2], np.concatenate([near[:1], far[1:2]]))
    length = 0.1 + torch.rand(30, 1, generator=torch.Generator().manual_seed(1))
    assert asked.overlaps(length * vectors) == {"semantic_overlap": 1.0, "collaborative_overlap": 0.5}
    assert Graphs(items[2:], None, near[2:]).overlaps(vectors) == {
        "semantic_overlap": None,
        "collaborative_overlap": 0.0,  # a row of zeros has no neighbours
    }
