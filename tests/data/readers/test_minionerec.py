"""MiniOneRec's splits: sequences come back from sliding samples, IDs and titles with them."""

import csv
from pathlib import Path

import pytest

from cladapt.data.readers import read
from cladapt.errors import DataError

HEADER = ("user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid")
Row = tuple[str, list[str], str]


def sid(item: str) -> str:
    return f"<a_{item}><b_0><c_{item}>"


def write(path: Path, rows: list[Row], header: tuple[str, ...] = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, header, extrasaction="ignore")
        writer.writeheader()
        for user, history, item in rows:
            writer.writerow(
                {
                    "user_id": user,
                    "history_item_title": repr([f"Title, {i}" for i in history]),
                    "item_title": f"Title, {item}",
                    "history_item_id": repr(history),
                    "item_id": item,
                    "history_item_sid": repr([sid(i) for i in history]),
                    "item_sid": sid(item),
                }
            )
    return path


def splits(folder: Path) -> Path:
    write(folder / "train" / "Toy_5.csv", [("A", ["1"], "2"), ("B", ["4", "1"], "3"), ("A", ["1", "2"], "3")])
    write(folder / "valid" / "Toy_5.csv", [("A", ["1", "2", "3"], "4")])
    write(folder / "test" / "Toy_5.csv", [("C", ["2"], "5"), ("B", ["1", "3"], "5")])
    return folder


def test_sequences_ids_and_titles_come_back(tmp_path: Path) -> None:
    log = read(splits(tmp_path))
    assert log.source == "minionerec"
    by_user = log.events.sort("order").group_by("user", maintain_order=True).agg("item")
    assert dict(by_user.iter_rows()) == {"A": ["1", "2", "3", "4"], "B": ["4", "1", "3", "5"], "C": ["2", "5"]}
    assert dict(log.items.rows()) == {item: f"Title, {item}" for item in "12345"}
    assert log.index == {item: (f"<a_{item}>", "<b_0>", f"<c_{item}>") for item in "12345"}
    assert log.notes == {"events_from_first_histories": 4}
    assert set(log.files) == {f"{split}/Toy_5.csv" for split in ("train", "valid", "test")}


def test_targets_stay_in_the_order_of_the_rows(tmp_path: Path) -> None:
    events = read(splits(tmp_path)).events.sort("order")
    assert list(zip(events["user"], events["item"], strict=True)) == [
        ("A", "1"), ("A", "2"), ("B", "4"), ("B", "1"), ("B", "3"), ("A", "3"), ("A", "4"),
        ("C", "2"), ("C", "5"), ("B", "5"),
    ]  # fmt: skip


def test_ids_and_titles_may_be_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "Toy.csv", [("A", ["1"], "2")], ("user_id", "history_item_id", "item_id"))
    log = read(path)
    assert log.index is None
    assert dict(log.items.rows()) == {"1": "", "2": ""}


def test_a_row_without_a_user_or_an_item_is_counted(tmp_path: Path) -> None:
    log = read(write(tmp_path / "Toy.train.csv", [("A", ["1"], "2"), ("", ["1"], "3"), ("A", ["1"], "")]))
    assert log.dropped == {"no_user": 1, "no_item": 1}
    assert log.events["item"].to_list() == ["1", "2"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("['1'],2,", "__import__('os'),2,", r"Toy\.csv:2: history_item_id is .*, expected a list"),
        ("['1'],2,", "['1',2,", r"Toy\.csv:2: history_item_id is .*, expected a list"),
        ("['1'],2,", "\"['1', '7']\",2,", r"Toy\.csv:2: history_item_title has 1 entries, history_item_id 2"),
        (",<a_2><b_0><c_2>", ",a2", "item '2' has the semantic ID 'a2'"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path / "Toy.csv", [("A", ["1"], "2")])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=message):
        read(path, "minionerec")


def test_two_ids_of_an_item_and_two_files_of_a_split_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "Toy.csv", [("A", ["1"], "2"), ("B", ["1"], "2")])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2].replace("<c_2>", "<c_9>")]) + "\n")
    with pytest.raises(DataError, match=r"Toy\.csv:3: item '2' has the semantic ID .*<c_9>', before it had .*<c_2>'"):
        read(path)
    for name in ("x", "y"):
        write(tmp_path / "two" / "train" / f"{name}.csv", [("A", ["1"], "2")])
    with pytest.raises(DataError, match="is not the one file of a split"):
        read(tmp_path / "two")
