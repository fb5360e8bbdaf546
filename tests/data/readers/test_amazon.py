"""Amazon's dumps: fields, units, products and what cannot be used."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cladapt.data.readers import NoRows, ReadOptions, read
from cladapt.errors import ConfigError, DataError

NOW = 1_588_687_728


def lines(*rows: dict[str, Any] | str) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def review(user: str, item: str, time: Any, rating: Any = 5.0) -> dict[str, Any]:
    return {"rating": rating, "user_id": user, "parent_asin": item, "asin": "v", "timestamp": time}


def test_the_dumps_of_2023_are_in_milliseconds(tmp_path: Path) -> None:
    (tmp_path / "Toys.jsonl").write_text(
        lines(review("a", "x", NOW * 1000 + 923), review("a", "y", "soon"), '{"user_id": "b"', review("b", "x", None))
    )
    log = read(tmp_path)
    assert log.source == "amazon2023"
    assert log.events.select("user", "item", "timestamp").rows() == [("a", "x", NOW)]
    assert log.rejects.select("line", "reason", "value").rows() == [
        (2, "bad_time", "soon"),
        (3, "malformed_line", '{"user_id": "b"'),
        (4, "no_time", ""),
    ]
    assert log.notes == {"ratings_ignored": 4}


def test_products_are_found_by_the_name_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "Toys_5.json.gz").write_bytes(
        gzip.compress(lines({"reviewerID": "a", "asin": "x", "unixReviewTime": NOW, "overall": 4.0}).encode())
    )
    product = {"asin": "x", "title": "Ex", "brand": "Acme", "category": ["Toys", "Cars"], "description": ["long"]}
    (tmp_path / "meta_Toys.json").write_text(lines(product, "oops", {"title": "no id"}))
    (tmp_path / "meta_Books.json").write_text(lines({"asin": "x", "title": "Wrong"}))
    log = read(tmp_path)
    assert dict(log.items.rows()) == {"x": "Ex | Acme | Toys, Cars"}
    assert log.dropped == {"malformed_line": 1, "item_row_without_id": 1}
    assert set(log.files) == {"Toys_5.json.gz", "meta_Toys.json"}
    chosen = read(tmp_path, options=ReadOptions(text=("description", "title")))
    assert dict(chosen.items.rows()) == {"x": "long | Ex"}


def test_products_of_2014_are_python_literals(tmp_path: Path) -> None:
    (tmp_path / "reviews_Toys.json").write_text(
        lines({"reviewerID": "a", "asin": "x", "unixReviewTime": NOW, "overall": 4.0})
    )
    (tmp_path / "meta_Toys.json").write_text("{'asin': 'x', 'title': \"it's\", 'categories': [['Toys', 'Cars']]}\n")
    assert dict(read(tmp_path).items.rows()) == {"x": "it's | Toys, Cars"}


def test_low_ratings_can_be_left_out_and_other_options_are_refused(tmp_path: Path) -> None:
    (tmp_path / "Toys.jsonl").write_text(
        lines(review("a", "x", NOW * 1000, 2.0), review("a", "y", NOW * 1000), review("b", "x", NOW * 1000, "many"))
    )
    log = read(tmp_path, options=ReadOptions(min_rating=4, where=("asin = 'v'",)))
    assert log.events["item"].to_list() == ["y"]
    assert log.dropped == {"below_min_rating": 1, "bad_rating": 1}
    with pytest.raises(ConfigError, match="the amazon2023 format has fixed columns, so --time-unit cannot apply"):
        read(tmp_path, options=ReadOptions(time_unit="us"))
    with pytest.raises(DataError, match="has no file of reviews, expected one log"):
        read(tmp_path, "amazon2018")
    (tmp_path / "Toys.jsonl").write_text(lines(review("", "x", NOW * 1000)))
    with pytest.raises(NoRows, match=r"none of the 1 rows can be used \(no_user: 1\)"):
        read(tmp_path)
