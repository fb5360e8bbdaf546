"""Vectors from co-occurrence alone: eigenvectors in float64, groups known by construction, items of later blocks."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from cladapt.config import TokensConfig, resolve
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import ConfigError, DataError
from cladapt.tokens import spectral
from cladapt.tokens.cooccurrence import Cooccurrence, item_graph
from cladapt.tokens.spectral import GraphVectors

CONFIG = TokensConfig(embedding="cooccurrence", dimensions=2, neighbours=0)


def make(baskets: list[list[str]]) -> Stream:
    """Block t + 1 has a user for each of the words `baskets[t]`, whose letters are the user's items, all learned."""
    first: dict[str, int] = {}
    rows = []
    for block, words in enumerate(baskets, start=1):
        for number, word in enumerate(words):
            for position, item in enumerate(word):
                first.setdefault(item, block)
                rows.append((f"{block}-{number:03d}", item, None, position, block))
    items = pl.DataFrame([(item, "", block) for item, block in first.items()], schema=ITEMS, orient="row")
    frame = pl.DataFrame(rows, schema=INTERACTIONS, orient="row").sort("user", "position")
    return Stream(frame, items, {"config": {"min_events": 99}})


GROUPS = ["abc", "bcd", "acd", "abd", "efg", "fgh", "egh", "efh", "de"]


def test_vectors_are_rows_of_the_leading_eigenvectors() -> None:
    stream = make([GROUPS])
    weights = Cooccurrence.of(stream, 1).counts.toarray().astype(float)
    degree = weights.sum(axis=1) + weights.sum() / len(weights)
    values, vectors = np.linalg.eigh(weights / np.sqrt(np.outer(degree, degree)))
    z = vectors[:, ::-1][:, :2] * values[::-1][:2]
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    found = GraphVectors.fit(stream, CONFIG).vectors(stream, stream.items)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found @ found.T, z @ z.T, atol=1e-6)


def test_a_large_graph_has_the_eigenvectors_of_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    stream = make([["".join(map(chr, 97 + np.unique(rng.integers(40, size=6)))) for _ in range(150)]])
    dense = GraphVectors.fit(stream, CONFIG)
    monkeypatch.setattr(spectral, "_MOST_DENSE", 0)
    sparse = GraphVectors.fit(stream, CONFIG)
    np.testing.assert_allclose(sparse.values, dense.values, rtol=1e-10)
    np.testing.assert_allclose(sparse.eigenvectors, dense.eigenvectors, atol=1e-8)


def test_items_that_users_have_together_are_close() -> None:
    stream = make([GROUPS])
    x = GraphVectors.fit(stream, CONFIG).vectors(stream, stream.items)
    group = np.array([item in "abcd" for item in stream.items["item"]])
    close = x @ x.T
    assert close[group[:, None] == group].min() > close[group[:, None] != group].max()


def test_later_items_are_mapped_by_their_edges_and_later_blocks_move_nobody() -> None:
    baskets = [GROUPS, ["ab1", "cd1", "ef2"], ["23", "3", "4", "gh5"]]
    whole = make(baskets)
    source = GraphVectors.fit(whole, CONFIG)
    x = dict(zip(whole.items["item"], source.vectors(whole, whole.items), strict=True))
    # 1 has users in common with a, b, c and d, 2 with e and f, 5 with g and h; 3 with 2 alone, 4 with nobody
    assert x["1"] @ x["a"] > 0.9 > x["1"] @ x["e"]
    assert x["2"] @ x["e"] > 0.9 > x["2"] @ x["a"]
    np.testing.assert_allclose(x["3"], x["2"], atol=1e-6)
    assert not x["4"].any()
    for blocks in (1, 2):
        short = make(baskets[:blocks])
        early = GraphVectors.fit(short, CONFIG).vectors(short, short.items)
        for item, vector in zip(short.items["item"], early, strict=True):
            np.testing.assert_array_equal(vector, x[item])


def test_an_item_of_a_later_block_follows_the_map_of_block_1() -> None:
    stream = make([GROUPS, ["ab1", "ae1"]])
    source = GraphVectors.fit(stream, CONFIG)
    graph = item_graph(Cooccurrence.of(stream, 2).counts, 0, regulariser=1.0).toarray()
    expected = graph[-1, :-1] @ source.eigenvectors
    (found,) = source.vectors(stream, stream.items[-1:])
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-6)


def test_a_saved_map_is_the_same(tmp_path: Path) -> None:
    stream = make([GROUPS, ["ab1"]])
    source = GraphVectors.fit(stream, CONFIG)
    source.save(tmp_path)
    assert sorted(source.files) == sorted(path.name for path in tmp_path.iterdir())
    back = GraphVectors.load(tmp_path, CONFIG)
    np.testing.assert_array_equal(back.vectors(stream, stream.items), source.vectors(stream, stream.items))
    other = tmp_path / "other"
    GraphVectors.fit(make([["abc"]]), CONFIG.model_copy(update={"dimensions": 1})).save(other)
    (other / "embedding_items.parquet").replace(tmp_path / "embedding_items.parquet")
    with pytest.raises(DataError, match=r"embedding\.safetensors: tensors .* do not fit the 3 items of embedding_i"):
        GraphVectors.load(tmp_path, CONFIG)


def test_fewer_dimensions_are_counted() -> None:
    # a pair has the eigenvalues 1/2 and -1/2 once the mean degree is added
    with pytest.warns(UserWarning, match="1 dimensions instead of 2: the graph of the 2 items known at block 1"):
        source = GraphVectors.fit(make([["ab", "ba"]]), CONFIG)
    np.testing.assert_allclose(source.values, [0.5])


def test_users_of_one_item_each_give_no_ids() -> None:
    with pytest.raises(DataError, match="no user has two of the 3 items known at block 1") as caught:
        GraphVectors.fit(make([["a", "b", "c"]]), CONFIG)
    assert "--fractions" in caught.value.hint


@pytest.mark.parametrize("reduce", ["pca", "rec-pca"])
def test_what_is_no_embedding_of_texts_is_not_reduced(reduce: Any) -> None:
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=f"reduce='{reduce}' reduces an embedding of"):
        resolve(TokensConfig, {"embedding": "cooccurrence", "reduce": reduce})
