"""Stream directories from logs and simulations, and the semantic IDs put beside them."""

import json
from pathlib import Path

import polars as pl
import pytest

from cladapt.config import BlocksConfig, SimulateConfig, TokensConfig
from cladapt.data.readers import Columns
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.pipeline import streams

SIMULATE = SimulateConfig(users=60, items=40, topics=4, blocks=3)
TOKENS = TokensConfig(dimensions=8, levels=2, codes=4)
HALVES = BlocksConfig(fractions=(0.5, 0.5), min_events=3)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Four users with six events each, three before and three after noon; item i5 once, item 'late' after noon."""
    rows = [
        {"user": f"u{u}", "item": "late" if (u, k) == (0, 4) else f"i{(u + k) % 5}", "timestamp": 1000 * (k // 3) + k}
        for u in range(4)
        for k in range(6)
    ]
    pl.DataFrame(rows).write_csv(tmp_path / "log.csv")
    return tmp_path / "log.csv"


@pytest.fixture
def simulated(tmp_path: Path) -> Path:
    streams.simulate_data(tmp_path / "stream", SIMULATE)
    return tmp_path / "stream"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_imported_log_is_counted_cut_and_written(log: Path, tmp_path: Path) -> None:
    report = streams.import_data(str(log), tmp_path / "out", "csv", Columns(), HALVES)
    assert (report["users"], report["items"], report["interactions"]) == (4, 6, 24)
    assert [(b["block"], b["interactions"], b["new_items"]) for b in report["blocks"]] == [(1, 12, 5), (2, 12, 1)]
    assert report["stream"] == str(tmp_path / "out")
    assert report["semantic_ids"] == f"none yet: cladapt tokens build {tmp_path / 'out'}"
    assert names(tmp_path / "out") == {"interactions.parquet", "items.parquet", "manifest.json"}
    stream = Stream.load(tmp_path / "out")
    assert stream.items.filter(pl.col("first_block") == 2)["item"].to_list() == ["late"]


def test_what_was_dropped_is_reported(log: Path, tmp_path: Path) -> None:
    with log.open("a") as handle:
        handle.write("rare,i1,0\n")
    config = BlocksConfig(fractions=(0.52, 0.48), k_core=2)
    report = streams.import_data(str(log), tmp_path / "out", "csv", Columns(), config)
    assert (report["users"], report["interactions"]) == (4, 23)
    assert report["dropped"] == {"k_core": 2}  # of `rare`, and of the item that block 1 has once


def test_weights_come_along_and_change_nothing_else(log: Path, tmp_path: Path) -> None:
    frame = pl.read_csv(log).with_columns(stars=pl.int_range(1, pl.len() + 1) / 2)
    frame.write_csv(tmp_path / "rated.csv")
    rated = str(tmp_path / "rated.csv")
    plain = streams.import_data(rated, tmp_path / "plain", "csv", Columns(), HALVES)
    report = streams.import_data(rated, tmp_path / "weighted", "csv", Columns(weight="stars"), HALVES)
    assert report["notes"] == {**plain["notes"], "weights_kept_but_unused_in_training": 24}
    assert report["blocks"] == plain["blocks"]
    stream = Stream.load(tmp_path / "weighted")
    assert stream.interactions.drop("weight").equals(Stream.load(tmp_path / "plain").interactions)
    truth = dict(zip(frame.select("user", "item", "timestamp").rows(), frame["stars"], strict=True))
    keys = stream.interactions.select("user", "item", "timestamp").rows()
    assert stream.interactions["weight"].to_list() == [truth[key] for key in keys]
    assert streams.check_data(tmp_path / "weighted")["blocks"] == plain["blocks"]
    ids = [streams.build_tokens(tmp_path / name, TOKENS, index(stream, tmp_path)) for name in ("plain", "weighted")]
    assert ids[0]["fingerprint"] == ids[1]["fingerprint"]


def index(stream: Stream, folder: Path) -> Path:
    tokens = {item: ["<a_0>", f"<b_{n}>"] for n, item in enumerate(stream.items["item"])}
    (folder / "ids.json").write_text(json.dumps(tokens))
    return folder / "ids.json"


def test_a_source_is_told_from_a_stream(log: Path, simulated: Path, tmp_path: Path) -> None:
    assert streams.is_source(log, "auto")
    assert streams.is_source(tmp_path / "*.csv", "auto")
    assert not streams.is_source(simulated, "auto")  # its parquet files are no log
    assert streams.is_source(simulated, "parquet")
    (simulated / "manifest.json").unlink()
    assert not streams.is_source(simulated, "auto")
    assert not streams.is_source(tmp_path / "nowhere", "auto")


def test_checking_a_source_tells_what_importing_it_does(log: Path, tmp_path: Path) -> None:
    with log.open("a") as handle:
        handle.write("u0,i1,soon\nu0,i0,0\n,i1,5\n")
    report = streams.check_source(str(log), "auto", Columns(), tmp_path / "rejects.csv")
    imported = streams.import_data(str(log), tmp_path / "out", "auto", Columns(), HALVES)
    assert report["dropped"] == {"bad_time": 1, "duplicate": 1, "no_user": 1}
    assert {**report["dropped"], "k_core": 0} == imported["dropped"]
    assert [report[key] for key in ("users", "items", "interactions")] == [4, 6, 24]
    assert (report["first"], report["last"]) == (0, 1005)
    assert (report["out_of_order"], report["weighted"], report["semantic_ids"]) == (0, False, 0)
    assert report["repeated_user_item_pairs"] == streams.data_stats(tmp_path / "out")["repeated_user_item_pairs"]
    assert report["rejects"] == [
        {"file": str(log), "line": 26, "reason": "bad_time", "value": "soon"},
        {"file": str(log), "line": 27, "reason": "duplicate", "value": "u0 i0 0.0"},
        {"file": str(log), "line": 28, "reason": "no_user", "value": ""},
    ]
    assert pl.read_csv(tmp_path / "rejects.csv").fill_null("").to_dicts() == report["rejects"]


def test_totals_by_hand(log: Path, tmp_path: Path) -> None:
    streams.import_data(str(log), tmp_path / "out", "csv", Columns(), HALVES)
    stats = streams.data_stats(tmp_path / "out")
    assert stats["density"] == pytest.approx(24 / (4 * 6))
    assert stats["events_per_user"] == {"mean": 6.0, "median": 6.0, "max": 6}
    most = max(Stream.load(tmp_path / "out").interactions["item"].value_counts()["count"].to_list())
    assert stats["share_of_head_items"] == pytest.approx(most / 24)  # one of six items is the head
    assert stats["repeated_user_item_pairs"] == 8  # each user has met the item of its last event before, u0 at k = 5
    assert stats["items_with_text"] == 0


def test_simulating_reports_what_checking_finds(tmp_path: Path) -> None:
    report = streams.simulate_data(tmp_path / "stream", SIMULATE)
    checked = streams.check_data(tmp_path / "stream")
    assert (report["users"], report["items"]) == (60, 40)
    assert report["blocks"] == checked["blocks"]
    assert "semantic_ids" not in checked
    assert checked["fingerprint"] == Stream.load(tmp_path / "stream").fingerprint


def test_ids_are_built_once_and_inspected(simulated: Path) -> None:
    report = streams.build_tokens(simulated, TOKENS, None)
    assert {"sids.parquet", "codebooks.safetensors"} <= names(simulated)
    assert (report["items"], report["distinct"]) == (40, 40)
    assert streams.inspect_tokens(simulated) == report
    assert streams.check_data(simulated)["semantic_ids"] == 40
    table = streams.load_sids(simulated, Stream.load(simulated))
    assert table.fingerprint == report["fingerprint"]
    assert report["example"]["i00"] == table.codes[0].tolist()
    with pytest.raises(ConfigError, match=r"sids\.parquet exists: bases were made for it \(remove it"):
        streams.build_tokens(simulated, TOKENS, None)


def test_ids_of_an_index_are_taken_in_the_order_of_the_items(simulated: Path, tmp_path: Path) -> None:
    items = Stream.load(simulated).items["item"].to_list()
    index = {item: [f"<a_{n % 7}>", f"<b_{n // 7}>"] for n, item in enumerate(items)}
    (tmp_path / "index.json").write_text(json.dumps(dict(reversed(index.items()))))
    report = streams.build_tokens(simulated, TOKENS, tmp_path / "index.json")
    table = streams.load_sids(simulated, Stream.load(simulated))
    assert table.items == tuple(items)
    assert table.codes.tolist() == [[n % 7, n // 7] for n in range(40)]
    assert report["distinct"] == 40
    assert "codebooks.safetensors" not in names(simulated)


def test_an_incomplete_index_writes_nothing(simulated: Path, tmp_path: Path) -> None:
    before = names(simulated)
    (tmp_path / "index.json").write_text('{"i01": ["<a_0>"]}')
    with pytest.raises(DataError, match="39 of 40 items have no semantic ID: 'i00', 'i02'"):
        streams.build_tokens(simulated, TOKENS, tmp_path / "index.json")
    assert names(simulated) == before


def test_missing_ids_say_how_to_make_them(simulated: Path) -> None:
    with pytest.raises(DataError, match=r"has no sids\.parquet \(give its items semantic IDs: cladapt tokens build"):
        streams.inspect_tokens(simulated)


def test_a_folder_that_holds_something_is_never_taken(log: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for out in (tmp_path / "full", log):
        with pytest.raises(ConfigError, match=r"exists and is not empty \(choose another --out"):
            streams.simulate_data(out, SIMULATE)
        with pytest.raises(ConfigError, match="exists and is not empty"):
            streams.import_data(str(log), out, "csv", Columns(), HALVES)
    assert names(tmp_path / "full") == {"mine.txt"}
    (tmp_path / "empty").mkdir()
    streams.simulate_data(tmp_path / "empty", SIMULATE)


def test_a_log_that_cannot_be_cut_leaves_no_folder(log: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="k_core=100 leaves none"):
        streams.import_data(str(log), tmp_path / "out", "csv", Columns(), HALVES.model_copy(update={"k_core": 100}))
    assert not (tmp_path / "out").exists()


def test_a_changed_file_is_noticed(simulated: Path) -> None:
    frame = pl.read_parquet(simulated / "items.parquet")
    frame.with_columns(text=pl.lit("other")).write_parquet(simulated / "items.parquet")
    with pytest.raises(DataError, match=r"items\.parquet is not the file its manifest was written for"):
        streams.check_data(simulated)
