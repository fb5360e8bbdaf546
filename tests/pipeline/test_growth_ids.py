"""Semantic IDs of a stream that is imported and appended to with an index in its logs."""

import csv
from pathlib import Path

import pytest

from cladapt.config import BlocksConfig, TokensConfig
from cladapt.data.readers import ReadOptions
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.pipeline.growth import append_data
from cladapt.pipeline.streams import build_tokens, extend_tokens, import_data
from cladapt.tokens.build import load_sids

FIRST, LATER = range(12), range(12, 20)


def log(path: Path, times: range, ids: dict[int, str] | None = None) -> str:
    """A csv of MiniOneRec: user t % 3 meets item t // 2 at time t."""
    header = ["user_id", "item_id", "history_item_id", "item_title", "timestamp", "item_sid"]
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        for t in times:
            sid = (ids or {}).get(t // 2, f"<a_{t // 8}><b_{t // 2}>")
            writer.writerow([f"u{t % 3}", f"i{t // 2}", "[]", f"title {t // 2}", t, sid])
    return str(path)


def imported(out: Path, source: str) -> Path:
    import_data(source, out, "minionerec", ReadOptions(), BlocksConfig(fractions=(1.0,), min_events=3))
    return out


def test_new_items_get_the_ids_that_come_with_a_log(tmp_path: Path) -> None:
    stream = imported(tmp_path / "stream", log(tmp_path / "first.csv", FIRST))
    report = append_data(stream, log(tmp_path / "all.csv", range(20)))
    assert (report["new_items"], report["semantic_ids"]) == (4, "from the log, of 4 new items")
    table = load_sids(stream, Stream.load(stream))
    assert table.items == tuple(f"i{n}" for n in range(10))
    assert table.codes.tolist() == [[n // 4, n] for n in range(10)]
    assert table.sizes == (64, 512)
    again = append_data(stream, str(tmp_path / "all.csv"))
    assert (again["new_items"], "semantic_ids" in again) == (0, False)


def test_ids_that_do_not_go_on_with_those_of_the_stream_are_not_taken(tmp_path: Path) -> None:
    stream = imported(tmp_path / "stream", log(tmp_path / "first.csv", FIRST))
    report = append_data(stream, log(tmp_path / "more.csv", LATER, {9: "<a_64><b_0>"}))
    assert report["appended_blocks"] == [2]
    warning = report["warnings"][-1]
    assert "are not taken: item 'i9' has the code 64 at level 1, whose capacity is 64" in warning
    assert report["semantic_ids"] == f"4 new items have none yet: cladapt tokens extend {stream}"
    with pytest.raises(DataError, match="4 of 10 items have no semantic ID"):
        load_sids(stream, Stream.load(stream))
    assert append_data(stream, log(tmp_path / "mended.csv", range(20)))["semantic_ids"].startswith("from the log")


def test_ids_built_from_text_stay_apart_from_those_of_a_log(tmp_path: Path) -> None:
    stream = imported(tmp_path / "stream", log(tmp_path / "first.csv", FIRST))
    (stream / "sids.parquet").unlink()
    build_tokens(stream, TokensConfig(dimensions=2, levels=1, codes=2, capacity=8), None)
    report = append_data(stream, log(tmp_path / "all.csv", range(20)))
    assert report["semantic_ids"] == f"4 new items have none yet: cladapt tokens extend {stream}"
    with pytest.warns(UserWarning, match="quantisation error of the new items"):
        assert extend_tokens(stream)["new_items"] == 4
