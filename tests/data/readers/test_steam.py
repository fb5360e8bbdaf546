"""Steam: Python literals, read and never evaluated."""

from pathlib import Path

import pytest

from cladapt.data.readers import ReadOptions, read
from cladapt.errors import DataError

REVIEWS = """{u'username': u'Chaos "S"', u'hours': .1, u'product_id': u'725280', u'date': u'2017-12-17', u'a': u'\\''}
{u'username': u'b', u'hours': 51.1, u'product_id': u'7', u'date': u'2017-12-18', u'text': u'', u'early_access': False}

{u'username': u'b', u'hours': __import__('os').abort(), u'product_id': u'8', u'date': u'2017-12-18'}
{u'username': u'b', u'product_id': u'9', u'date': u'yesterday'}
"""
GAMES = """{u'app_name': u'Lost', u'genres': [u'Action', u'Indie'], u'id': u'725280', u'price': u'Free'}
{u'app_name': u'Seven', u'id': u'7'}
{u'app_name': u'No id'}
oops
"""
DAY = 1_513_468_800  # 2017-12-17


def write(folder: Path) -> Path:
    (folder / "steam_reviews.json").write_text(REVIEWS)
    (folder / "steam_games.json").write_text(GAMES)
    return folder


def test_reviews_are_events_and_games_their_texts(tmp_path: Path) -> None:
    log = read(write(tmp_path))
    assert log.source == "steam"
    assert log.events.select("user", "item", "timestamp").rows() == [
        ('Chaos "S"', "725280", DAY),
        ("b", "7", DAY + 86_400),
    ]
    assert dict(log.items.rows()) == {"725280": "Lost | Action, Indie", "7": "Seven"}
    assert [(Path(file).name, *rest) for file, *rest in log.rejects.drop("value").iter_rows()] == [
        ("steam_reviews.json", 4, "malformed_line"),
        ("steam_reviews.json", 5, "bad_time"),
        ("steam_games.json", 3, "item_row_without_id"),
        ("steam_games.json", 4, "malformed_line"),
    ]


def test_conditions_and_texts_are_those_of_the_records(tmp_path: Path) -> None:
    log = read(write(tmp_path), options=ReadOptions(where=("hours > 1",), text=("price", "app_name")))
    assert log.events["item"].to_list() == ["7"]
    assert dict(log.items.rows()) == {"725280": "Free | Lost", "7": "Seven"}


def test_a_source_without_reviews_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{'username': 'a'}\n")
    with pytest.raises(DataError, match="has no file of Steam reviews, expected one log"):
        read(tmp_path, "steam")
