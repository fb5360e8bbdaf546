"""Stream directories from logs and simulations, and the semantic IDs put beside them."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from cladapt.config import BlocksConfig, SimulateConfig, TokensConfig
from cladapt.data.readers import ReadOptions
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError, EnvironmentProblem
from cladapt.lock import locked
from cladapt.pipeline import streams

SIMULATE = SimulateConfig(users=60, items=40, topics=4, blocks=3)
TOKENS = TokensConfig(dimensions=8, levels=2, codes=4, capacity=16)
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
    report = streams.import_data(str(log), tmp_path / "out", "csv", ReadOptions(), HALVES)
    assert (report["users"], report["items"], report["interactions"]) == (4, 6, 24)
    assert [(b["block"], b["interactions"], b["new_items"]) for b in report["blocks"]] == [(1, 12, 5), (2, 12, 1)]
    assert report["stream"] == str(tmp_path / "out")
    assert report["semantic_ids"].startswith("none, and no item of block 1 has a text")
    assert names(tmp_path / "out") == {"interactions", "items", "manifest.json"}
    stream = Stream.load(tmp_path / "out")
    assert stream.items.filter(pl.col("first_block") == 2)["item"].to_list() == ["late"]


def test_what_was_dropped_is_reported(log: Path, tmp_path: Path) -> None:
    with log.open("a") as handle:
        handle.write("rare,i1,0\n")
    config = BlocksConfig(fractions=(0.52, 0.48), k_core=2)
    report = streams.import_data(str(log), tmp_path / "out", "csv", ReadOptions(), config)
    assert (report["users"], report["interactions"]) == (4, 23)
    assert report["dropped"] == {"k_core": 2}  # of `rare`, and of the item that block 1 has once


def test_weights_come_along_and_change_nothing_else(log: Path, tmp_path: Path) -> None:
    frame = pl.read_csv(log).with_columns(stars=pl.int_range(1, pl.len() + 1) / 2)
    frame.write_csv(tmp_path / "rated.csv")
    rated = str(tmp_path / "rated.csv")
    plain = streams.import_data(rated, tmp_path / "plain", "csv", ReadOptions(), HALVES)
    report = streams.import_data(rated, tmp_path / "weighted", "csv", ReadOptions(weight="stars"), HALVES)
    assert plain["notes"].pop("ratings_ignored") == 24
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
    report = streams.check_source(str(log), "auto", ReadOptions(), HALVES, tmp_path / "rejects.csv")
    imported = streams.import_data(str(log), tmp_path / "out", "auto", ReadOptions(), HALVES)
    assert report["dropped"] == {"bad_time": 1, "duplicate": 1, "no_user": 1, "k_core": 0}
    both = ("users", "items", "interactions", "items_with_text", "dropped", "notes", "warnings", "losses", "blocks")
    assert {name: report[name] for name in both} == {name: imported[name] for name in both}
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
    streams.import_data(str(log), tmp_path / "out", "csv", ReadOptions(), HALVES)
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
    before = names(simulated)
    report = streams.build_tokens(simulated, TOKENS, None)
    kept = {"sids.parquet", "tokens.json", "codebooks.safetensors", "embedding.safetensors", "terms.parquet"}
    assert names(simulated) == before | kept
    assert (report["items"], report["distinct"]) == (40, 40)
    assert streams.inspect_tokens(simulated).items() >= report.items()
    assert streams.check_data(simulated)["semantic_ids"] == 40
    table = streams.load_sids(simulated, Stream.load(simulated))
    assert table.fingerprint == report["fingerprint"]
    assert report["example"]["i00"] == table.codes[0].tolist()
    with pytest.raises(ConfigError, match=r"sids\.parquet exists: bases were made for it"):
        streams.build_tokens(simulated, TOKENS, None)


def append_last_block(folder: Path) -> Stream:
    """The stream without its last block gets IDs, then the block comes back."""
    whole = Stream.load(folder)
    whole.prefix(2).save(folder)
    streams.build_tokens(folder, TOKENS, None)
    Stream(whole.interactions, whole.items, Stream.load(folder).manifest).save_after(folder, 2)
    return whole


def test_new_items_get_the_ids_that_they_would_have_had(simulated: Path, tmp_path: Path) -> None:
    streams.simulate_data(tmp_path / "whole", SIMULATE)
    streams.build_tokens(tmp_path / "whole", TOKENS, None)
    whole = append_last_block(simulated)
    new = int((whole.items["first_block"] == 3).sum())
    with pytest.raises(DataError, match=f"{new} of 40 items have no semantic ID"):
        streams.inspect_tokens(simulated)
    with pytest.warns(
        UserWarning, match=r"quantisation error of the new items is 0\.365, more than 1\.5 times block 1's 0"
    ):
        report = streams.extend_tokens(simulated)
    assert (simulated / "sids.parquet").read_bytes() == (tmp_path / "whole" / "sids.parquet").read_bytes()
    assert (report["new_items"], report["items"], report["result"]) == (new, 40, "extended")
    assert (report["items_sharing_an_id"], report["items_without_text"]) == (0, 0)
    found = streams.inspect_tokens(simulated)
    groups = Counter(tuple(row[:2]) for row in streams.load_sids(simulated, whole).codes.tolist())
    assert (found["capacity"], found["fullest_group"]) == (16, max(groups.values()))
    assert (report["capacity"], report["fingerprint"]) == (16, found["fingerprint"])
    assert [row["items"] for row in report["drift"]] == ["block 1", "new items"]
    assert all(0 < row["quantisation_error"] < 1 and 0 <= row["collisions"] <= 1 for row in report["drift"])
    again = streams.extend_tokens(simulated)
    assert (again["new_items"], again["result"]) == (0, "nothing to do: every item has a semantic ID")
    assert (again["fingerprint"], again["drift"]) == (report["fingerprint"], [])


def test_new_items_get_the_rows_of_an_index(simulated: Path, tmp_path: Path) -> None:
    whole = append_last_block(simulated)
    new = whole.items.filter(pl.col("first_block") == 3)["item"].to_list()
    (tmp_path / "rows.json").write_text(
        json.dumps({item: ["<a_1>", "<b_2>", f"<c_{k}>"] for k, item in enumerate(new)})
    )
    report = streams.extend_tokens(simulated, tmp_path / "rows.json")
    assert (report["new_items"], report["drift"], "items_without_text" in report) == (len(new), [], False)
    assert streams.load_sids(simulated, whole).align(new).codes.tolist() == [[1, 2, k] for k in range(len(new))]


def test_ids_without_numbers_have_no_capacity_to_fill(simulated: Path) -> None:
    report = streams.build_tokens(simulated, TOKENS.model_copy(update={"deduplicate": False}), None)
    assert "capacity" not in report
    assert len(report["levels"]) == 2


def test_ids_that_were_removed_leave_nothing_for_those_of_an_index(simulated: Path, tmp_path: Path) -> None:
    streams.build_tokens(simulated, TOKENS, None)
    (simulated / "sids.parquet").unlink()
    report = streams.build_tokens(simulated, TOKENS, index(Stream.load(simulated), tmp_path))
    assert not (simulated / "tokens.json").exists()
    assert (report["capacity"], report["fullest_group"]) == (64, 40)  # 40 items of one code: the next power of two


def test_a_stream_in_use_gets_no_ids(simulated: Path) -> None:
    with locked(simulated), pytest.raises(EnvironmentProblem, match="is in use"):
        streams.build_tokens(simulated, TOKENS, None)
    append_last_block(simulated)
    with locked(simulated), pytest.raises(EnvironmentProblem, match="is in use"):
        streams.extend_tokens(simulated)


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
            streams.import_data(str(log), out, "csv", ReadOptions(), HALVES)
    assert names(tmp_path / "full") == {"mine.txt"}
    (tmp_path / "empty").mkdir()
    streams.simulate_data(tmp_path / "empty", SIMULATE)


def test_a_log_that_cannot_be_cut_leaves_no_folder(log: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="k_core=100 leaves none"):
        streams.import_data(str(log), tmp_path / "out", "csv", ReadOptions(), HALVES.model_copy(update={"k_core": 100}))
    assert not (tmp_path / "out").exists()


def test_a_changed_file_is_noticed(simulated: Path) -> None:
    file = simulated / "items" / "block_00002.parquet"
    pl.read_parquet(file).with_columns(text=pl.lit("other")).write_parquet(file)
    with pytest.raises(DataError, match=r"block_00002\.parquet is not the file its manifest was written for"):
        streams.check_data(simulated)


def test_a_check_fails_where_an_import_would_and_shows_some_rejects(log: Path, tmp_path: Path) -> None:
    with log.open("a") as handle:
        handle.write(",i1,5\n")
    with pytest.raises(DataError) as checked:
        streams.check_source(
            str(log), "auto", ReadOptions(), HALVES.model_copy(update={"k_core": 100}), tmp_path / "rejects.csv"
        )
    with pytest.raises(DataError) as error:
        streams.import_data(
            str(log), tmp_path / "out", "auto", ReadOptions(), HALVES.model_copy(update={"k_core": 100})
        )
    assert checked.value.hint == error.value.hint
    assert checked.value.message == f"{error.value.message}; rejected rows: 1, the first: {log}:26: no_user ''"
    assert pl.read_csv(tmp_path / "rejects.csv").height == 1


def test_a_stream_remembers_how_its_log_was_read(log: Path, tmp_path: Path) -> None:
    options = ReadOptions(where=("timestamp < 1005",), items=log, text=("item",), time_unit="s")
    streams.import_data(str(log), tmp_path / "out", "auto", options, HALVES)
    kept = json.loads((tmp_path / "out" / "manifest.json").read_text())["import"]
    assert ReadOptions.from_settings(kept) == ("csv", options)
    assert kept["where"] == ["timestamp < 1005"]
    folder = tmp_path / "out" / "sub"
    assert not folder.exists()


def test_the_next_step_is_one_that_can_work(log: Path, tmp_path: Path) -> None:
    plain = streams.import_data(str(log), tmp_path / "plain", "csv", ReadOptions(), HALVES)
    assert plain["items_with_text"] == 0
    for cure in ("--text COL", "--items TABLE", f"cladapt tokens build {tmp_path / 'plain'} --index FILE"):
        assert cure in plain["semantic_ids"]
    with pytest.raises(DataError, match="all 5 items known at block 1 have an empty text") as error:
        streams.build_tokens(tmp_path / "plain", TOKENS, None)
    for cure in ("--text COL", "--items TABLE", '--index FILE`, FILE being {"item": ["<a_1>", "<b_7>"], …}'):
        assert cure in error.value.hint
    (tmp_path / "items.csv").write_text("item,title\ni0,zero\ni1,one\n")
    partly = streams.import_data(
        str(log), tmp_path / "partly", "csv", ReadOptions(items=tmp_path / "items.csv"), HALVES
    )
    assert partly["semantic_ids"] == f"none yet: cladapt tokens build {tmp_path / 'partly'}"
    assert (partly["items_with_text"], partly["notes"]["items_without_text"]) == (2, 4)


def test_ready_made_blocks_from_any_number_are_the_blocks_in_order(log: Path, tmp_path: Path) -> None:
    frame = pl.read_csv(log).with_columns(block=pl.when(pl.col("timestamp") < 1000).then(-3).otherwise(40))
    frame.write_csv(tmp_path / "blocks.csv")
    report = streams.import_data(
        str(tmp_path / "blocks.csv"), tmp_path / "out", "csv", ReadOptions(block="block"), BlocksConfig()
    )
    assert [(row["block"], row["interactions"]) for row in report["blocks"]] == [(1, 12), (2, 12)]
    assert report["notes"]["blocks_renumbered_from_1"] == 2


def test_rejected_weights_are_named_where_they_empty_a_block(log: Path, tmp_path: Path) -> None:
    frame = pl.read_csv(log).with_columns(w=pl.when(pl.col("timestamp") < 1000).then(1.0).otherwise(0.0))
    frame.write_csv(tmp_path / "weighted.csv")
    dates = BlocksConfig(dates=("1970-01-02",))
    with pytest.raises(DataError) as error:
        streams.import_data(str(tmp_path / "weighted.csv"), tmp_path / "out", "csv", ReadOptions(weight="w"), dates)
    assert error.value.hint.startswith("12 of 24 rows (50%) are rejected as bad_weight, the first '0.0': weights are")
    assert "min_events" not in error.value.hint


def limited(size: int, target: Path, log: Path) -> tuple[int, str]:
    """An import in a process whose files may not grow beyond `size` bytes, which a full disk looks like."""
    code = (
        "import resource, signal, sys\n"
        "from cladapt_cli.app import run\n"
        "import cladapt.pipeline.streams\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        f"sys.exit(run(['data', 'import', {str(log)!r}, '--out', {str(target)!r}, '--fractions', '0.5,0.5']))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("size", [200, 1_990])
def test_a_full_disk_is_a_problem_of_the_machine_and_leaves_nothing(size: int, tmp_path: Path) -> None:
    """The second size holds the parquet files and not the manifest, or the IDs."""
    (tmp_path / "log").mkdir()
    users = {f"u{u}": [f"item number {(u + k) % 9}" for k in range(6)] for u in range(4)}
    (tmp_path / "log" / "T.inter.json").write_text(json.dumps(users))
    index = {f"item number {n}": ["<a_0>", f"<b_{n}>"] for n in range(9)}
    (tmp_path / "log" / "T.index.json").write_text(json.dumps(index))
    code, err = limited(size, tmp_path / "out", tmp_path / "log")
    assert code == 4, err
    assert f"error: cannot write {tmp_path / 'out'}/" in err
    assert ".tmp" not in err
    assert "check the permissions and the free space there" in err
    assert names(tmp_path) == {"log"}


def test_ids_that_do_not_fit_leave_no_stream(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "T.inter.json").write_text(json.dumps({f"u{u}": ["x", "y", "x", "y"] for u in range(4)}))
    (tmp_path / "l" / "T.index.json").write_text(json.dumps({"x": ["<a_0>"], "y": ["<a_1>"]}))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cladapt.tokens.sids.write_parquet", full)
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*out: No space left on device"):
        streams.import_data(str(tmp_path / "l"), tmp_path / "out", "lcrec", ReadOptions(), HALVES)
    assert names(tmp_path) == {"l", "log.csv"}


VALID = "Quantity > 0 AND UnitPrice > 0 AND CustomerID IS NOT NULL"


def test_online_retail_imports_with_its_titles_and_the_losses_of_an_independent_count(
    real_data: Callable[[str], Path], tmp_path: Path
) -> None:
    source = real_data("online-retail")
    options = ReadOptions("CustomerID", "StockCode", "InvoiceDate", text=("Description",), where=(VALID,))
    report = streams.import_data(str(source), tmp_path / "out", "auto", options, BlocksConfig())
    rows = pl.read_parquet(source / "online_retail.parquet")
    bought = rows.filter(pl.col("CustomerID").is_not_null(), pl.col("Quantity") > 0, pl.col("UnitPrice") > 0)
    distinct = bought.unique(["CustomerID", "StockCode", "InvoiceDate"])
    assert (bought.height, bought["CustomerID"].n_unique()) == (397_884, 4_338)  # what the data's README says
    customers = rows["CustomerID"].drop_nulls().n_unique()
    assert report["losses"][:2] == [
        {
            "loss": "dropped by where",
            "events": rows.height - bought.height,
            "events_share": pytest.approx((rows.height - bought.height) / rows.height),
            "users": customers - 4_338,
            "users_share": pytest.approx((customers - 4_338) / customers),
        },
        {
            "loss": "rejected as duplicate",
            "events": bought.height - distinct.height,
            "events_share": pytest.approx((bought.height - distinct.height) / rows.height),
            "users": 0,
            "users_share": 0.0,
        },
    ]
    assert report["dropped"] == {"where": 144_025, "duplicate": bought.height - distinct.height, "k_core": 0}
    assert (report["users"], report["interactions"]) == (4_338, distinct.height)
    often = distinct.sort("InvoiceDate").with_columns(day=pl.col("InvoiceDate").dt.epoch("s"))
    for row in report["blocks"]:
        inside = often.filter(pl.col("day").is_between(row["first"], row["last"]))
        active = inside.group_by("CustomerID").len().filter(pl.col("len") >= 5).height
        assert (row["interactions"], row["users"], row["tested"]) == (
            inside.height,
            inside["CustomerID"].n_unique(),
            active,
        )
    # a title counts in the block that has the item's first event
    titles: dict[str, Counter[str]] = defaultdict(Counter)
    until: dict[str, int] = {}
    events = bought.unique(["CustomerID", "StockCode", "InvoiceDate"], keep="first", maintain_order=True)
    columns = ("StockCode", pl.col("InvoiceDate").dt.epoch("s"), pl.col("Description").str.strip_chars())
    for code, time, title in events.sort("InvoiceDate", maintain_order=True).select(columns).iter_rows():
        end = until.setdefault(code, next(row["last"] for row in report["blocks"] if time <= row["last"]))
        titles[code].update([title] if time <= end else [])
    items = dict(Stream.load(tmp_path / "out").items.select("item", "text").iter_rows())
    assert items == {code: max(count, key=lambda text: count[text]) for code, count in titles.items()}
    assert report["items_with_text"] == len(titles)
