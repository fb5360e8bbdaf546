"""RecBole's atomic files: a round trip, and every way a file can be wrong."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.data.readers import ReadOptions, read
from cladapt.errors import ConfigError, DataError

INTER = """user_id:token\titem_id:token\trating:float\ttimestamp:float
u1\ti1\t5\t100
u1\ti2\t4\t200.5
u2\ti1\t3\t150
"""
ITEM = """item_id:token\ttitle:token_seq\tprice:float\tbrand:token
i1\tA "quoted title\t3.5\tAcme
i2\tOther\t\t
i9\tNever used\t1\tB
"""


def write(folder: Path, inter: str = INTER, item: str | None = ITEM) -> Path:
    (folder / "toy.inter").write_text(inter, encoding="utf-8")
    if item is not None:
        (folder / "toy.item").write_text(item, encoding="utf-8")
    return folder


def test_a_dataset_is_read_with_its_items(tmp_path: Path) -> None:
    log = read(write(tmp_path))
    assert log.source == "recbole"
    assert log.events.select("user", "item", "timestamp").sort("timestamp").rows() == [
        ("u1", "i1", 100),
        ("u2", "i1", 150),
        ("u1", "i2", 200),
    ]
    assert dict(log.items.rows()) == {"i1": 'A "quoted title | Acme', "i2": "Other", "i9": "Never used | B"}
    assert log.index is None
    assert set(log.files) == {"toy.inter", "toy.item"}


def test_columns_are_mapped_and_may_have_no_time(tmp_path: Path) -> None:
    inter = "session:token\tsong:token\tt:float\nb\tx\t9\na\ty\t8\n"
    folder = write(tmp_path, inter, None)
    timed = read(folder / "toy.inter", options=ReadOptions(user="session", item="song", timestamp="t"))
    assert timed.events.sort("timestamp")["user"].to_list() == ["a", "b"]
    ordered = read(folder, options=ReadOptions(user="session", item="song", timestamp=""))
    assert ordered.events.sort("order").select("user", "timestamp").rows() == [("b", None), ("a", None)]


def test_unusable_rows_are_counted_by_reason(tmp_path: Path) -> None:
    log = read(write(tmp_path, INTER + "u3\t\t1\t5\n\ti1\t1\t5\nu3\ti1\t1\tnever\nu3\ti1\t1\t\nu1\ti1\t2\t100\n"))
    assert log.dropped == {"no_item": 1, "no_user": 1, "bad_time": 1, "no_time": 1, "duplicate": 1}
    assert log.events.height == 3


@pytest.mark.parametrize(
    ("inter", "message"),
    [
        ("user_id\titem_id\n", r"toy\.inter:1: column 'user_id' does not say its type"),
        ("user_id:word\titem_id:token\n", r"column 'user_id:word' does not say its type"),
        ("", r"column '' does not say its type"),
        ("user_id:token\tuser_id:token\n", r"a column name occurs twice"),
        ("user_id:token\titem_id:token\na\tb\n", r"has no column 'timestamp'; it has: user_id, item_id"),
        (INTER + "u1\ti1\t5\t100\t7\n", r"cannot read .*toy\.inter"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, inter: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, inter), "recbole")


def test_two_datasets_in_a_folder_and_foreign_options_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match="has no block column"):
        read(tmp_path, options=ReadOptions(block="b"))
    (tmp_path / "other.inter").write_text(INTER)
    with pytest.raises(DataError, match=r"has other\.inter and toy\.inter, expected one log"):
        read(tmp_path)


word = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(word, word, st.integers(10**8, 10**9)), min_size=1, max_size=8, unique=True))
def test_any_ids_and_times_come_back(
    rows: list[tuple[str, str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = "".join(f"{user}\t{item}\t1\t{time}\n" for user, item, time in rows)
    log = read(write(tmp_path_factory.mktemp("r"), INTER.splitlines()[0] + "\n" + text, None), "recbole")
    assert log.events.sort("order").select("user", "item", "timestamp").rows() == rows
