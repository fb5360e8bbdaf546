"""Lists of items behind semantic IDs: who is in them, and that evaluation says what they give, ties by simulation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cladapt.config import EvalConfig
from cladapt.data.histories import training_sequences
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.eval.baselines import MODELS, evaluate_counts
from cladapt.eval.decode import Beams
from cladapt.eval.evaluate import Evaluator
from cladapt.eval.lists import Catalogue, places
from cladapt.eval.metrics import user_metrics
from cladapt.eval.recommend import recommend
from cladapt.model.load import Base, new_model
from cladapt.tokens.prompts import PackedForm
from cladapt.tokens.sids import SidTable

CODES = {"a": (0, 0), "b": (0, 0), "c": (0, 1), "d": (1, 0), "e": (1, 0), "f": (2, 1), "g": (2, 0)}
SIDS = SidTable(tuple(CODES), np.array(list(CODES.values())), (3, 2))
N_ITEMS, BEAMS, TOP_K, DRAWS = 60, 20, (1, 5, 10), 1000
METRICS = [*(f"{name}@{k}" for k in TOP_K for name in ("HR", "NDCG")), "MRR"]


@pytest.fixture(scope="module")
def stream() -> Stream:
    """60 items and small counts, so that popularity and Markov have many ties; now and then an item comes again."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{u:02}", f"i{rng.integers(N_ITEMS) if rng.random() < 0.5 else rng.integers(12)}", None, p, 1 + p // 6)
        for u in range(60)
        for p in range(12)
    ]
    items = [(f"i{k}", "", 1) for k in range(N_ITEMS)]
    return Stream(pl.DataFrame(rows, INTERACTIONS, orient="row"), pl.DataFrame(items, ITEMS, orient="row"))


@pytest.fixture(scope="module")
def base() -> Base:
    """A tenth of the IDs, 6 of 54, stand for two items each, those of the popular ones among them."""
    codes = np.array([(k // 8, k % 8) for k in range(N_ITEMS)])
    codes[1:12:2] = codes[0:12:2]
    sids = SidTable(tuple(f"i{k}" for k in range(N_ITEMS)), codes, (8, 8))
    model, tokenizer = new_model("tiny", sids, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
    return Base(model.eval(), tokenizer, sids, {})


def simulated(lists: Sequence[Sequence[tuple[str, float]]], targets: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Mean and standard error of each metric over random orders of equal scores."""
    rng = np.random.default_rng(1)
    totals = {name: np.zeros(DRAWS) for name in METRICS}
    for found, target in zip(lists, targets, strict=True):
        scores = np.array([score for _, score in found])
        own = [k for k, (item, _) in enumerate(found) if item == target]
        if not own:
            continue
        noise = rng.random((DRAWS, len(found)))
        order = np.lexsort((noise, np.broadcast_to(-scores, noise.shape)), axis=1)
        place = (order == own[0]).argmax(axis=1)
        for k in TOP_K:
            totals[f"HR@{k}"] += place < k
            totals[f"NDCG@{k}"] += (place < k) / np.log2(place + 2)
        totals["MRR"] += (place < BEAMS) / (place + 1)
    return {n: (v.mean() / len(targets), v.std() / len(targets) / np.sqrt(DRAWS)) for n, v in totals.items()}


def check(rows: pl.DataFrame, expected: dict[str, tuple[float, float]]) -> None:
    measured = user_metrics(rows, TOP_K, BEAMS)
    for name, (mean, error) in expected.items():
        assert abs(float(measured[name].mean()) - mean) <= 4 * error + 1e-9, name  # type: ignore[arg-type]
    assert any(error > 0 for _, error in expected.values())  # there were ties to break
    assert expected["HR@10"][0] > 0


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_the_model_s_figures_are_the_mean_over_tie_orders_of_what_recommend_writes(
    stream: Stream, base: Base, exclude_seen: bool
) -> None:
    form = PackedForm(base.item_tokens().numpy(), base.bos(), 20, 64)
    config = EvalConfig(top_k=TOP_K, beams=BEAMS, exclude_seen=exclude_seen)
    evaluator = Evaluator(stream, base, form, config)
    rows = evaluator.rows(base.model, 1, 2)
    cases = evaluator.cases(2)
    names = stream.items["item"].to_list()
    histories = {user: [names[i] for i in h] for user, h in zip(cases.users, cases.histories, strict=True)}
    wide: Any = (base.model, base, form, "trie", histories, None)
    whole, _ = recommend(*wide, top_k=None, beams=BEAMS, exclude_seen=exclude_seen)
    shown, _ = recommend(*wide, top_k=10, beams=BEAMS, exclude_seen=exclude_seen)
    assert shown.equals(whole.filter(pl.col("rank") <= 10))  # what is written is the head of these lists
    lists = [whole.filter(pl.col("user") == u).select("item", "score").rows() for u in cases.users]
    check(rows, simulated(lists, rows["item"].to_list()))
    assert (rows["allowed"].to_list().count(False) > 0) == exclude_seen


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("name", ["popularity", "block popularity", "markov"])
def test_counting_s_figures_are_the_mean_over_tie_orders_of_its_lists(
    stream: Stream, base: Base, name: str, exclude_seen: bool
) -> None:
    form = PackedForm(base.item_tokens().numpy(), base.bos(), 20, 64)
    cases = Evaluator(stream, base, form, EvalConfig(exclude_seen=exclude_seen)).cases(2)
    rows = evaluate_counts(stream, name, 2, cases, exclude_seen, BEAMS)
    model = MODELS[name]().fit(training_sequences(stream, 2), N_ITEMS)
    names = stream.items["item"].to_list()
    lists = []
    for history, scores in zip(cases.histories, model.scores(cases.histories), strict=True):
        given = [i for i in range(N_ITEMS) if not (exclude_seen and i in history)]
        lists.append([(names[i], float(scores[i])) for i in given])
    check(rows, simulated(lists, rows["item"].to_list()))


def test_a_shared_id_stays_open_until_all_its_items_are_seen() -> None:
    catalogue = Catalogue(SIDS, np.arange(len(CODES)))
    leaf = dict(zip(CODES, catalogue.leaf(np.arange(len(CODES))).tolist(), strict=True))
    assert leaf["a"] == leaf["b"]
    history = [list(CODES).index(item) for item in "aacd"]
    assert catalogue.consumed_leaves(np.array(history)).tolist() == [leaf["c"]]
    assert catalogue.consumed_leaves(np.array([0, 1, 1])).tolist() == [leaf["a"]]
    assert catalogue.consumed_leaves(np.array([], dtype=np.int64)).tolist() == []
    members = [[list(CODES)[i] for i in items] for items in catalogue.items_of_leaf]
    assert members == [["a", "b"], ["c"], ["d", "e"], ["g"], ["f"]]


def test_a_smaller_catalogue_knows_its_own_items_alone() -> None:
    catalogue = Catalogue(SIDS, np.array([1, 3]))  # b, d
    assert catalogue.leaf(np.arange(len(CODES))).tolist() == [-1, 0, -1, 1, -1, -1, -1]
    assert catalogue.consumed_leaves(np.array([0, 3])).tolist() == [1]
    assert [items.tolist() for items in catalogue.items_of_leaf] == [[1], [3]]


def test_what_a_user_has_seen_is_not_available() -> None:
    catalogue = Catalogue(SIDS, np.arange(len(CODES)))
    leaves = np.array([[0, 1, 2, 3, -1], [2, 0, 4, -1, -1]])
    assert catalogue.available(leaves, None).tolist() == [[2, 1, 2, 1, 0], [2, 2, 1, 0, 0]]
    seen = [np.array([0, 0, 2, 6]), np.array([3, 4, 5])]
    assert catalogue.available(leaves, seen).tolist() == [[1, 0, 2, 0, 0], [0, 2, 0, 0, 0]]
    assert catalogue.available(leaves, [np.array([], dtype=np.int64)] * 2).tolist() == [
        [2, 1, 2, 1, 0],
        [2, 2, 1, 0, 0],
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000))
def test_a_place_is_that_in_the_list_of_items(seed: int) -> None:
    rng = np.random.default_rng(seed)
    catalogue = Catalogue(SIDS, np.arange(len(CODES)))
    n, width = catalogue.trie.n_leaves, int(rng.integers(1, 6))
    leaf = np.stack([rng.permutation(n)[:width] for _ in range(4)])
    score = -np.sort(rng.integers(0, 4, size=(4, width))).astype(np.float32)  # equal scores of different IDs too
    target = rng.integers(len(CODES), size=4)
    histories = [np.flatnonzero(rng.random(len(CODES)) < 0.3) for _ in range(4)]
    allowed = np.array([t not in h for t, h in zip(target, histories, strict=True)])
    beams = Beams(torch.from_numpy(leaf), torch.from_numpy(score), torch.full((4,), torch.nan))
    for u, found in enumerate(zip(*places(beams, catalogue, target, allowed, histories), strict=True)):
        items = catalogue.listed(leaf[u].tolist(), score[u].tolist(), histories[u])
        own = [s for item, s in items if item == target[u]]
        if not own:
            assert found == (-1, -1, -1)
            continue
        better, equal = sum(s > own[0] for _, s in items), sum(s == own[0] for _, s in items)
        assert found == (better, equal, leaf[u].tolist().index(catalogue.leaf(target[u : u + 1])[0]))
