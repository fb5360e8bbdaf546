"""Rec-PCA against the dense closed form in float64, and what its settings are known to do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.linalg import eigh
from sklearn.decomposition import PCA

from cladapt.artifacts import write_tensors
from cladapt.errors import ConfigError, DataError
from cladapt.tokens import rec_pca
from cladapt.tokens.cooccurrence import item_graph
from cladapt.tokens.rec_pca import Projection, fit


def case(n: int = 60, d: int = 12, seed: int = 0, dtype: Any = np.float64) -> tuple[np.ndarray, sparse.csr_array]:
    """Embeddings, and a graph in which items that are alike in some of the columns have more users in common."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) * np.linspace(3, 0.5, d)
    counts = rng.poisson(np.exp(x[:, ::3] @ x[:, ::3].T / 20) / 2) * (1 - np.eye(n, dtype=int))
    x += rng.standard_normal(d)
    return x.astype(dtype), item_graph(sparse.csr_array(np.triu(counts) + np.triu(counts).T), 0)


def closed_form(
    x: np.ndarray, graph: sparse.csr_array, k: int, smoothness: float, whitening: float = 0.0, balance: bool = False
) -> np.ndarray:
    """Z = X~ P, P the top k eigenvectors of X~^T (I - lambda L) X~, by whole matrices."""
    centred = x - x.mean(axis=0)
    left, sigma, right = np.linalg.svd(centred, full_matrices=False)
    centred = left * sigma ** (1 - whitening) @ right
    c, kk = centred.T @ centred, centred.T @ graph.toarray() @ centred
    if balance:
        c, kk = c / np.trace(c), kk / np.trace(kk)
    return centred @ np.linalg.eigh((1 - smoothness) * c + smoothness * kk)[1][:, ::-1][:, :k]


def same_up_to_sign(found: np.ndarray, expected: np.ndarray, scaled: bool = False) -> None:
    if scaled:
        found, expected = (z / np.linalg.norm(z, axis=0) for z in (found, expected))
    sign = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found, expected * sign, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("smoothness", [0.0, 0.5, 1.0, 1.3])
@pytest.mark.parametrize("solver", ["dense", "lanczos"])
def test_the_leading_eigenvectors_of_the_closed_form(
    smoothness: float, solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rec_pca, "_CHUNK", 7)
    x, graph = case()
    projection = fit(x, graph, 4, smoothness, solver=solver)
    np.testing.assert_allclose(projection.matrix.T @ projection.matrix, np.eye(4), atol=1e-10)
    same_up_to_sign(projection.apply(x), closed_form(x, graph, 4, smoothness))


@pytest.mark.parametrize("whitening", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("balance", [False, True])
def test_whitening_and_balance_are_those_of_the_closed_form(whitening: float, balance: bool) -> None:
    x, graph = case(seed=1)
    found = fit(x, graph, 3, 0.8, whitening, balance).apply(x)
    same_up_to_sign(found, closed_form(x, graph, 3, 0.8, whitening, balance), scaled=True)


def test_without_smoothness_it_is_pca() -> None:
    x, graph = case()
    expected = PCA(3, svd_solver="full").fit_transform(x)
    for projection in (fit(x, graph, 3, smoothness=0.0), fit(x, None, 3, smoothness=1.0)):
        same_up_to_sign(projection.apply(x), expected)
    white = PCA(3, whiten=True, svd_solver="full").fit_transform(x) * np.sqrt(len(x) / (len(x) - 1))
    same_up_to_sign(fit(x, None, 3, standardise=True).apply(x), white)


def test_of_whitened_embeddings_the_strength_does_not_matter() -> None:
    x, graph = case()
    one, other = (fit(x, graph, 3, smoothness, whitening=1.0).matrix for smoothness in (0.1, 3.0))
    np.testing.assert_allclose(one, other, atol=1e-9)
    centred = x - x.mean(axis=0)
    k = centred.T @ graph.toarray() @ centred
    ratios = np.diag(one.T @ k @ one) / np.diag(one.T @ centred.T @ centred @ one)
    np.testing.assert_allclose(ratios, eigh(k, centred.T @ centred, eigvals_only=True)[::-1][:3], rtol=1e-9)


def test_neighbours_come_closer_as_the_strength_grows() -> None:
    # items of one collaborative group share a weak direction, their strong directions are semantic
    rng = np.random.default_rng(0)
    group, topic = rng.integers(4, size=200), rng.integers(5, size=200)
    x = 3 * np.eye(5)[topic] @ rng.standard_normal((5, 16)) + np.eye(4)[group] @ rng.standard_normal((4, 16))
    x += 0.3 * rng.standard_normal(x.shape)
    graph = item_graph(sparse.csr_array((group[:, None] == group[None]) & ~np.eye(200, dtype=bool)), 0)
    shares = []
    for smoothness in (0.0, 1.0, 1.3):
        z = fit(x, graph, 3, smoothness).apply(x)
        near = ((z[:, None] - z[None]) ** 2).sum(axis=2).argsort(axis=1)[:, 1:11]
        shares.append((group[near] == group[:, None]).mean())
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.95


def test_float32_is_read_in_chunks_and_close_to_float64() -> None:
    x, graph = case(dtype=np.float32)
    found = fit(x, graph, 4, 1.2).apply(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, fit(x.astype(np.float64), graph, 4, 1.2).apply(x), atol=1e-4)


def test_items_without_an_embedding_count_for_nothing() -> None:
    x, graph = case()
    gone = np.arange(0, 60, 7)
    x[gone] = 0.0
    stay = np.setdiff1d(np.arange(60), gone)
    projection = fit(x, graph, 4, 1.2)
    alone = fit(x[stay], sparse.csr_array(graph.toarray()[np.ix_(stay, stay)]), 4, 1.2)
    np.testing.assert_allclose(projection.matrix, alone.matrix, atol=1e-9)
    reduced = projection.apply(x)
    assert not reduced[gone].any()
    np.testing.assert_allclose(reduced[stay], alone.apply(x[stay]), atol=1e-6)


def test_a_new_item_is_mapped_as_the_old_ones(tmp_path: Path) -> None:
    x, graph = case()
    projection = fit(x[:50], sparse.csr_array(graph.toarray()[:50, :50]), 4)
    projection.save(tmp_path / "projection.safetensors")
    back = Projection.load(tmp_path / "projection.safetensors")
    expected = (x[50:] - x[:50].mean(axis=0)) @ projection.matrix
    np.testing.assert_allclose(back.apply(x[50:]), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(back.apply(x), projection.apply(x))


def test_directions_without_variance_are_left_out() -> None:
    x, graph = case(n=40, d=5)
    flat = np.hstack([x, x[:, :2]])
    with pytest.warns(UserWarning, match="5 dimensions instead of 6: 40 embeddings of 7 columns vary in no more"):
        assert fit(flat, None, 6, standardise=True).apply(flat).shape == (40, 5)
    with pytest.warns(UserWarning, match="5 dimensions instead of 6"):
        assert fit(flat, graph, 6, whitening=1.0).matrix.shape == (7, 5)


@pytest.mark.parametrize("smoothness", [0.7, 1.3, 3.0])
def test_directions_without_variance_do_not_come_before_those_that_are_rough(smoothness: float) -> None:
    x, graph = case(n=40, d=5)
    turned = np.hstack([x, np.zeros((40, 3))]) @ np.linalg.qr(np.random.default_rng(1).standard_normal((8, 8)))[0]
    projection = fit(turned, graph, 4, smoothness)
    np.testing.assert_allclose(projection.matrix.T @ projection.matrix, np.eye(4), atol=1e-10)
    same_up_to_sign(projection.apply(turned), closed_form(x, graph, 4, smoothness))


@pytest.mark.parametrize("solver", ["dense", "lanczos"])
@pytest.mark.parametrize("smoothness", [0.9, 1.3])
def test_fewer_items_than_columns_have_as_many_directions_as_they_vary_in(solver: Any, smoothness: float) -> None:
    x, graph = case(n=30, d=50)
    projection = fit(x, graph, 25, smoothness, solver=solver)
    np.testing.assert_allclose(projection.matrix.T @ projection.matrix, np.eye(25), atol=1e-9)
    left, sigma, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    left, sigma = left[:, :29], sigma[:29]  # the mean takes one direction
    mixed = (1 - smoothness) * np.diag(sigma**2) + smoothness * (left * sigma).T @ graph.toarray() @ (left * sigma)
    z = left * sigma @ np.linalg.eigh(mixed)[1][:, ::-1][:, :25]
    same_up_to_sign(projection.apply(x), z)


def test_embeddings_that_are_all_zero_are_named() -> None:
    with pytest.raises(DataError, match="all 5 embeddings are zero"):
        fit(np.zeros((5, 4)), None, 2)


def test_what_keeps_all_columns_only_turns_them() -> None:
    x, graph = case()
    with pytest.warns(UserWarning, match="all 12 columns of the embeddings are kept: they are turned"):
        z = fit(x, graph, 12, 1.2).apply(x)
    centred = x - x.mean(axis=0)
    np.testing.assert_allclose(z @ z.T, centred @ centred.T, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, g: (x[0], g), r"embeddings of the shape \[12\] and dtype float64"),
        (lambda x, g: (x.astype(int), g), r"embeddings of the shape \[60, 12\] and dtype int64"),
        (lambda x, g: (x[:9], g), r"the item graph has the shape \[60, 60\], there are 9 embeddings"),
        (lambda x, g: (x, sparse.csr_array((60, 60))), "the item graph has no edge"),
        (lambda x, g: (np.where(x > 3, np.nan, x), g), "values that are not finite"),
        (lambda x, g: (np.ones_like(x), None), "the 60 embeddings do not differ"),
    ],
)
def test_what_does_not_fit_is_named(change: Any, text: str) -> None:
    x, graph = change(*case())
    with pytest.raises(DataError, match=text):
        fit(x, graph, 4)


def test_what_cannot_be_done_says_what_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, graph = case()
    with pytest.raises(ConfigError, match="Lanczos knows neither whitening nor balance"):
        fit(x, graph, 4, whitening=0.5, solver="lanczos")
    with pytest.raises(DataError, match="the trace of K is -"):
        fit(x, -graph, 4, balance=True)
    with pytest.raises(DataError, match=r"embeddings of the shape \[60, 11\] are given to a projection of 12 columns"):
        fit(x, graph, 4).apply(x[:, 1:])
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="not a readable safetensors"):
        Projection.load(tmp_path / "x.safetensors")
    write_tensors(tmp_path / "x.safetensors", {"mean": torch.zeros(3)})
    with pytest.raises(DataError, match=r"not a projection \(tensors \{'mean': \[3\]\}\)"):
        Projection.load(tmp_path / "x.safetensors")

    def stuck(*_: Any, **__: Any) -> None:
        raise rec_pca.ArpackNoConvergence("stuck", np.zeros(1), np.zeros((12, 1)))

    monkeypatch.setattr(rec_pca, "eigsh", stuck)
    with pytest.raises(DataError, match="1 of 4 eigenvectors of M were found in 12 columns"):
        fit(x, graph, 4, solver="lanczos")


def test_many_columns_are_not_made_into_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x, graph = case()
    monkeypatch.setattr(rec_pca, "MOST_DENSE", 10)
    monkeypatch.setattr(rec_pca._Table, "moments", None)
    same_up_to_sign(fit(x, graph, 4, 1.1).apply(x), closed_form(x, graph, 4, 1.1))
