"""PESO block files and their index."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cladapt.data.readers import read
from cladapt.errors import DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


BLOCKS: list[dict[str, tuple[list[str], list[str]]]] = [
    {"a": ([], ["x", "y"]), "b": ([], ["y"])},
    {"c": ([], ["z", "z"]), "a": (["x", "y"], ["z"])},
    {"a": (["x", "y", "z"], ["x"]), "d": ([], [])},
]


def write_peso(folder: Path, blocks: list[dict[str, tuple[Any, Any]]] = BLOCKS, dataset: str = "CDs_0.6") -> Path:
    for k, block in enumerate(blocks):
        value = {user: {"previous_block": before, "current_block": now} for user, (before, now) in block.items()}
        write(folder / f"{dataset}.all.block_{k}.json", json.dumps(value))
    return folder


def test_peso_blocks_become_events_in_their_order(tmp_path: Path) -> None:
    log = read(write_peso(tmp_path))
    expected = [("a", "x", 1), ("a", "y", 1), ("b", "y", 1), ("c", "z", 2), ("c", "z", 2), ("a", "z", 2), ("a", "x", 3)]
    assert list(log.events.select("user", "item", "block").iter_rows()) == expected
    assert log.events["order"].to_list() == list(range(7))
    assert log.events["timestamp"].null_count() == 7
    assert (log.source, log.index, log.dropped, log.notes) == ("peso", None, {}, {})
    assert set(log.files) == {f"CDs_0.6.all.block_{k}.json" for k in range(3)}


def test_a_peso_index_is_found_and_lists_the_items(tmp_path: Path) -> None:
    index = {"x": ["<a_1>", "<b_2>"], "y": ["<a_1>", "<b_3>"], "never": ["<a_9>", "<b_9>"]}
    write(write_peso(tmp_path) / "CDs_0.6.index.epoch20.json", json.dumps(index))
    for source in (tmp_path, tmp_path / "CDs_0.6.all.block_0.json"):
        log = read(source)
        assert log.index == {item: tuple(tokens) for item, tokens in index.items()}
        assert list(log.items.iter_rows()) == [("x", ""), ("y", ""), ("never", "")]
        assert "CDs_0.6.index.epoch20.json" in log.files
    assert read(tmp_path).notes == {"items_missing_in_index": 1}


def test_a_previous_block_that_disagrees_is_counted(tmp_path: Path) -> None:
    wrong = [BLOCKS[0], {**BLOCKS[1], "a": (["y", "x"], ["z"])}, {**BLOCKS[2], "d": (["x"], ["y"])}]
    assert read(write_peso(tmp_path, wrong)).notes == {"previous_block_disagrees": 2}


def test_one_peso_file_keeps_its_block_number_and_says_what_it_could_not_check(tmp_path: Path) -> None:
    log = read(write_peso(tmp_path) / "CDs_0.6.all.block_1.json")
    assert log.events["block"].to_list() == [2, 2, 2]
    assert log.notes == {"previous_block_unchecked": 2}


def test_two_peso_datasets_in_a_folder_are_named(tmp_path: Path) -> None:
    write_peso(write_peso(tmp_path), dataset="Games")
    with pytest.raises(DataError, match=r"has the blocks of CDs_0.6 and Games, expected one dataset"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("D.all.block_0.json", "[]", r"D.all.block_0.json: expected {user: …}, found a list"),
        ("D.all.block_0.json", "{", r"D.all.block_0.json:1:2: not valid JSON"),
        ("D.all.block_0.json", '{"a": {"current_block": ["x"]}}', r"user 'a': previous_block is None, expected a list"),
        (
            "D.all.block_0.json",
            '{"a": {"previous_block": [], "current_block": [3]}}',
            r"user 'a': current_block is \[3\], expected a list of item ids",
        ),
        ("D.index.json", '{"x": []}', r"D.index.json: item 'x' has \[\], expected a list of tokens"),
        ("D.index.json", "3", r"D.index.json: expected {item: tokens}, found a int"),
    ],
)
def test_a_malformed_peso_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    write(write_peso(tmp_path, dataset="D") / name, content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_two_peso_indexes_are_refused(tmp_path: Path) -> None:
    write_peso(tmp_path, dataset="D")
    for name in ("D.index.json", "D.index.epoch5.json"):
        write(tmp_path / name, "{}")
    with pytest.raises(DataError, match=r"several semantic-ID indexes: D.index.epoch5.json and D.index.json"):
        read(tmp_path)


def test_the_released_peso_blocks_agree_with_themselves(real_data: Callable[[str], Path]) -> None:
    source = real_data("peso-cds")
    log = read(source)
    assert log.index is not None
    assert len(log.index) == log.items.height == 39_191
    assert len(set(log.index.values())) == 38_508
    counts = log.events.group_by("block").agg(pl.len(), pl.col("user").n_unique()).sort("block")
    assert counts["len"].to_list() == [81_355, 8_686, 7_488, 9_468, 9_421]
    assert counts["user"].to_list() == [8_494, 1_013, 866, 1_078, 1_074]
    assert (log.dropped, log.notes) == ({}, {})
