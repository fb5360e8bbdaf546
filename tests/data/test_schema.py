"""The stream's checks, integer views and files."""

import json
import re
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from cladapt.data import schema
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream, write_manifest
from cladapt.errors import DataError

ROWS = [
    ("zoe", "b", 10, 0, 1),
    ("zoe", "a", 20, 1, 1),
    ("zoe", "c", 90, 2, 2),
    ("ann", "c", 95, 0, 2),
]


def interactions(rows: list[tuple[str, str, int, int, int]] = ROWS) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=INTERACTIONS, orient="row")


def items(names: str = "abcd", first_block: tuple[int, ...] = (1, 1, 2, 3)) -> pl.DataFrame:
    return pl.DataFrame({"item": list(names), "text": [""] * len(names), "first_block": first_block}, schema=ITEMS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Stream(interactions().sort("user", "position"), items("abc", (1, 1, 2)), {"source": "test"}).save(
        tmp_path / "stream"
    )
    return tmp_path / "stream"


def test_integer_views_index_users_by_first_row_and_items_by_table_row() -> None:
    stream = Stream(interactions(), items())
    assert stream.users == ["zoe", "ann"]
    assert (stream.user_index.tolist(), stream.user_index.dtype) == ([0, 0, 0, 1], "int32")
    assert (stream.item_index.tolist(), stream.item_index.dtype) == ([1, 0, 2, 2], "int32")
    assert (stream.block.tolist(), stream.block.dtype) == ([1, 1, 2, 2], "int32")
    assert (stream.n_blocks, stream.n_items) == (2, 4)


def test_catalogue_grows_with_the_first_blocks() -> None:
    stream = Stream(interactions(), items())
    assert [stream.catalogue(block).tolist() for block in (0, 1, 2, 3)] == [[], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_wrong_columns_are_named_with_the_expected_ones() -> None:
    with pytest.raises(
        DataError, match=r"stream interactions has the columns .*Int32.* \(expected .*'position': Int64"
    ):
        Stream(interactions().with_columns(pl.col("position").cast(pl.Int32)), items())
    with pytest.raises(DataError, match=r"stream items has the columns \{'item': String, 'text': String\}"):
        Stream(interactions(), items().drop("first_block"))


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(DataError, match=r"the stream has no interactions \(loosen the filters"):
        Stream(interactions([]), items())


def test_an_item_listed_twice_is_named() -> None:
    with pytest.raises(DataError, match=r"item 'b' is listed twice in the item table \(keep one row per item\)"):
        Stream(interactions(), items("abcb"))


def test_interactions_with_unknown_items_are_counted_and_the_first_named() -> None:
    with pytest.raises(DataError, match=r"2 interactions name items that the item table lacks, the first 'c'"):
        Stream(interactions(), items("ab", (1, 1)))


def test_save_and_load_keep_frames_and_manifest(saved: Path) -> None:
    stream = Stream.load(saved)
    assert stream.interactions.equals(interactions().sort("user", "position"))
    assert stream.items.equals(items("abc", (1, 1, 2)))
    assert stream.manifest["source"] == "test"
    assert [set(files) for files in stream.manifest["hashes"]] == [{"interactions", "items"}] * 2


def test_saving_a_loaded_stream_again_keeps_its_fingerprint(saved: Path, tmp_path: Path) -> None:
    stream = Stream.load(saved)
    stream.save(tmp_path / "copy")
    assert Stream.load(tmp_path / "copy").fingerprint == stream.fingerprint


def test_fingerprint_follows_the_content(saved: Path, tmp_path: Path) -> None:
    Stream(interactions(ROWS[:3]), items("abc", (1, 1, 2))).save(tmp_path / "other")
    assert Stream.load(tmp_path / "other").fingerprint != Stream.load(saved).fingerprint


def test_a_stream_that_was_never_saved_has_no_fingerprint() -> None:
    with pytest.raises(DataError, match=r"this stream was not read from files, so it has no fingerprint"):
        _ = Stream(interactions(), items()).fingerprint


def test_a_folder_without_a_manifest_is_no_stream(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a stream directory: it has no manifest\.json.*cladapt data import"):
        Stream.load(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "found"), [({"schema_version": 99}, "99"), ({}, "None"), ([], "None")], ids=["later", "none", "list"]
)
def test_another_schema_version_is_refused(saved: Path, manifest: object, found: str) -> None:
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        DataError, match=rf"manifest\.json: schema_version {found} \(this version reads 2: import the source again\)"
    ):
        Stream.load(saved)


@pytest.mark.parametrize("name", ["interactions/block_00002.parquet", "items/block_00001.parquet"])
def test_a_tampered_file_is_detected(saved: Path, name: str) -> None:
    frame = pl.read_parquet(saved / name)
    frame.with_columns(item="item" + pl.col("item")).write_parquet(saved / name)
    with pytest.raises(DataError, match=rf"{name} is not the file its manifest was written for"):
        Stream.load(saved)


@pytest.mark.parametrize("name", ["interactions/block_00002.parquet", "items/block_00001.parquet"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(DataError, match=rf"no such file: .*{name}"):
        Stream.load(saved)


def test_a_file_with_wrong_columns_is_named(saved: Path) -> None:
    items().drop("text").write_parquet(saved / "items" / "block_00002.parquet")
    with pytest.raises(DataError, match=r"block_00002\.parquet: wrong columns \(text: missing\)"):
        Stream.load(saved)


def test_weights_are_an_optional_last_column_that_survives_the_files(tmp_path: Path) -> None:
    plain = interactions().sort("user", "position")
    weighted = plain.with_columns(weight=pl.Series([0.5, 1.0, 2.0, 1e-9]))
    stream = Stream(weighted, items())
    assert stream.weighted
    assert not Stream(plain, items()).weighted
    stream.save(tmp_path / "s")
    loaded = Stream.load(tmp_path / "s")
    assert loaded.interactions.equals(weighted)
    for view in ("users", "user_index", "item_index", "block"):
        assert list(getattr(loaded, view)) == list(getattr(Stream(plain, items()), view))
    with pytest.raises(DataError, match=r"stream interactions has the columns .*'weight': Int64"):
        Stream(weighted.with_columns(pl.col("weight").cast(pl.Int64)), items())


def grown(rows: list[tuple[str, str, int, int, int]], names: str, first_block: tuple[int, ...]) -> Stream:
    return Stream(interactions(rows).sort("user", "position"), items(names, first_block), {"source": "test"})


LONG = [*ROWS, ("bob", "d", 99, 0, 3), ("zoe", "a", 98, 3, 3)]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    grown(LONG, "abcd", (1, 1, 2, 3)).save(tmp_path / "three")
    return tmp_path / "three"


def withdrawing(folder: Path, *rows: tuple[str, int, int | None]) -> Stream:
    """The stream of a folder after its manifest has got these withdrawals."""
    write_manifest(folder, {**Stream.load(folder).manifest, "withdrawn": [list(row) for row in rows]})
    return Stream.load(folder)


def test_a_prefix_is_the_short_stream(three: Path, saved: Path, tmp_path: Path) -> None:
    long, short = Stream.load(three), Stream.load(saved)
    for block, folder in ((2, saved), (1, tmp_path / "one")):
        if block == 1:
            grown(ROWS[:2], "ab", (1, 1)).save(folder)
        short, prefix = Stream.load(folder), long.prefix(block)
        assert prefix.interactions.equals(short.interactions)
        assert prefix.items.equals(short.items)
        assert prefix.manifest["hashes"] == short.manifest["hashes"]
        assert prefix.fingerprints == short.fingerprints == long.fingerprints[:block]
        assert [prefix.known(t).tolist() for t in range(4)] == [short.known(t).tolist() for t in range(4)]
    assert long.prefix(3) is long
    for block in (0, 4):
        with pytest.raises(DataError, match=rf"the stream has no block {block} \(choose one of 1..3\)"):
            long.prefix(block)


def test_every_prefix_has_a_fingerprint_that_finds_home(three: Path, tmp_path: Path) -> None:
    stream = Stream.load(three)
    assert len(set(stream.fingerprints)) == 3
    assert stream.fingerprint == stream.fingerprints[-1]
    assert [stream.home_of(fingerprint) for fingerprint in stream.fingerprints] == [1, 2, 3]
    assert stream.home_of("another") is None
    assert stream.home_of(None) is None
    write_manifest(three, {**stream.manifest, "earlier": [["x", "y"], ["z"]]})
    again = Stream.load(three)
    assert [again.home_of(name) for name in ("x", "y", "z", stream.fingerprint)] == [1, 2, 1, 3]
    other = Stream(stream.interactions, stream.items, {"config": {"min_events": 7}})
    other.save(tmp_path / "other")
    assert not set(Stream.load(tmp_path / "other").fingerprints) & set(stream.fingerprints)


def test_withdrawn_items_are_known_and_in_no_catalogue_of_their_blocks(three: Path) -> None:
    plain = Stream.load(three)
    stream = withdrawing(three, ("a", 2, 2), ("b", 3, None), ("c", 4, None))
    assert [stream.catalogue(t).tolist() for t in (1, 2, 3)] == [[0, 1], [1, 2], [0, 2, 3]]
    assert [stream.known(t).tolist() for t in (1, 2, 3)] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert stream.offered().tolist() == [0, 3]
    assert stream.fingerprints[0] == plain.fingerprints[0]
    assert stream.fingerprints[1] != plain.fingerprints[1]
    # of the end of block 1 nothing of this is known
    assert stream.prefix(1).withdrawn == ()
    assert stream.prefix(2).withdrawn == (("a", 2, None),)
    assert stream.prefix(2).fingerprints == stream.fingerprints[:2]
    later = withdrawing(three, ("c", 4, None))
    assert later.fingerprints == plain.fingerprints


def test_blocks_are_added_without_touching_those_before_and_count_when_the_manifest_names_them(
    saved: Path, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in saved.rglob("*.parquet")}
    manifest = (saved / "manifest.json").read_bytes()
    old, long = Stream.load(saved), grown(LONG, "abcd", (1, 1, 2, 3))
    long = replace(long, manifest=old.manifest)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(schema, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            long.save_after(saved, 2)
    assert (saved / "interactions" / "block_00003.parquet").is_file()
    assert (saved / "manifest.json").read_bytes() == manifest
    assert Stream.load(saved).fingerprints == old.fingerprints
    assert Stream.load(saved).interactions.equals(old.interactions)
    long.save_after(saved, 2)
    assert {path: path.read_bytes() for path in before} == before
    whole = Stream.load(three)
    assert Stream.load(saved).fingerprints == whole.fingerprints
    assert Stream.load(saved).interactions.equals(whole.interactions)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hashes", [], "hashes=[]: List should have at least 1 item"),
        ("hashes", [{"interactions": "a"}], "lacks hashes.0.items"),
        ("hashes", {"interactions.parquet": "a"}, "hashes={'interactions.parquet': 'a'}"),
        ("withdrawn", [["a", "1", None]], "withdrawn.0.1='1'"),
        ("withdrawn", [["a", 1]], "withdrawn.0"),
        ("earlier", ["x"], "earlier.0='x'"),
        ("config", {"min_events": "five"}, "config.min_events='five'"),
        ("cuts", [{"until": "soon"}], "cuts.0.until='soon'"),
        ("cuts", [{"until": 5, "number": None}], "lacks cuts.0.late"),
        ("cuts", [], "has 0 cuts and 2 blocks"),
    ],
)
def test_a_wrong_entry_of_the_manifest_is_named(saved: Path, key: str, value: object, said: str) -> None:
    write_manifest(saved, {**Stream.load(saved).manifest, key: value})
    with pytest.raises(DataError, match=rf"manifest\.json .*{re.escape(said)}"):
        Stream.load(saved)
