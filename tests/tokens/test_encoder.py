"""The frozen encoder: numbers of equal codes, its fit to items, and its files."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.artifacts import read_json, write_json
from cladapt.config import SimulateConfig, TokensConfig
from cladapt.data.simulate import simulate
from cladapt.errors import ConfigError, DataError
from cladapt.tokens.encoder import Encoder, collisions, number_in_group
from cladapt.tokens.quantize import ResidualKMeans

CODES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    stream = simulate(SimulateConfig(users=30, items=40, topics=4, blocks=2)).stream
    return Encoder.fit(stream, TokensConfig(dimensions=8, levels=2, codes=4, capacity=5))


@settings(max_examples=100)
@given(CODES, st.integers(1, 4))
def test_numbers_count_equal_codes_in_order_modulo_the_capacity(rows: list[tuple[int, int]], capacity: int) -> None:
    number = number_in_group(np.array(rows), capacity)
    assert number.tolist() == [rows[:i].count(row) % capacity for i, row in enumerate(rows)]


def test_numbers_are_the_lowest_that_no_equal_row_has() -> None:
    before = np.array([[0, 1, 0], [0, 1, 3], [2, 2, 1]])
    codes = np.array([[0, 1], [2, 2], [0, 1], [0, 1], [3, 3]])
    assert number_in_group(codes, 4, before).tolist() == [1, 0, 2, 0, 0]


@settings(max_examples=100)
@given(CODES, st.lists(st.integers(0, 30), max_size=5))
def test_ids_do_not_depend_on_how_items_arrive(rows: list[tuple[int, int]], cuts: list[int]) -> None:
    maker = Encoder(TokensConfig(capacity=3), None, ResidualKMeans(()), None)  # type: ignore[arg-type]
    codes, ids = np.array(rows, dtype=np.int32), np.empty((0, 3), dtype=np.int32)
    for part in np.split(codes, sorted(cut for cut in cuts if cut < len(rows))):
        ids = np.concatenate([ids, maker.ids(part, ids)])
    np.testing.assert_array_equal(ids, maker.ids(codes, ids[:0]))


@settings(max_examples=50)
@given(CODES, st.integers(1, 30))
def test_collisions_are_items_whose_codes_another_has(rows: list[tuple[int, int]], of_last: int) -> None:
    of_last = min(of_last, len(rows))
    count = Counter(rows)
    assert collisions(np.array(rows)) == pytest.approx(sum(count[row] > 1 for row in rows) / len(rows))
    assert collisions(np.array(rows), of_last) == pytest.approx(sum(count[r] > 1 for r in rows[-of_last:]) / of_last)


def test_the_fit_of_block_1_is_that_of_its_own_items(encoder: Encoder) -> None:
    stream = simulate(SimulateConfig(users=30, items=40, topics=4, blocks=2)).stream
    x = encoder.vectors(stream, stream.items)[stream.known(1)].astype(np.float64)
    residual = x.copy()
    for centres in encoder.quantizer.codebooks:
        residual -= centres[((residual[:, None] - centres) ** 2).sum(-1).argmin(1)]
    assert encoder.block_1.quantisation_error == pytest.approx((residual**2).sum() / (x**2).sum(), rel=1e-4)
    assert 0 < encoder.block_1.quantisation_error < 1
    assert encoder.block_1.collisions == collisions(encoder.quantizer.encode(x))


def test_a_saved_encoder_is_the_same(encoder: Encoder, tmp_path: Path) -> None:
    stream = simulate(SimulateConfig(users=30, items=40, topics=4, blocks=2)).stream
    encoder.save(tmp_path)
    back = Encoder.load(tmp_path)
    assert (back.config, back.block_1, back.sizes) == (encoder.config, encoder.block_1, (4, 4, 5))
    np.testing.assert_array_equal(back.vectors(stream, stream.items), encoder.vectors(stream, stream.items))


def test_files_of_another_encoder_are_refused(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    record = read_json(tmp_path / "tokens.json")
    ResidualKMeans(tuple(c + 1 for c in encoder.quantizer.codebooks)).save(tmp_path / "codebooks.safetensors")
    with pytest.raises(DataError, match=r"codebooks\.safetensors is not the file that tokens\.json was written for"):
        Encoder.load(tmp_path)
    write_json(tmp_path / "tokens.json", {**record, "config": {"cods": 4}})
    with pytest.raises(ConfigError, match=r"tokens\.json: 1 mistake: unknown key 'cods', did you mean 'codes'"):
        Encoder.load(tmp_path)
    write_json(tmp_path / "tokens.json", {**record, "block_1": None})
    with pytest.raises(DataError, match=r"tokens\.json has block_1=None"):
        Encoder.load(tmp_path)
