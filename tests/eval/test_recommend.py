"""Recommendations against a ranking by plain forward passes, and histories in every file format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cladapt.errors import ConfigError, DataError
from cladapt.eval.recommend import read_catalogue, read_histories, recommend
from cladapt.model.load import Base, new_model
from cladapt.tokens.prompts import PackedForm
from cladapt.tokens.sids import SidTable

CODES = {"a": (0, 0), "b": (0, 0), "c": (0, 1), "d": (1, 0), "e": (2, 1), "f": (2, 1), "g": (2, 0)}
ITEMS = "abcdefg"
WINDOW = 3
HISTORIES = {
    "jsonl": '{"user": "u", "history": ["a", "b"]}\n{"user": "v", "history": []}\n',
    "csv": "user,item\nu,a\nv,\nu,b\n",
}


@pytest.fixture(scope="module")
def base() -> Base:
    sids = SidTable(tuple(CODES), np.array(list(CODES.values())), (3, 2))
    model, tokenizer = new_model("tiny", sids, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)  # logits far enough apart for an order that rounding cannot change
    return Base(model.eval(), tokenizer, sids, {})


@torch.no_grad()
def ranking(base: Base, history: str, catalogue: str, exclude_seen: bool) -> list[tuple[str, float]]:
    """All items of the catalogue, best first, items of one ID in its order."""
    tokens = dict(zip(CODES, map(tuple, base.item_tokens().tolist()), strict=True))
    prompt = [base.bos(), *(t for item in history[-WINDOW:] for t in tokens[item])]

    def log_p(prefix: tuple[int, ...], token: int) -> float:
        siblings = sorted({tokens[i][len(prefix)] for i in catalogue if tokens[i][: len(prefix)] == prefix})
        logits = base.model(input_ids=torch.tensor([[*prompt, *prefix]])).logits[0, -1, siblings]
        return float(logits.log_softmax(0)[siblings.index(token)])

    scores = {i: log_p((), tokens[i][0]) + log_p(tokens[i][:1], tokens[i][1]) for i in catalogue}
    allowed = [i for i in catalogue if not (exclude_seen and i in history)]
    return [(i, scores[i]) for i in sorted(allowed, key=lambda i: -scores[i])]


def run(
    base: Base,
    histories: Mapping[str, Sequence[str]],
    allowed: Sequence[str] | None = None,
    top_k: int = 7,
    beams: int = 7,
    exclude_seen: bool = True,
) -> tuple[pl.DataFrame, dict[str, Any]]:
    form = PackedForm(base.item_tokens().numpy(), base.bos(), WINDOW, 64)
    return recommend(base.model, base, form, "trie", histories, allowed, top_k, beams, exclude_seen, batch=2)


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_every_user_gets_the_ranking_of_plain_forward_passes(base: Base, exclude_seen: bool) -> None:
    histories = {"two": "fe", "none": "", "one": "a", "long": "gfbad"}
    frame, counts = run(base, histories, exclude_seen=exclude_seen)
    for user, history in histories.items():
        mine = frame.filter(pl.col("user") == user)
        expected = ranking(base, history, ITEMS, exclude_seen)
        assert mine["item"].to_list() == [item for item, _ in expected]
        assert mine["rank"].to_list() == list(range(1, len(expected) + 1))
        np.testing.assert_allclose(mine["score"], [score for _, score in expected], atol=1e-4)
    assert frame.columns == ["user", "rank", "item", "semantic_id", "score"]
    assert frame["user"].unique(maintain_order=True).to_list() == list(histories)
    assert counts == {
        "users": 4,
        "recommendations": frame.height,
        "users_with_fewer": 3 if exclude_seen else 0,  # all but the user without a history
        "users_without_known_items": 1,
        "shortened_prompts": 0,
        "history_items_left_out": 0,
        "titles_cut": 0,
        "unknown_history_items": 0,
        "unknown_catalogue_items": 0,
    }


def test_items_of_one_id_follow_each_other_and_a_seen_one_is_left_out(base: Base) -> None:
    frame, _ = run(base, {"u": "a"})
    shared = frame.filter(pl.col("item").is_in(["e", "f"]))
    assert shared["rank"][1] - shared["rank"][0] == 1
    assert shared["score"].n_unique() == 1
    assert frame["semantic_id"].to_list() == [
        f"<a_{CODES[item][0]}><b_{CODES[item][1]}>" for item in frame["item"].to_list()
    ]
    assert "a" not in frame["item"].to_list()
    assert "b" in frame["item"].to_list()  # its twin is seen, it is not


def test_the_cut_is_in_items_not_in_ids(base: Base) -> None:
    whole, _ = run(base, {"u": "cd"})
    for k in range(1, 6):
        frame, counts = run(base, {"u": "cd"}, top_k=k)
        assert frame.equals(whole.head(k))
        assert (counts["recommendations"], counts["users_with_fewer"]) == (k, 0)


def test_a_catalogue_limits_the_choice_and_the_competition(base: Base) -> None:
    frame, counts = run(base, {"u": "ag"}, allowed=["g", "d", "nowhere", "e", "d", "c"])
    expected = ranking(base, "ag", "cdeg", True)
    assert frame["item"].to_list() == [item for item, _ in expected]
    np.testing.assert_allclose(frame["score"], [score for _, score in expected], atol=1e-4)
    assert counts["unknown_catalogue_items"] == 1


def test_unknown_history_items_are_counted_and_left_out(base: Base) -> None:
    frame, counts = run(base, {"u": ["x", "a", "?", "c"], "v": ["y"]})
    without, _ = run(base, {"u": "ac", "v": ""})
    assert frame.equals(without)
    assert counts["unknown_history_items"] == 3


def test_a_user_who_has_seen_all_gets_no_row_and_is_counted(base: Base) -> None:
    frame, counts = run(base, {"u": ITEMS, "v": "a"}, top_k=3)
    assert frame["user"].unique().to_list() == ["v"]
    assert counts["users"] == 2
    assert counts["users_with_fewer"] == 1


@pytest.mark.parametrize(("top_k", "beams"), [(0, 5), (-1, 5), (6, 5)])
def test_a_list_longer_than_the_beams_or_empty_is_refused(base: Base, top_k: int, beams: int) -> None:
    with pytest.raises(ConfigError, match=rf"top_k={top_k}, beams={beams} \(use top-k of 1 or more"):
        run(base, {"u": "a"}, top_k=top_k, beams=beams)


def test_a_catalogue_of_strangers_is_refused(base: Base) -> None:
    with pytest.raises(DataError, match=r"no item of the catalogue file is known to this model.*check the item ids"):
        run(base, {"u": "a"}, allowed=["x", "y"])


@pytest.mark.parametrize("kind", [*HISTORIES, "parquet"])
def test_every_format_gives_the_same_histories(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"h.{kind}"
    if kind == "parquet":
        pl.DataFrame({"user": ["u", "v", "u"], "item": ["a", None, "b"]}).write_parquet(path)
    else:
        path.write_text(HISTORIES[kind])
    assert read_histories(path) == {"u": ["a", "b"], "v": []}


def test_a_time_column_orders_the_rows_whatever_their_place(tmp_path: Path) -> None:
    newest_first = {"user": ["u", "v", "u", "u"], "item": ["c", "x", "b", "a"], "timestamp": [30, 5, 20, 10]}
    iso = ["2024-01-03", "2024-01-09", "2024-01-02 10:00", "2024-01-02 09:00"]
    for kind, times in (("parquet", newest_first["timestamp"]), ("csv", iso), ("jsonl", newest_first["timestamp"])):
        path = tmp_path / f"h.{kind}"
        frame = pl.DataFrame({**newest_first, "timestamp": times})
        {"parquet": frame.write_parquet, "csv": frame.write_csv, "jsonl": frame.write_ndjson}[kind](path)
        assert read_histories(path)["u"] == ["a", "b", "c"], kind
        assert read_histories(path, timestamp="")["u"] == ["c", "b", "a"]
    renamed = pl.DataFrame(newest_first).rename({"user": "who", "item": "sku", "timestamp": "at"})
    renamed.write_csv(tmp_path / "r.csv")
    assert read_histories(tmp_path / "r.csv", "who", "sku", "at")["u"] == ["a", "b", "c"]


def test_equal_times_keep_the_order_of_the_file(tmp_path: Path) -> None:
    pl.DataFrame({"user": ["u"] * 3, "item": list("bca"), "timestamp": [7, 7, 1]}).write_csv(tmp_path / "h.csv")
    with pytest.warns(
        UserWarning, match="2 of 3 rows share their time with another row of the same user, and keep the"
    ):
        assert read_histories(tmp_path / "h.csv") == {"u": ["a", "b", "c"]}


def test_a_column_that_may_be_the_time_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("user,item,time\nu,b,2\nu,a,1\n")
    with pytest.warns(UserWarning, match=r"no column 'timestamp': the order of its rows.* its columns \(time\)"):
        assert read_histories(tmp_path / "h.csv") == {"u": ["b", "a"]}
    assert read_histories(tmp_path / "h.csv", timestamp="") == {"u": ["b", "a"]}
    assert read_histories(tmp_path / "h.csv", timestamp="time") == {"u": ["a", "b"]}


def test_an_unreadable_time_is_no_order(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("user,item,timestamp\nu,a,1\nu,b,soon\n")
    with pytest.raises(DataError, match=r"1 rows have no readable timestamp, the first 'soon' \(write unix seconds"):
        read_histories(tmp_path / "h.csv")
    with pytest.raises(DataError, match=r"lacks when, it has user, item, timestamp"):
        read_histories(tmp_path / "h.csv", timestamp="when")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_scores_that_are_no_numbers_are_an_error_that_names_the_users(base: Base, value: float) -> None:
    head = base.model.get_output_embeddings().weight
    token = int(base.item_tokens()[ITEMS.index("g"), 0])
    kept = head[token].detach().clone()
    try:
        with torch.no_grad():
            head[token] = value
        with pytest.raises(
            DataError, match=r"recommend: the model's scores are not finite.* the first 'w', 'u'"
        ) as error:
            run(base, {"u": "a", "v": "ad", "w": ""})
        assert error.value.hint.startswith("look for NaN, infinite or huge weights")
    finally:
        with torch.no_grad():
            head[token] = kept


def test_numbers_as_ids_become_text(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text('{"user": 1, "history": [10, 9]}\n{"user": 2, "history": ["x"]}\n')
    assert read_histories(path) == {"1": ["10", "9"], "2": ["x"]}
    pl.DataFrame({"user": [7, 7], "item": [3, 4]}).write_parquet(tmp_path / "h.parquet")
    assert read_histories(tmp_path / "h.parquet") == {"7": ["3", "4"]}
    (tmp_path / "h.csv").write_text("user,item\n007,01\n")
    assert read_histories(tmp_path / "h.csv") == {"007": ["01"]}


def test_many_empty_histories_first_do_not_hide_the_items_that_follow(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    lines: list[dict[str, Any]] = [{"user": str(i), "history": []} for i in range(300)]
    lines += [{"user": "p", "history": [5]}, {"user": "q", "history": ["x"]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_histories(path)
    assert (found["0"], found["p"], found["q"]) == ([], ["5"], ["x"])


BAD = [
    ("h.txt", b"", ConfigError, r"unknown kind of file '\.txt' \(use one of \.jsonl, \.csv, \.parquet"),
    ("h.jsonl", b"", DataError, r"not readable as \.jsonl"),
    ("h.jsonl", b"\x00\xff\x01", DataError, r"not readable as \.jsonl"),
    ("h.jsonl", b'{"user": "u", "history": ["a"]}\nnot json\n', DataError, r"not readable as \.jsonl"),
    ("h.jsonl", b'{"user": "u", "items": ["a"]}\n', DataError, r"lacks item, it has user, items \(name the columns"),
    ("h.jsonl", b'{"user": "u", "history": "a"}\n', DataError, "history is String, expected a list of items"),
    ("h.jsonl", b'{"user": "u", "history": [["a"]]}\n', DataError, r"history holds List\(String\), expected text"),
    ("h.jsonl", b'{"user": "u", "history": [1.5]}\n', DataError, "history holds Float64, expected text or integers"),
    ("h.jsonl", b'{"user": ["u"], "history": ["a"]}\n', DataError, r"user holds List\(String\)"),
    ("h.jsonl", b'{"user": null, "history": ["a"]}\n', DataError, r"1 rows have no user \(fill in"),
    ("h.jsonl", b'{"user": "u", "history": []}\n' * 2, DataError, r"user 'u' has several histories \(write one line"),
    ("h.csv", b"", DataError, r"not readable as \.csv"),
    ("h.csv", b"\xff\xfe\x00\n\xff", DataError, r"not readable as \.csv"),
    ("h.csv", b"user,item\n", DataError, r"has no rows \(give at least one history"),
    ("h.csv", b"u,i\na,b\n", DataError, r"lacks item, user, it has u, i"),
    ("h.csv", b"user,item\n,b\n", DataError, "1 rows have no user"),
    ("h.parquet", b"PAR1 not really", DataError, r"not readable as \.parquet"),
]


@pytest.mark.parametrize(("name", "content", "kind", "text"), BAD)
def test_unusable_history_files_say_what_is_wrong(
    name: str, content: bytes, kind: type[Exception], text: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(kind, match=text):
        read_histories(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_histories, read_catalogue):
        with pytest.raises(DataError, match=r"no such file: .*gone\.csv \(check the path"):
            read(tmp_path / "gone.csv")


def test_a_catalogue_file_is_one_item_per_line(tmp_path: Path) -> None:
    path = tmp_path / "items.txt"
    path.write_text(" a \n\nb c\n")
    assert read_catalogue(path) == ["a", "b c"]
    path.write_text("\n \n")
    with pytest.raises(DataError, match=r"lists no item \(write one item id per line"):
        read_catalogue(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"cannot read .*items\.txt.*expected a UTF-8 text file"):
        read_catalogue(path)
