"""Groups of a stream whose counts are known, and their figures against plain arithmetic on the rows."""

import math
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cladapt.config import EvalConfig
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import DataError
from cladapt.eval.cases import held_out_cases
from cladapt.eval.cells import Earlier
from cladapt.eval.metrics import ROWS
from cladapt.eval.protocol import Measures, pool
from cladapt.eval.tails import (
    PLACES,
    groups,
    measure_places,
    placed,
    places_of,
    quintiles,
    tail_effects,
    tail_rows,
    tail_table,
)

CONFIG = EvalConfig(top_k=(1, 2), beams=4, bootstrap=100)
# in each block a user's last event is the test target and the one before it the validation target, from 3 events on
LOG = {
    "ada": ("aabcd", "abce"),
    "bob": ("bcaf", "cdg"),
    "cy": ("", "da"),
    "di": ("", "c"),
    "eve": ("", "bda"),
    "fay": ("", "dcb"),
}
ITEM_TABLE = {"f": 1, "c": 1, "b": 1, "a": 1, "d": 1, "e": 2, "g": 2}
# training events up to block 2: b 4, a 4, c 3, d 2, and none of e, f, g; b is before a in the item table
DATA = {"b": 1, "a": 2, "c": 3, "d": 4}
PRIOR = {"f": -3.0, "c": -1.0, "b": -2.0, "a": -2.0, "d": -5.0, "e": -0.5, "g": -4.0}
PRIOR_QUINTILE = {"e": 1, "c": 1, "b": 2, "a": 3, "f": 3, "g": 4, "d": 5}
TITLE = {"b": -1.0, "e": -3.0, "g": -2.0}
TITLE_QUINTILE = {"b": 1, "g": 2, "e": 4}


def make_stream(manifest: dict[str, Any] | None = None) -> Stream:
    events = [
        (user, item, None, position, block)
        for user, blocks in LOG.items()
        for position, (block, item) in enumerate((b, i) for b, items in enumerate(blocks, 1) for i in items)
    ]
    items = [(item, "", born) for item, born in ITEM_TABLE.items()]
    frames = (pl.DataFrame(rows, schema=s, orient="row") for rows, s in ((events, INTERACTIONS), (items, ITEMS)))
    return Stream(*frames, manifest or {})


def known_priors(titles: bool = True) -> Any:
    """Stands in for a base: the priors above."""
    names = [*ITEM_TABLE]
    return SimpleNamespace(
        of_ids=lambda catalogue, where: np.array([PRIOR[names[i]] for i in catalogue]),
        of_titles=lambda block: np.array([TITLE.get(name, math.nan) if titles else math.nan for name in names]),
    )


@given(st.lists(st.integers(0, 4), max_size=23))
def test_quintiles_are_those_of_a_sort_by_value_then_place(values: list[int]) -> None:
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    expected = {item: 1 + 5 * rank // len(values) for rank, item in enumerate(ranked)}
    assert quintiles(np.array(values)).tolist() == [expected[i] for i in range(len(values))]


def test_quintiles_are_as_equal_as_can_be() -> None:
    assert np.bincount(quintiles(np.ones(12)))[1:].tolist() == [3, 2, 3, 2, 2]
    assert quintiles(np.ones(12)).tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5]


def test_targets_stand_where_their_counts_and_priors_put_them() -> None:
    stream = make_stream()
    found = places_of(stream, held_out_cases(stream, 2, "test", True), known_priors())
    assert dict(found.schema) == PLACES
    assert found["item"].to_list() == ["b", "a", "e", "g"]
    assert found["block"].to_list() == [2] * 4
    assert found["data_quintile"].to_list() == [1, 2, None, None]  # e and g are held out wherever they occur
    assert found["prior"].to_list() == [-2.0, -2.0, -0.5, -4.0]
    assert found["prior_quintile"].to_list() == [2, 3, 1, 4]
    assert found["title_prior"].to_list() == [-1.0, None, -3.0, -2.0]
    assert found["title_quintile"].to_list() == [1, None, 4, 2]
    every = stream.items["item"].to_list()
    assert quintiles(np.array([PRIOR[i] for i in every])).tolist() == [PRIOR_QUINTILE[i] for i in every]


def test_a_target_outside_the_catalogue_has_no_prior_and_keeps_its_count() -> None:
    stream = make_stream({"withdrawn": [("a", 2, None)]})
    found = places_of(stream, held_out_cases(stream, 2, "test", True), known_priors(titles=False))
    line = found.row(by_predicate=pl.col("item") == "a", named=True)
    assert line == {"block": 2, "item": "a", "data_quintile": 2} | dict.fromkeys([*PLACES][3:])
    assert found["title_quintile"].is_null().all()


def test_places_that_an_earlier_evaluation_has_are_kept() -> None:
    stream = make_stream()
    evaluator: Any = SimpleNamespace(stream=stream, priors=known_priors, config=CONFIG)
    known = pl.DataFrame([{"block": 2, "item": "b", "data_quintile": 5}], schema=PLACES)
    measures = Measures("m", pl.DataFrame(schema=ROWS), {}, 1, CONFIG, places=known)
    assert measure_places(evaluator, [2], Earlier(measures, blocks=[2])).equals(known)
    assert measure_places(evaluator, [], Earlier()).schema == PLACES
    asked: list[int] = []
    evaluator.cases = asked.append
    with pytest.raises(AttributeError):  # the stand-in gives no cases, but is asked for them
        measure_places(evaluator, [2], Earlier(replace(measures, places=None), blocks=[2]))
    assert asked == [2]


PLACED = [  # item, data, prior and title quintile
    ("i", 1, 1, 1),
    ("j", 1, 3, 2),
    ("k", 4, 1, 5),
    ("l", 2, 2, 1),
    ("m", None, 5, None),
    ("n", 3, None, None),
]
MEMBERS = {
    "data head": "ij",
    "data tail": "klmn",
    "prior head, data head": "i",
    "prior head, data tail": "k",
    "prior tail, data head": "j",
    "prior tail, data tail": "lm",
    "title head, data head": "i",
    "title head, data tail": "l",
    "title tail, data head": "j",
    "title tail, data tail": "k",
    "data quintile 1": "ij",
    "data quintile 2": "l",
    "data quintile 3": "n",
    "data quintile 4": "k",
    "data quintile 5": "",
    "never trained on": "m",
}


def places(titles: bool = True) -> pl.DataFrame:
    rows = [
        {"block": b, "item": i, "data_quintile": d, "prior_quintile": p, "title_quintile": t if titles else None}
        for b in (2, 3)
        for i, d, p, t in PLACED
    ]
    return pl.DataFrame(rows, schema=PLACES)


def make_rows(seed: int, likelihood: bool = True) -> pl.DataFrame:
    rows = []
    for block, users in ((1, "a"), (2, "abcdefgh"), (3, "acegik")):
        for model in sorted({1, block}):
            for u, user in enumerate(users):
                rank = (seed + 3 * model + 2 * u + block) % 5
                rows.append(
                    {
                        "model_block": model,
                        "block": block,
                        "user": user,
                        "item": "ijklmn"[(u + block) % 6] if block > 1 else "elsewhere",
                        "allowed": True,
                        "rank": rank if rank < 4 else None,
                        "ties": 1 + u % 2 if rank < 4 else None,
                        "id_rank": None,
                        "share": None,
                        "log_likelihood": -1.0 - rank - 0.1 * u * seed if likelihood else None,
                        "frequency": 0,
                        "user_kind": "new",
                        "new_item": False,
                        "one_hop": False,
                    }
                )
    return pl.DataFrame(rows, schema=ROWS)


def make_measures(seed: int, titles: bool = True) -> Measures:
    counts = make_rows(9, likelihood=False).filter((pl.col("model_block") == pl.col("block")) & (pl.col("block") > 1))
    return Measures("m", make_rows(seed), {"markov": counts}, 1, CONFIG, places=places(titles))


def value(row: dict[str, Any], metric: str) -> float:
    """A metric of one test by its definition: the mean over the places that the target may have."""
    if metric == "log_likelihood":
        return float(row[metric])
    if row["rank"] is None:
        return 0.0
    name, k = metric.split("@")
    worth = [1.0 if name == "HR" else 1 / math.log2(place + 2) for place in range(int(k))]
    taken = range(row["rank"], row["rank"] + row["ties"])
    return sum(worth[place] for place in taken if place < int(k)) / len(taken)


def test_figures_of_a_group_are_the_means_over_its_tests() -> None:
    measures = make_measures(1)
    rows = {"m": measures.current, "frozen": measures.frozen, "markov": measures.references["markov"]}
    found = {(row["model"], row["group"]): row for row in tail_table(measures)}
    assert [*found] == [(model, group) for model in rows for group in MEMBERS]
    for (model, group), row in found.items():
        tests = [test for test in rows[model].to_dicts() if test["item"] in MEMBERS[group]]
        users = {test["user"] for test in tests}
        assert (row["tests"], row["users"]) == (len(tests), len(users))
        for metric in ("HR@2", "NDCG@2", "log_likelihood"):
            missing = not tests or (model == "markov" and metric == "log_likelihood")
            expected = None if missing else pytest.approx(fmean(value(test, metric) for test in tests))
            assert row[metric] == expected, (model, group, metric)
            if metric != "NDCG@2" and not missing and len(users) > 1:
                low, high = map(float, row[f"{metric} 95 %"].strip("[]").split(","))
                assert low - 1e-4 <= row[metric] <= high + 1e-4
            else:
                assert row.get(f"{metric} 95 %") is None
    by_quintile = [row for row in MEMBERS if row.startswith("data quintile") or row == "never trained on"]
    for by_data in (by_quintile, ["data head", "data tail"]):
        assert sum(found["m", group]["tests"] for group in by_data) == measures.current.height


def test_titles_that_no_base_knows_have_no_groups() -> None:
    assert not [row for row in tail_table(make_measures(1, titles=False)) if row["group"].startswith("title")]


def pooled(*seeds: int) -> pl.DataFrame:
    found = (placed(make_measures(seed)) for seed in seeds)
    return pool({s: each.current for s, each in enumerate(found) if each is not None})


def test_differences_are_paired_by_test_and_seed() -> None:
    one, other = pooled(1, 4), pooled(2, 3)
    found = tail_effects(one, other, CONFIG)
    keys = ["block", "user", "seed"]
    for (group, metric), effect in found.items():
        theirs = {tuple(test[k] for k in keys): test for test in other.to_dicts()}
        pairs = [
            value(test, metric) - value(theirs[tuple(test[k] for k in keys)], metric)
            for test in one.to_dicts()
            if test["item"] in MEMBERS[group]
        ]
        assert effect.mean == pytest.approx(fmean(pairs)), (group, metric)
        assert effect.low <= effect.mean <= effect.high
    enough = {g for g, items in MEMBERS.items() if one.filter(pl.col("item").is_in([*items]))["user"].n_unique() > 1}
    assert {group for group, _ in found} == enough != {*MEMBERS}
    rows = tail_rows("m", one, CONFIG)
    assert {row["group"]: row["tests"] for row in rows}["data quintile 1"] == 2 * sum(
        test["item"] in "ij" for test in make_measures(1).current.to_dicts()
    )


def test_a_model_without_likelihood_has_no_difference_in_it() -> None:
    own = placed(make_measures(1))
    assert own is not None
    found = tail_effects(own.current, own.references["markov"], CONFIG)
    assert {metric for _, metric in found} == {"HR@2", "NDCG@2"}


def test_priors_of_two_bases_are_not_paired() -> None:
    one = pooled(1)
    turned = one.with_columns(prior_quintile=6 - pl.col("prior_quintile"), title_quintile=pl.lit(None, pl.Int32))
    kinds = {group.split(" ")[0] for group, _ in tail_effects(one, turned, CONFIG)}
    assert kinds == {"data"}


def test_places_that_are_missing_are_told() -> None:
    measures = make_measures(1)
    assert placed(replace(measures, places=None)) is None
    assert tail_table(replace(measures, places=None)) == []
    lacking = measures.places
    assert lacking is not None
    with pytest.raises(DataError, match=r"\d+ tests have a target without a place .* \(evaluate the run again\)"):
        placed(replace(measures, places=lacking.filter(pl.col("item") != "k")))


def test_the_groups_of_a_notion_share_no_test() -> None:
    own = placed(make_measures(1))
    assert own is not None
    sides = groups(own.rows)
    assert (
        own.rows.filter(sides.pop("data head")).height + own.rows.filter(sides.pop("data tail")).height
        == own.rows.height
    )
    for notion in ("prior", "title", "data"):
        parts = [own.rows.filter(part) for name, part in sides.items() if name.startswith(notion)]
        assert sum(part.height for part in parts) == pl.concat(parts).unique(["model_block", "block", "user"]).height
