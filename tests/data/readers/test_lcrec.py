"""LC-Rec's json trio: a round trip, the clock of relative positions, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from cladapt.data.readers import ReadOptions, read
from cladapt.errors import ConfigError, DataError

INTER = {"u1": [3, 1, 2, 0], "u2": [1, 3]}
ITEM = {
    "0": {"title": "Zero", "description": "", "brand": None, "categories": "A, B"},
    "1": {"title": "One", "description": ["two", "parts"]},
    "2": {"title": "  Two "},
    "3": {},
}
INDEX = {str(k): ["<a_1>", f"<b_{k}>"] for k in range(4)}


def write(folder: Path, inter: Any = INTER, item: Any = ITEM, index: Any = INDEX) -> Path:
    for name, value in (("inter", inter), ("item", item), ("index", index)):
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / f"Toy.{name}.json").write_text(text)
    return folder


def test_the_trio_is_read_whole(tmp_path: Path) -> None:
    log = read(write(tmp_path))
    assert log.source == "lcrec"
    assert log.dropped == {}
    by_user = log.events.sort("order").group_by("user", maintain_order=True).agg("item")
    assert dict(by_user.iter_rows()) == {"u1": ["3", "1", "2", "0"], "u2": ["1", "3"]}
    assert dict(log.items.rows()) == {"0": "Zero | A, B", "1": "One | two, parts", "2": "Two", "3": ""}
    assert log.index == {item: tuple(tokens) for item, tokens in INDEX.items()}
    assert log.notes == {"users_without_times_ordered_by_relative_position": 2}
    assert set(log.files) == {"Toy.inter.json", "Toy.item.json", "Toy.index.json"}


def test_users_share_a_clock_of_relative_positions(tmp_path: Path) -> None:
    """u1's events stand at 1/8, 3/8, 5/8, 7/8 and u2's at 1/4, 3/4."""
    events = read(write(tmp_path)).events.sort("order")
    assert events["timestamp"].null_count() == events.height
    assert events["user"].to_list() == ["u1", "u2", "u1", "u1", "u2", "u1"]


def test_the_log_alone_is_enough_and_items_without_an_id_are_counted(tmp_path: Path) -> None:
    alone = read(write(tmp_path, item=None, index=None) / "Toy.inter.json")
    assert alone.items.is_empty()
    assert alone.index is None
    write(tmp_path, index={"0": ["<a_1>"]})
    assert read(tmp_path).notes["items_missing_in_index"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inter": [1]}, r"Toy\.inter\.json: expected {user: \[items\]}, found a list"),
        ({"inter": {"u": "1"}}, r"user 'u' has '1', expected a list of item ids"),
        ({"inter": {"u": [1, True]}}, r"user 'u' has \[1, True\]"),
        ({"inter": {"u": [1.5]}}, r"user 'u' has \[1\.5\]"),
        ({"inter": '{"u": [1'}, r"Toy\.inter\.json:1:9: not valid JSON"),
        ({"inter": {}}, "none of the 0 rows can be used"),
        ({"item": {"1": "title"}}, r"Toy\.item\.json: expected {item: {field: text}}"),
        ({"index": {"1": "<a_1>"}}, r"item '1' has '<a_1>', expected a list of tokens"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, **changes), "lcrec")


def test_an_empty_id_is_counted_and_fixed_columns_cannot_be_mapped(tmp_path: Path) -> None:
    log = read(write(tmp_path, inter={"u": ["1", ""], "": ["2"]}))
    assert log.dropped == {"no_item": 1, "no_user": 1}
    with pytest.raises(ConfigError, match="the lcrec format has fixed columns, so --user cannot apply"):
        read(tmp_path, options=ReadOptions(user="u"))
