"""Residual k-means against brute force, degenerate data and its file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cladapt.artifacts import write_tensors
from cladapt.errors import DataError
from cladapt.tokens.quantize import ResidualKMeans


def points(n: int = 200, d: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)


def test_codes_are_the_nearest_centres_of_the_residuals() -> None:
    x = points()
    quantizer = ResidualKMeans.fit(x, levels=3, codes=8, seed=0)
    codes = quantizer.encode(x)
    assert codes.shape == (200, 3)
    assert codes.dtype == np.int32
    for row, code in zip(x.astype(np.float64), codes, strict=True):
        residual = row
        for level, centres in enumerate(quantizer.codebooks):
            distance = ((residual - centres) ** 2).sum(axis=1)
            assert distance[code[level]] == distance.min()
            residual = residual - centres[code[level]]


def test_each_level_lowers_the_reconstruction_error() -> None:
    x = points()
    quantizer = ResidualKMeans.fit(x, levels=4, codes=8, seed=0)
    codes = quantizer.encode(x)
    errors = [
        np.square(x - ResidualKMeans(quantizer.codebooks[:n]).reconstruct(codes[:, :n])).mean() for n in range(1, 5)
    ]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 4


def test_well_separated_clusters_are_found() -> None:
    label = np.arange(90) % 3
    x = (100 * np.eye(3)[label] + 0.01 * points(90, 3)).astype(np.float32)
    codes = ResidualKMeans.fit(x, levels=1, codes=3, seed=0).encode(x)[:, 0]
    assert len({(a, b) for a, b in zip(label, codes, strict=True)}) == 3


def test_fits_are_reproducible_and_encoding_ignores_the_other_rows() -> None:
    x = points()
    first, second = (ResidualKMeans.fit(x, levels=2, codes=16, seed=5) for _ in range(2))
    for a, b in zip(first.codebooks, second.codebooks, strict=True):
        np.testing.assert_array_equal(a, b)
    whole = first.encode(x)
    np.testing.assert_array_equal(whole, np.concatenate([first.encode(x[i : i + 1]) for i in range(len(x))]))


def test_a_fit_from_earlier_groups_keeps_them_where_they_fit_and_is_no_worse() -> None:
    x = points()
    first = ResidualKMeans.fit(x, levels=2, codes=8, seed=0)
    codes = first.encode(x)
    again = ResidualKMeans.fit(x, levels=2, codes=8, seed=1, groups=codes)
    anew = ResidualKMeans.fit(x, levels=2, codes=8, seed=1)

    def together(found: np.ndarray) -> np.ndarray:
        return found[:, None, 0] == found[None, :, 0]

    kept, chance = (float((together(codes) == together(fit.encode(x))).mean()) for fit in (again, anew))
    assert kept > 0.97 > chance
    error = first.error(x, codes)
    assert error is not None
    assert again.error(x, again.encode(x)) <= error * 1.001  # type: ignore[operator]


@pytest.mark.parametrize("groups", [np.zeros((200, 2), dtype=int), np.arange(400).reshape(200, 2) % 50])
def test_groups_of_another_number_than_codes_leave_none_unused(groups: np.ndarray) -> None:
    quantizer = ResidualKMeans.fit(points(), levels=2, codes=8, seed=0, groups=groups)
    assert [len(centres) for centres in quantizer.codebooks] == [8, 8]
    codes = quantizer.encode(points())
    assert all(np.unique(codes[:, level]).tolist() == list(range(8)) for level in range(2))
    plain = ResidualKMeans.fit(points(), levels=2, codes=8, seed=0)
    assert quantizer.error(points(), codes) == pytest.approx(plain.error(points(), plain.encode(points())), rel=0.2)


def test_fewer_distinct_points_than_codes_give_fewer_codes_each_in_use() -> None:
    x = np.repeat(points(5), 4, axis=0)
    with pytest.warns(UserWarning, match="codes instead of 8") as record:
        quantizer = ResidualKMeans.fit(x, levels=2, codes=8, seed=0)
    assert [str(w.message).partition(":")[0] for w in record] == [
        "level 1 has 5 codes instead of 8",
        "level 2 has 1 codes instead of 8",
    ]
    codes = quantizer.encode(x)
    for level, centres in enumerate(quantizer.codebooks):
        assert np.unique(codes[:, level]).tolist() == list(range(len(centres)))
        assert len(np.unique(centres, axis=0)) == len(centres)
    np.testing.assert_allclose(quantizer.reconstruct(codes), x, atol=1e-5)


def test_ties_go_to_the_lowest_code() -> None:
    quantizer = ResidualKMeans((np.array([[1.0], [-1.0], [1.0]], dtype=np.float32),))
    assert quantizer.encode(np.array([[0.0], [1.0], [-3.0]]))[:, 0].tolist() == [0, 0, 1]


def test_saved_codebooks_load_exactly(tmp_path: Path) -> None:
    quantizer = ResidualKMeans.fit(points(), levels=12, codes=2, seed=0)
    quantizer.save(tmp_path / "codebooks.safetensors")
    back = ResidualKMeans.load(tmp_path / "codebooks.safetensors")
    assert len(back.codebooks) == 12
    for a, b in zip(quantizer.codebooks, back.codebooks, strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "other.safetensors", {"weight": torch.zeros(2, 2)})
    with pytest.raises(DataError, match=r"other\.safetensors: not the codebooks .* \(tensors weight\)"):
        ResidualKMeans.load(tmp_path / "other.safetensors")


def test_nothing_to_fit_on_is_refused() -> None:
    with pytest.raises(DataError, match="no item is known at block 1"):
        ResidualKMeans.fit(np.empty((0, 3)), levels=1, codes=2, seed=0)
