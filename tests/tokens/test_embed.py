"""Text embeddings: what they depend on, what is counted, what is refused."""

import sys
import types
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cladapt.errors import DataError, EnvironmentProblem
from cladapt.tokens.embed import Embedding, fit_embedding, load_embedding
from cladapt.tokens.embed import embed as encoded

WORDS = ("river", "stone", "night", "garden", "engine", "winter", "harbour", "mirror")


def texts(n: int = 60) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 4)) + f" {1980 + i}" for i in range(n)]


def embed(texts: list[str], fit: np.ndarray, method: str, dimensions: int, seed: int) -> np.ndarray:
    return encoded(fitted(texts, fit, method, dimensions, seed), texts)


def fitted(texts: list[str], fit: np.ndarray, method: str, dimensions: int, seed: int) -> Embedding:
    return fit_embedding([texts[i] for i in np.arange(len(texts))[fit]], method, dimensions, seed)


def test_rows_are_unit_vectors_and_the_same_on_every_call() -> None:
    first, second = (embed(texts(), np.ones(60, dtype=bool), "tfidf", 8, seed=3) for _ in range(2))
    assert first.shape == (60, 8)
    assert first.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(first, second)


def test_later_items_do_not_move_earlier_ones() -> None:
    everything = embed(texts(), np.arange(40), "tfidf", 8, seed=0)
    early = embed(texts()[:45], np.arange(45) < 40, "tfidf", 8, seed=0)
    np.testing.assert_array_equal(everything[:45], early)


def test_years_and_single_digits_tell_items_apart() -> None:
    names = ["Alien 1979", "Alien 1986", "Alien Part 2", "Alien Part 3"]
    with pytest.warns(UserWarning, match="dimensions instead of 50"):
        x = embed(names, np.arange(4), "tfidf", 50, seed=0)
    similarity = x @ x.T
    assert similarity[~np.eye(4, dtype=bool)].max() < 0.99


def test_a_full_rank_space_keeps_the_cosines_of_the_terms() -> None:
    # "a b" and "b c" share b: with all terms kept, unrelated texts are orthogonal and equal ones identical
    with pytest.warns(UserWarning, match=r"4 dimensions instead of 9: .* 4 items with text and .* terms"):
        x = embed(["a b", "b c", "d e", "a b"], np.arange(4), "tfidf", 9, seed=0)
    similarity = x @ x.T
    assert similarity[0, 3] == pytest.approx(1, abs=1e-6)
    assert similarity[0, 2] == pytest.approx(0, abs=1e-6)
    assert 0 < similarity[0, 1] < 1


def test_a_single_term_is_one_dimension() -> None:
    with pytest.warns(UserWarning, match="1 dimensions instead of 4"):
        x = embed(["jazz", "jazz"], np.arange(2), "tfidf", 4, seed=0)
    np.testing.assert_array_equal(x, [[1.0], [1.0]])


def test_items_without_a_usable_text_are_zero() -> None:
    x = embed([*texts(), "", "  !!", "zeppelin"], np.arange(60), "tfidf", 8, seed=0)
    assert np.flatnonzero(~x.any(axis=1)).tolist() == [60, 61, 62]


def test_no_text_in_block_1_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 2 items known at block 1 has a word"):
        embed(["", "?", "late words"], np.arange(2), "tfidf", 4, seed=0)


@pytest.mark.parametrize(("n", "dimensions"), [(40, 8), (3, 2)])
def test_a_saved_embedding_gives_the_same_bits_however_texts_are_grouped(
    n: int, dimensions: int, tmp_path: Path
) -> None:
    made = fitted(texts(), np.arange(n), "tfidf", dimensions, seed=0)
    made.save(tmp_path)
    assert sorted(made.files) == sorted(path.name for path in tmp_path.iterdir())
    kept = load_embedding(tmp_path, "tfidf")
    whole = encoded(made, texts())
    for cuts in ([60], [1, 2, 60], [17, 18, 40, 60], list(range(1, 61))):
        parts = [encoded(kept, texts()[a:b]) for a, b in pairwise([0, *cuts])]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_full_rank_embedding_is_kept_without_a_projection(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="2 dimensions instead of 4"):
        made = fitted(["jazz", "rock", "jazz"], np.arange(3), "tfidf", 4, seed=0)
    made.save(tmp_path)
    np.testing.assert_array_equal(
        encoded(load_embedding(tmp_path, "tfidf"), ["rock jazz"]), encoded(made, ["rock jazz"])
    )


def test_files_that_do_not_fit_each_other_are_named(tmp_path: Path) -> None:
    for folder, n in ((tmp_path / "a", 40), (tmp_path / "b", 20)):
        fitted(texts(), np.arange(n), "tfidf", 4, seed=0).save(folder)
    (tmp_path / "a" / "terms.parquet").replace(tmp_path / "b" / "terms.parquet")
    with pytest.raises(DataError, match=r"b/embedding\.safetensors: tensors .* do not fit the \d+ terms of terms"):
        load_embedding(tmp_path / "b", "tfidf")
    with pytest.raises(DataError, match=r"tensors components, idf, expected probe"):
        load_embedding(tmp_path / "b", "some/model")


class FakeModel:
    slope = 1.0

    def __init__(self, name: str) -> None:
        if name == "nowhere":
            raise OSError("nowhere is not a model\nsecond line")

    def encode(self, sentences: list[str], **_: object) -> np.ndarray:
        return np.array([[self.slope * len(s) + 1.0, 1.0] for s in sentences], dtype=np.float32)


def fake_package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = FakeModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)


def test_a_sentence_transformer_gives_its_vectors_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(monkeypatch)
    x = embed(["abc", ""], np.arange(2), "some/model", 64, seed=0)
    np.testing.assert_allclose(x, np.array([[4, 1], [0, 0]]) / np.sqrt(17), rtol=1e-6)


def test_a_model_that_has_changed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_package(monkeypatch)
    made = fitted(["abc"], np.arange(1), "some/model", 64, seed=0)
    made.save(tmp_path)
    np.testing.assert_array_equal(encoded(load_embedding(tmp_path, "some/model"), ["abc"]), encoded(made, ["abc"]))
    monkeypatch.setattr(FakeModel, "slope", 1.1)
    with pytest.raises(DataError, match="'some/model' gives other vectors than when the IDs were built"):
        encoded(load_embedding(tmp_path, "some/model"), ["abc"])


def test_a_model_without_finite_vectors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(monkeypatch)
    monkeypatch.setattr(FakeModel, "slope", np.nan)
    with pytest.raises(DataError, match="model 'some/model' gives vectors that are not finite"):
        embed(["abc"], np.arange(1), "some/model", 64, seed=0)


def test_a_model_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(monkeypatch)
    with pytest.raises(
        DataError, match="cannot load the sentence-transformers model 'nowhere': nowhere is not a model "
    ):
        embed(["abc"], np.arange(1), "nowhere", 64, seed=0)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with warnings.catch_warnings(), pytest.raises(EnvironmentProblem, match=r"pip install cladapt\[embed\]"):
        embed(["abc"], np.arange(1), "some/model", 64, seed=0)
