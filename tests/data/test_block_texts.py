"""Texts of the log itself: an item's text is that of its first block, whatever comes later."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.config import BlocksConfig
from cladapt.data.blocks import build_stream
from cladapt.data.readers import REJECTS, RawLog, ReadOptions, read
from cladapt.data.schema import INTERACTIONS, Stream

DAY = 86_400
EVENTS = {
    "user": pl.String,
    "item": pl.String,
    "timestamp": pl.Int64,
    "order": pl.Int64,
    "block": pl.Int32,
    "text": pl.String,
}
NO_REJECTS = pl.DataFrame(schema=REJECTS)


def described(rows: Sequence[tuple[str, str, int, str | None]]) -> RawLog:
    """A log whose events hold the texts of their items."""
    events = pl.DataFrame([(*row[:3], k, None, row[3]) for k, row in enumerate(rows)], schema=EVENTS, orient="row")
    return RawLog(events, pl.DataFrame(schema={"item": pl.String, "text": pl.String}), None, NO_REJECTS, {}, "csv")


def text_of(stream: Stream) -> dict[str, str]:
    return dict(stream.items.select("item", "text").rows())


def test_an_item_has_its_most_frequent_text_of_its_first_block() -> None:
    rows = [("a", "x", 3, "Old"), ("b", "x", 1, "New"), ("a", "y", 2, None), ("b", "z", 0, "Zed"), ("a", "w", 4, None)]
    rows += [("c", "x", 10, "Old"), ("c", "y", 12, "Late"), ("c", "y", 11, "Why"), ("c", "v", 13, "B")]
    rows += [("d", "v", 14, "A"), ("d", "v", 15, "A"), ("d", "x", 16, "Old")]
    stream = build_stream(described(rows), BlocksConfig(fractions=(5 / 12, 7 / 12), min_events=1, k_core=0))
    assert text_of(stream) == {"z": "Zed", "x": "New", "y": "", "w": "", "v": "A"}
    assert stream.manifest["notes"]["items_with_a_text_in_later_blocks_alone"] == 1
    assert stream.manifest["notes"]["items_without_text"] == 2
    assert stream.interactions.columns == list(INTERACTIONS)
    alone = build_stream(described(rows[:1]), BlocksConfig(fractions=(1.0,), min_events=1, k_core=0))
    assert "items_with_a_text_in_later_blocks_alone" not in alone.manifest["notes"]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from("ab"), st.sampled_from("wxyz"), st.integers(0, 11), st.sampled_from([None, "A", "B"])
        ),
        max_size=25,
    ),
    k_core=st.integers(0, 2),
)
def test_texts_are_those_of_the_logs_prefix(rows: list[tuple[str, str, int, str | None]], k_core: int) -> None:
    rows = [
        *rows,
        *(("k", "w", time, None) for time in (0, 1, 5, 9)),
        *(("k", "x", time, "C") for time in (0, 1, 5, 9)),
    ]
    starts = {"2024-01-05": 4, "2024-01-09": 8}
    log = [(user, item, 1_704_067_200 + time * DAY, text) for user, item, time, text in rows]
    whole = build_stream(described(log), BlocksConfig(dates=tuple(starts), min_events=1, k_core=k_core))
    for n_blocks, end in ((1, 4), (2, 8)):
        config = BlocksConfig(dates=tuple(starts)[: n_blocks - 1], min_events=1, k_core=k_core)
        config = config if n_blocks > 1 else BlocksConfig(fractions=(1.0,), min_events=1, k_core=k_core)
        prefix = build_stream(described([log[k] for k, row in enumerate(rows) if row[2] < end]), config)
        texts = text_of(whole)
        first = dict(whole.items.select("item", "first_block").rows())
        assert set(text_of(prefix)) == {item for item, block in first.items() if block <= n_blocks}
        for item, text in text_of(prefix).items():
            start, end = ((0, 4), (4, 8), (8, 12))[first[item] - 1]
            seen = [row for row in rows if row[1] == item and row[3] and start <= row[2] < end]
            seen.sort(key=lambda row: row[2])
            counts = Counter(row[3] for row in seen)
            assert text == texts[item] == (max(counts, key=lambda each: counts[each]) if counts else "")


def test_a_log_that_is_read_again_later_keeps_the_texts_it_had(tmp_path: Path) -> None:
    lines = ["user,item,timestamp,title", "a,x,2024-01-01,Old", "b,y,2024-01-02,Why", "b,x,2024-02-03,New"]
    lines += ["a,y,2024-02-04,Yes", "c,x,2024-03-01,New", "c,y,2024-03-02,Yes"]
    found = []
    for name, part in (("early.csv", lines[:5]), ("late.csv", lines)):
        (tmp_path / name).write_text("\n".join(part) + "\n")
        log = read(tmp_path / name, options=ReadOptions(text=("title",)))
        found.append(text_of(build_stream(log, BlocksConfig(dates=("2024-02-01",), min_events=1))))
    assert found == [{"x": "Old", "y": "Why"}] * 2
