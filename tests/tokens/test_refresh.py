"""Refreshed IDs: few items move, the vocabulary stays, and the table is that of the stream however it has grown."""

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.artifacts import read_json, write_json
from cladapt.config import TokensConfig, resolve
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import ConfigError, DataError
from cladapt.tokens.build import load_sids, read_sids, save_index, save_sids
from cladapt.tokens.encoder import Encoder
from cladapt.tokens.extend import extend_sids, extend_with_index
from cladapt.tokens.refresh import aligned, go_back, refresh_sids
from cladapt.tokens.sids import SidTable
from cladapt.tokens.versions import version_folder, versions_of

CONFIG = TokensConfig(dimensions=4, levels=2, codes=4, capacity=6)
WORDS = ("river", "stone", "night", "garden", "engine", "winter")
BLOCKS = 4


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the quantisation error|.* of the new items|.* items have no |.* instead of")
        yield


def make_stream() -> Stream:
    """Four blocks of twelve items; the words of later ones are partly new, and users have earlier ones too."""
    rng = np.random.default_rng(1)
    rows = [
        (f"i{t}-{k}", " ".join(rng.choice([*WORDS, f"new{t}", f"more{t}"], 2)), t)
        for t in range(1, BLOCKS + 1)
        for k in range(12)
    ]
    events = []
    for user in range(10):
        used = [row for t in range(1, BLOCKS + 1) for row in (*rng.permutation(12 * t)[:6], 12 * t - 1 - user)]
        events += [(f"u{user}", rows[row][0], None, n, n // 7 + 1) for n, row in enumerate(used)]
    items = pl.DataFrame(rows, schema=ITEMS, orient="row")
    return Stream(pl.DataFrame(events, schema=INTERACTIONS, orient="row"), items, {"config": {}})


def built(folder: Path, blocks: int = BLOCKS, config: TokensConfig = CONFIG) -> Stream:
    make_stream().prefix(blocks).save(folder)
    stream = Stream.load(folder)
    save_sids(folder, stream, config)
    return stream


def table_of(codes: np.ndarray, sizes: tuple[int, ...]) -> SidTable:
    return SidTable(tuple(f"i{k}" for k in range(len(codes))), codes, sizes)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40), st.randoms())
def test_codes_under_other_numbers_move_nothing(rows: list[tuple[int, int]], draw: object) -> None:
    old = np.array(rows)
    names = [np.array(draw.sample(range(5), 5)) for _ in range(2)]  # type: ignore[attr-defined]
    new = np.column_stack([np.argsort(name)[old[:, level]] for level, name in enumerate(names)])
    found = aligned(old, new, [5, 5], table_of(old, (5, 5)))
    for level, name in enumerate(found):
        assert sorted(name) == [*range(5)]
        np.testing.assert_array_equal(name[new[:, level]], old[:, level])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=30))
def test_as_few_items_move_as_under_the_best_of_all_permutations(rows: list[tuple[int, ...]]) -> None:
    old, new = np.array(rows)[:, :2], np.array(rows)[:, 2:]
    found = aligned(old, new, [4, 4], table_of(old, (4, 4)))
    stays = np.ones(len(old), dtype=bool)
    for level in range(2):
        agree = {p: np.array(p)[new[:, level]] == old[:, level] for p in permutations(range(4))}
        best = max((int((stays & a).sum()), int(a.sum())) for a in agree.values())
        mine = agree[tuple(found[level].tolist())]
        assert (int((stays & mine).sum()), int(mine.sum())) == best
        stays &= mine


def test_fewer_codes_than_the_level_has_are_named_among_all_of_it() -> None:
    old, new = np.array([[6], [6], [2]]), np.array([[1], [1], [0]])
    (names,) = aligned(old, new, [2], table_of(old, (8,)))
    assert names.tolist() == [2, 6]


def test_a_refresh_is_the_next_version_and_the_first_stays(tmp_path: Path) -> None:
    stream = built(tmp_path)
    before = load_sids(tmp_path, stream)
    files = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    done = refresh_sids(tmp_path, stream, {})
    assert (done.new, done.version.version, done.version.parent, done.version.through) == (True, 2, 1, BLOCKS)
    table = load_sids(tmp_path, stream)
    assert (table.version, table.sizes, table.tokens) == (2, before.sizes, before.tokens)
    assert table.fingerprint == done.table.fingerprint == done.version.fingerprint
    first = load_sids(tmp_path, stream, 1)
    assert (first.version, first.fingerprint) == (1, before.fingerprint)
    assert {p: p.read_bytes() for p in files} == files
    moved = (table.codes != before.codes).any(axis=1).mean()
    assert done.version.report["moved"] == pytest.approx(moved)
    assert 0 < moved < 1
    levels = [line["moved"] for line in done.version.report["levels"]]
    assert levels == pytest.approx((table.codes != before.codes).mean(axis=0).tolist())


def test_the_error_and_the_collisions_before_and_after_are_of_the_same_items(tmp_path: Path) -> None:
    stream = built(tmp_path)
    done = refresh_sids(tmp_path, stream, {}, through=3)
    report = done.version.report
    for place, key in ((tmp_path, "before"), (version_folder(tmp_path, 2), "after")):
        encoder = Encoder.load(place)
        x = encoder.source.vectors(stream, stream.items[:36]).astype(np.float64)
        assert report["items_without_vector"][key] == (~x.any(axis=1)).sum()
        x = x[x.any(axis=1)]
        residual = x.copy()
        for centres in encoder.quantizer.codebooks:
            residual -= centres[
                np.where(np.isinf(centres).any(1), np.inf, ((residual[:, None] - centres) ** 2).sum(-1)).argmin(1)
            ]
        assert report["quantisation_error"][key] == pytest.approx((residual**2).sum() / (x**2).sum(), rel=1e-4)
        ids = [tuple(row) for row in read_sids(tmp_path, 1 if key == "before" else 2).codes[:36].tolist()]
        assert report["shared_items"][key] == sum(ids.count(row) > 1 for row in ids)
    assert report["quantisation_error"]["after"] < report["quantisation_error"]["before"]
    assert done.waiting == 12


def test_alignment_moves_fewer_items_than_none(tmp_path: Path) -> None:
    stream = built(tmp_path)
    moved = [refresh_sids(tmp_path, stream, {}, align=True).version.report["moved"]]
    go_back(tmp_path)
    done = refresh_sids(tmp_path, stream, {}, align=False)
    assert (done.version.version, done.version.parent) == (3, 1)
    assert moved[0] < done.version.report["moved"]


def test_items_that_do_not_move_keep_their_number_and_others_get_one_that_is_left(tmp_path: Path) -> None:
    stream = built(tmp_path)
    old, new = load_sids(tmp_path, stream), refresh_sids(tmp_path, stream, {}).table
    stays = (old.codes[:, :2] == new.codes[:, :2]).all(axis=1)
    assert 0 < stays.sum() < len(stays)
    np.testing.assert_array_equal(old.codes[stays], new.codes[stays])
    ids = [tuple(row) for row in new.codes.tolist()]
    for row, (first, second, number) in enumerate(ids):
        equal = [other for other in ids if other[:2] == (first, second)]
        if len(equal) <= CONFIG.capacity:
            assert ids.count(ids[row]) == 1
            below = {other[2] for k, other in enumerate(ids) if other[:2] == (first, second) and (stays[k] or k < row)}
            assert stays[row] or {*range(number)} <= below


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"deduplicate": False},
        {"embedding": "cooccurrence", "window": 2},
        {"reduce": "rec-pca", "window": 3, "components": 3},
    ],
    ids=["numbers", "plain", "cooccurrence", "rec-pca"],
)
def test_a_stream_that_grows_after_a_refresh_has_the_ids_of_the_whole_one(
    align: bool, change: dict[str, Any], tmp_path: Path
) -> None:
    config = resolve(TokensConfig, {**CONFIG.model_dump(), **change}, "tokens")
    whole = built(tmp_path / "whole", config=config)
    refresh_sids(tmp_path / "whole", whole, {}, through=2, align=align)
    refresh_sids(tmp_path / "whole", whole, {}, through=3, align=align)
    grown = tmp_path / "grown"
    short = built(grown, 2, config)
    refresh_sids(grown, short, {}, align=align)
    for block in (3, 4):
        replace(whole.prefix(block), manifest=Stream.load(grown).manifest).save_after(grown, block - 1)
        extend_sids(grown, Stream.load(grown))
        if block == 3:
            refresh_sids(grown, Stream.load(grown), {}, align=align)
    for version in (1, 2, 3):
        one, other = version_folder(tmp_path / "whole", version), version_folder(grown, version)
        for name in ("sids.parquet", "tokens.json", "codebooks.safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), (version, name)


def test_a_refresh_of_the_same_blocks_and_settings_is_done_once(tmp_path: Path) -> None:
    stream = built(tmp_path)
    first = refresh_sids(tmp_path, stream, {}, through=3)
    again = refresh_sids(tmp_path, stream, {}, through=3)
    assert (again.new, again.version, again.table.fingerprint) == (False, first.version, first.table.fingerprint)
    assert versions_of(tmp_path).newest == 2
    assert refresh_sids(tmp_path, stream, {"seed": 1}, through=3).version.version == 3


def test_going_back_and_refreshing_again_makes_another_version(tmp_path: Path) -> None:
    stream = built(tmp_path)
    with pytest.raises(ConfigError, match="is at version 1 of its IDs: there is nothing to go back to"):
        go_back(tmp_path)
    first = load_sids(tmp_path, stream)
    second = refresh_sids(tmp_path, stream, {}).table
    assert go_back(tmp_path).current == 1
    assert load_sids(tmp_path, stream).fingerprint == first.fingerprint
    assert load_sids(tmp_path, stream, 2).fingerprint == second.fingerprint
    third = refresh_sids(tmp_path, stream, {})
    assert (third.version.version, third.version.parent) == (3, 1)
    assert third.table.fingerprint == second.fingerprint


def test_ids_of_an_index_become_ids_of_texts_and_both_go_on(tmp_path: Path) -> None:
    make_stream().prefix(3).save(tmp_path)
    stream = Stream.load(tmp_path)
    whole = make_stream().items["item"]
    index = SidTable.from_index({item: [f"<a_{k % 8}>", f"<b_{k % 7}>", f"<c_{k}>"] for k, item in enumerate(whole)})
    save_index(tmp_path, stream, index, TokensConfig(codes=8, capacity=64))
    done = refresh_sids(tmp_path, stream, {"dimensions": 4})
    assert done.table.sizes == (8, 8, 64)
    assert done.version.report["quantisation_error"]["before"] is None
    replace(make_stream(), manifest=stream.manifest).save_after(tmp_path, 3)
    grown = Stream.load(tmp_path)
    assert extend_sids(tmp_path, grown).new == 12
    with pytest.raises(DataError, match="12 of 48 items have no semantic ID") as caught:
        load_sids(tmp_path, grown, 1)
    assert caught.value.hint.endswith(f"cladapt tokens extend {tmp_path} --index FILE")
    assert extend_with_index(tmp_path, grown, index).table.version == 2
    np.testing.assert_array_equal(load_sids(tmp_path, grown, 1).codes, index.codes)
    assert load_sids(tmp_path, grown).version == 2


@pytest.mark.parametrize(
    ("asked", "text", "hint"),
    [
        ({"codes": 5}, "codes=5 is more than the levels have: [4, 4]", "use codes=4 or fewer"),
        ({"levels": 3}, "levels=3, deduplicate=true needs 4 levels, the IDs of the stream have 3", "use levels=2"),
        ({"deduplicate": False}, "levels=2, deduplicate=false needs 2 levels", "use levels=3"),
        ({"capacity": 9}, "capacity=9, the last level has 6 codes", "leave out capacity"),
        ({"code": 4}, "code", ""),
    ],
)
def test_what_needs_more_codes_than_there_are_is_refused(
    asked: dict[str, int], text: str, hint: str, tmp_path: Path
) -> None:
    stream = built(tmp_path)
    with pytest.raises(ConfigError) as caught:
        refresh_sids(tmp_path, stream, asked)
    assert text in caught.value.message
    assert hint in caught.value.hint
    assert not (tmp_path / "ids.json").exists()


def test_blocks_and_versions_that_are_not_there_are_named(tmp_path: Path) -> None:
    stream = built(tmp_path, 2)
    with pytest.raises(ConfigError, match="--through 3: the stream has blocks 1 to 2"):
        refresh_sids(tmp_path, stream, {}, through=3)
    with pytest.raises(DataError, match="has no version 2 of its IDs, it has version 1 alone"):
        load_sids(tmp_path, stream, 2)
    refresh_sids(tmp_path, stream, {})
    with pytest.raises(DataError, match="has no version 3 of its IDs, it has versions 1 to 2"):
        load_sids(tmp_path, stream, 3)


def test_damaged_versions_are_told(tmp_path: Path) -> None:
    stream = built(tmp_path)
    refresh_sids(tmp_path, stream, {})
    record = read_json(tmp_path / "ids.json")
    for change in ({"current": 3}, {"versions": [{**record["versions"][0], "version": 3}]}):
        write_json(tmp_path / "ids.json", {**record, **change})
        with pytest.raises(DataError, match=r"ids\.json has .*versions 2, 3, … in order"):
            load_sids(tmp_path, stream)
    write_json(tmp_path / "ids.json", record)
    place = version_folder(tmp_path, 2)
    replace(read_sids(tmp_path), version=7).save(place / "sids.parquet")
    with pytest.raises(DataError, match=r"sids\.parquet is version 7 of the IDs"):
        read_sids(tmp_path)
    (place / "sids.parquet").unlink()
    with pytest.raises(DataError, match=r"00002 has no sids\.parquet"):
        read_sids(tmp_path)


DIES = """
import os, signal, sys, warnings
from pathlib import Path
from cladapt.data.schema import Stream
from cladapt.tokens import refresh
from cladapt.tokens.sids import SidTable

warnings.simplefilter("ignore")
owner = {"save": SidTable, "save_versions": refresh}[sys.argv[2]]
setattr(owner, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
folder = Path(sys.argv[1])
refresh.refresh_sids(folder, Stream.load(folder), {})
"""


@pytest.mark.parametrize("at", ["save", "save_versions"])
def test_a_killed_refresh_leaves_the_old_table(at: str, tmp_path: Path) -> None:
    stream = built(tmp_path)
    before = load_sids(tmp_path, stream)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", DIES, str(tmp_path), at]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "ids").is_dir()
    assert versions_of(tmp_path).newest == 1
    assert load_sids(tmp_path, stream).fingerprint == before.fingerprint
    assert refresh_sids(tmp_path, stream, {}).table.version == 2
    assert read_sids(tmp_path).version == 2
