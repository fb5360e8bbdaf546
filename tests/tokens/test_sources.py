"""Vectors behind IDs, whole: reduced texts and co-occurrence in a stream that is built at once and one that grows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from warnings import catch_warnings, filterwarnings

import numpy as np
import polars as pl
import pytest

from cladapt.config import SimulateConfig, TokensConfig
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import DataError
from cladapt.tokens.build import save_sids
from cladapt.tokens.cooccurrence import Cooccurrence, item_graph
from cladapt.tokens.embed import embed, fit_embedding
from cladapt.tokens.encoder import Encoder
from cladapt.tokens.extend import extend_sids
from cladapt.tokens.sources import PROJECTION, fit_vectors, load_vectors

PLAIN = TokensConfig(dimensions=8, components=4, levels=2, codes=4, capacity=8, neighbours=10)
SETTINGS = [
    {"reduce": "pca"},
    {"reduce": "whiten"},
    {"reduce": "rec-pca", "smoothness": 1.2, "window": 3, "weighting": "log1p"},
    {"reduce": "rec-pca", "whitening": 0.5, "balance": True},
    {"embedding": "cooccurrence"},
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with catch_warnings():
        filterwarnings("ignore", "the quantisation error|.* of the new items|.* items have no")
        yield


@pytest.fixture(scope="module")
def stream() -> Stream:
    return simulate(SimulateConfig(users=60, items=40, topics=4, blocks=3, births=0.4)).stream


def config(settings: dict[str, object]) -> TokensConfig:
    return TokensConfig.model_validate({**PLAIN.model_dump(), **settings})


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_stream_that_has_grown_has_the_ids_of_the_whole_one(
    settings: dict[str, object], stream: Stream, tmp_path: Path
) -> None:
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    stream.save(whole)
    table = save_sids(whole, Stream.load(whole), config(settings))
    stream.prefix(1).save(grown)
    save_sids(grown, Stream.load(grown), config(settings))
    for block in (2, 3):
        replace(stream.prefix(block), manifest=Stream.load(grown).manifest).save_after(grown, block - 1)
        done = extend_sids(grown, Stream.load(grown))
    assert done.table.fingerprint == table.fingerprint
    assert len(np.unique(table.codes[:, :2], axis=0)) > 8
    for name in ("tokens.json", *Encoder.load(whole).source.files):
        assert (whole / name).read_bytes() == (grown / name).read_bytes()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_saved_map_gives_the_same_vectors(settings: dict[str, object], stream: Stream, tmp_path: Path) -> None:
    source = fit_vectors(stream, config(settings))
    source.save(tmp_path)
    assert sorted(source.files) == sorted(path.name for path in tmp_path.iterdir())
    found = load_vectors(tmp_path, config(settings)).vectors(stream, stream.items)
    np.testing.assert_array_equal(found, source.vectors(stream, stream.items))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_rec_pca_is_that_of_the_text_embedding_and_the_graph_of_block_1(stream: Stream) -> None:
    first = stream.items.filter(pl.col("first_block") == 1)["text"].to_list()
    embedding = fit_embedding(first, "tfidf", 8, 0)
    x = embed(embedding, first).astype(np.float64)
    graph = item_graph(Cooccurrence.of(stream.prefix(1), 1, 2).counts, 10).toarray()
    centred = x - x.mean(axis=0)
    vectors = np.linalg.eigh(-0.1 * centred.T @ centred + 1.1 * centred.T @ graph @ centred)[1][:, ::-1][:, :4]
    z = (embed(embedding, stream.items["text"].to_list()) - x.mean(axis=0)) @ vectors
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    found = fit_vectors(stream, config({"reduce": "rec-pca", "smoothness": 1.1, "window": 2}))
    reduced = found.vectors(stream, stream.items)
    np.testing.assert_allclose(reduced @ reduced.T, z @ z.T, atol=1e-5)


def test_an_item_without_text_stays_zero(stream: Stream) -> None:
    texts = pl.when(pl.int_range(pl.len()) % 9 == 0).then(pl.lit("")).otherwise(pl.col("text")).alias("text")
    without = replace(stream, items=stream.items.with_columns(texts))
    x = fit_vectors(without, config({"reduce": "rec-pca"})).vectors(without, without.items)
    assert np.flatnonzero(~x.any(axis=1)).tolist() == list(range(0, 40, 9))


def test_a_projection_that_is_gone_is_named(stream: Stream, tmp_path: Path) -> None:
    settings = config({"reduce": "pca"})
    fit_vectors(stream, settings).save(tmp_path)
    (tmp_path / PROJECTION).unlink()
    with pytest.raises(DataError, match=r"no such file: .*projection\.safetensors"):
        load_vectors(tmp_path, settings)
