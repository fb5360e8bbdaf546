"""MIND: clicks at the time of their impression, one history a user, and every oddity counted."""

from pathlib import Path

import pytest

from cladapt.data.readers import NoRows, ReadOptions, read
from cladapt.errors import ConfigError, DataError

MORNING, NOON = 1_573_463_158, 1_573_473_600  # 11/11/2019 9:05:58 AM, 12:00:00 PM
LINES = (
    "1\tU2\t11/11/2019 12:00:00 PM\tN7\tN1-1 N2-0 N3-1\n"
    "2\tU1\t11/11/2019 12:00:00 PM\tN8 N9 N1\tN4-1\n"
    "3\tU1\t11/11/2019 9:05:58 AM\tN8 N9\tN1-1 N2-0\n"
    "4\tU2\t11/11/2019 12:00:00 PM\tN7\tN2-0\n"
)


def write(folder: Path, lines: str = LINES, name: str = "behaviors.tsv") -> Path:
    (folder / name).write_text(lines)
    return folder


def test_clicks_and_first_histories_are_the_events(tmp_path: Path) -> None:
    (tmp_path / "news.tsv").write_text(
        "N1\tnews\tworld\tOne\tx\tu\t[]\t[]\nN4\tsports\t\tFour\t\t\t\t\n\t\t\t?\t\t\t\t\n"
    )
    log = read(write(tmp_path))
    assert log.source == "mind"
    assert log.events.sort("timestamp", "order").select("user", "item", "timestamp").rows() == [
        ("U1", "N8", MORNING),
        ("U1", "N9", MORNING),
        ("U1", "N1", MORNING),
        ("U2", "N7", NOON),
        ("U2", "N1", NOON),
        ("U2", "N3", NOON),
        ("U1", "N4", NOON),
    ]
    assert log.notes == {"events_from_first_histories": 3, "impressions_without_click": 1}
    assert dict(log.items.rows()) == {"N1": "One | news | world", "N4": "Four | sports"}
    assert log.dropped == {"item_row_without_id": 1}
    assert set(log.files) == {"behaviors.tsv", "news.tsv"}


def test_bad_times_and_missing_users_are_rejects_with_their_lines(tmp_path: Path) -> None:
    lines = (
        LINES
        + "5\t\t11/11/2019 9:05:58 AM\t\tN1-1\n\n6\tU1\t2019-11-11\t\tN1-1 N2-1\n7\tU3\t1/1/2020 1:00:00 AM\t\tN1\n"
    )
    log = read(write(tmp_path, lines, "behaviours.tsv"))
    assert log.rejects.select("line", "reason", "value").rows() == [
        (5, "no_user", ""),
        (7, "bad_time", "2019-11-11"),
        (7, "bad_time", "2019-11-11"),
    ]
    assert log.notes["impressions_without_labels"] == 1


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"behaviors\.tsv: a line has 2 fields, expected 5"):
        read(write(tmp_path, "a\tb\n"))
    with pytest.raises(DataError, match=r"behaviors\.tsv:2: the line has not 5 fields"):
        read(write(tmp_path, LINES.splitlines()[0] + "\n1\tU\n"))
    with pytest.raises(NoRows, match="none of the 1 rows can be used"):
        read(write(tmp_path, "1\t\t11/11/2019 9:05:58 AM\t\tN1-1\n"))
    with pytest.raises(ConfigError, match="the mind format has fixed columns, so --time-unit cannot apply"):
        read(write(tmp_path), options=ReadOptions(time_unit="ms"))
