"""Rows of items: by their texts through one frozen map, or drawn by item."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cladapt.config import SimulateConfig
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import ConfigError, DataError
from cladapt.sequential import TableConfig
from cladapt.tokens.table import TextMap, drawn_rows, start_rows

WIDTH = 8


@pytest.fixture(scope="module")
def stream() -> Stream:
    return simulate(SimulateConfig(users=60, items=60, topics=6, blocks=3)).stream


def config(**values: object) -> TableConfig:
    return TableConfig.model_validate({"source": "llm", "dimensions": 20, **values})


def first(stream: Stream) -> pl.DataFrame:
    return stream.items.filter(pl.col("first_block") == 1)


def test_drawn_rows_are_an_items_own() -> None:
    rows = drawn_rows(["a", "b", "c"], 1000, 3)
    assert np.array_equal(rows[1:], drawn_rows(["b", "c"], 1000, 3))
    assert not np.array_equal(rows, drawn_rows(["a", "b", "c"], 1000, 4))
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1.0, abs=0.1)
    assert abs(rows[0] @ rows[1]) < 0.2


@pytest.mark.parametrize("reduction", ["pca", "whiten", "alphafuse", "rec-pca"])
def test_rows_of_block_1_have_the_length_asked_for(stream: Stream, reduction: str) -> None:
    found = TextMap.fit(stream, config(reduction=reduction, length=0.5), WIDTH, 0)
    rows = found.rows(first(stream))
    assert rows.shape == (first(stream).height, WIDTH)
    assert (rows.astype(np.float64) ** 2).sum(1).mean() ** 0.5 == pytest.approx(0.5)


def test_pca_rows_are_the_leading_principal_components(stream: Stream) -> None:
    found = TextMap.fit(stream, config(), WIDTH, 0)
    x = found.embedded(first(stream))
    centred = x - x.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    wanted = np.abs(u[:, :WIDTH] * s[:WIDTH])
    rows = np.abs(found.rows(first(stream))) / found.scale
    assert rows == pytest.approx(wanted, abs=1e-5)
    whitened = TextMap.fit(stream, config(reduction="whiten"), WIDTH, 0)
    assert whitened.rows(first(stream)).std(0) / whitened.scale == pytest.approx(np.ones(WIDTH), rel=1e-4)


def test_later_items_go_through_the_map_of_block_1(stream: Stream, tmp_path: Path) -> None:
    found = TextMap.fit(stream.prefix(1), config(reduction="rec-pca"), WIDTH, 0)
    again = TextMap.fit(stream, config(reduction="rec-pca"), WIDTH, 0)
    assert np.array_equal(found.rows(stream.items), again.rows(stream.items))
    found.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*found.files}
    kept = TextMap.load(tmp_path, config(reduction="rec-pca"), found.scale)
    assert np.array_equal(kept.rows(stream.items), found.rows(stream.items))


def test_items_without_a_known_word_are_drawn_and_counted(stream: Stream) -> None:
    found = TextMap.fit(stream, config(), WIDTH, 0)
    items = pl.DataFrame({"item": ["x", "y"], "text": ["", first(stream)["text"][0]], "first_block": [1, 1]})
    with pytest.warns(UserWarning, match="1 of 2 items have no text"):
        rows = start_rows(items, found, WIDTH, 5, 0.3)
    assert rows[0] == pytest.approx(0.3 * drawn_rows(["x"], WIDTH, 5)[0])


def test_what_does_not_fit_is_said(stream: Stream) -> None:
    with pytest.raises(ConfigError, match=r"table\.reduction=none: the rows have 20 columns, hidden=8 \(use hidden=20"):
        TextMap.fit(stream, config(reduction="none"), WIDTH, 0)
    silent = Stream(stream.interactions, stream.items.with_columns(text=pl.lit("")), stream.manifest)
    with pytest.raises(DataError, match=r"table\.source=llm: all .* items known at block 1 have an empty text"):
        TextMap.fit(silent, config(), WIDTH, 0)
