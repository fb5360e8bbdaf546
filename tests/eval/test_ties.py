"""Evaluation says what the recommended lists give: means over random orders of their ties, by simulation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cladapt.config import EvalConfig
from cladapt.data.histories import training_sequences
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.eval.baselines import MODELS, evaluate_counts
from cladapt.eval.evaluate import Evaluator
from cladapt.eval.metrics import user_metrics
from cladapt.eval.recommend import recommend
from cladapt.model.load import Base, new_model
from cladapt.tokens.prompts import PackedForm
from cladapt.tokens.sids import SidTable

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
    """A tenth of the items, and all popular ones, share an ID with another."""
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
