"""Tables, differences and summaries against plain-Python arithmetic on small made-up rows."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import fmean
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest

from cladapt.config import EvalConfig, SimulateConfig
from cladapt.data.simulate import simulate
from cladapt.errors import ConfigError
from cladapt.eval.baselines import evaluate_counts
from cladapt.eval.cases import Cases, first_event_cases, held_out_cases
from cladapt.eval.cells import Candidate, Earlier
from cladapt.eval.metrics import ROWS
from cladapt.eval.protocol import (
    COUNTS,
    NOT_ALLOWED,
    OWN_HISTORY,
    Measures,
    backward_effects,
    backward_rows,
    block_mean_interval,
    ceiling_row,
    cells,
    continual_summary,
    differences,
    effects_by_block,
    matrix,
    measure_counts,
    measure_run,
    metric_columns,
    model_row,
    slice_table,
    table,
)
from cladapt.eval.significance import NO_DIFFERENCE

CONFIG = EvalConfig(top_k=(2, 4), beams=6, bootstrap=200)
BASE = 1
USERS = {1: "abc", 2: "abcd", 3: "ae"}  # blocks of different sizes: their means must weigh the same


def make_rows(seed: int, model_blocks: Sequence[int] = (1, 2, 3), likelihood: bool = True) -> pl.DataFrame:
    rows = []
    for t, s in product(model_blocks, USERS):
        for u, user in enumerate(USERS[s]):
            rank = (seed + 3 * t + 5 * s + 2 * u) % 8
            rows.append(
                {
                    "model_block": t,
                    "block": s,
                    "user": user,
                    "item": "i",
                    "allowed": True,
                    "rank": rank if rank < 6 else None,
                    "ties": 1 + (u + s) % 2 if rank < 6 else None,
                    "id_rank": rank // 2 if rank < 6 and likelihood else None,
                    "share": 1 + (u + s) % 2 if likelihood else None,
                    "log_likelihood": -1.0 - 0.1 * rank - 0.01 * t if likelihood else None,
                    "frequency": u,
                    "user_kind": "new",
                    "new_item": False,
                    "one_hop": u == 0,
                }
            )
    return pl.DataFrame(rows, schema=ROWS)


def make_measures(name: str, seed: int, model_blocks: Sequence[int] = (1, 2, 3), **more: Any) -> Measures:
    references = {
        counts: make_rows(7 + i, [2, 3], likelihood=False).filter(
            (pl.col("model_block") == pl.col("block")) & (pl.col("block") > BASE)
        )
        for i, counts in enumerate(COUNTS)
    }
    return Measures(name, make_rows(seed, model_blocks), more.pop("references", references), BASE, CONFIG, **more)


def value(row: dict[str, Any], metric: str) -> float:
    if metric == "log_likelihood":
        return row["log_likelihood"]
    if metric.endswith(" (ID)"):
        return value({**row, "rank": row["id_rank"], "ties": 1}, metric.removesuffix(" (ID)"))
    name, _, k = metric.partition("@")
    if row["rank"] is None:
        return 0.0
    places = range(row["rank"], row["rank"] + row["ties"])
    cut = int(k) if k else CONFIG.beams
    worth = {"HR": lambda j: 1.0, "NDCG": lambda j: 1 / math.log2(j + 2), "MRR": lambda j: 1 / (j + 1)}[name]
    return sum(worth(j) for j in places if j < cut) / row["ties"]


def mean_of_block_means(rows: pl.DataFrame, metric: str) -> float:
    blocks = rows["block"].unique().to_list()
    return fmean(fmean(value(r, metric) for r in rows.filter(pl.col("block") == b).to_dicts()) for b in blocks)


def test_a_line_is_the_mean_over_blocks_of_block_means() -> None:
    rows = make_measures("m", 0).current
    line = model_row("m", rows, CONFIG)
    assert rows["block"].value_counts().sort("block")["count"].to_list() == [4, 2]
    for metric in ["HR@2", "NDCG@2", "HR@4", "NDCG@4", "MRR", "log_likelihood", "HR@4 (ID)"]:
        assert line[metric] == pytest.approx(mean_of_block_means(rows, metric)), metric
    assert line["model"] == "m"
    assert line["users"] == 5  # a..d and e; a has a row in both blocks
    assert (line["tests"], line[NOT_ALLOWED]) == (6, 0)
    assert metric_columns(CONFIG) == ["HR@2", "HR@4", "NDCG@2", "NDCG@4", "MRR", "log_likelihood"]


def test_the_interval_stands_around_the_line_s_value() -> None:
    rows = make_measures("m", 0).current
    line = model_row("m", rows, CONFIG)
    for metric in ("HR@4", "log_likelihood"):
        low, high = map(float, line[f"{metric} 95 %"].strip("[]").split(", "))
        assert low < line[metric] < high
    effect = block_mean_interval(rows.with_columns(x=pl.col("log_likelihood")), "x", 200)
    assert effect is not None
    assert effect.mean == pytest.approx(line["log_likelihood"])


def test_one_user_has_values_but_no_interval_and_a_model_without_likelihood_says_none() -> None:
    rows = make_measures("m", 0).current.filter(pl.col("user") == "a")
    line = model_row("m", rows, CONFIG)
    assert line["HR@4"] == pytest.approx(mean_of_block_means(rows, "HR@4"))
    assert (line["users"], line["HR@4 95 %"]) == (1, None)
    without = {"log_likelihood": pl.lit(None, pl.Float64), "share": pl.lit(None, pl.Int32)}
    counts = model_row("markov", rows.with_columns(**without), CONFIG)
    assert counts["log_likelihood"] is None
    assert counts["HR@4 (ID)"] is None
    assert counts["HR@4"] == line["HR@4"]


def test_targets_that_may_not_be_recommended_are_counted_and_missed() -> None:
    rows = make_measures("m", 0).current
    refused = pl.col("user") == "a"
    nothing = {name: pl.when(~refused).then(pl.col(name)) for name in ("rank", "ties", "id_rank")}
    line = model_row("m", rows.with_columns(allowed=~refused, **nothing), CONFIG)
    assert line[NOT_ALLOWED] == 2  # in both blocks
    missed = [{**row, "rank": None} if row["user"] == "a" else row for row in rows.to_dicts()]
    expected = fmean(fmean(value(row, "HR@4") for row in missed if row["block"] == b) for b in (2, 3))
    assert line["HR@4"] == pytest.approx(expected)


def test_a_target_without_a_likelihood_is_left_out_of_its_mean_alone() -> None:
    rows = make_measures("m", 0).current
    unknown = pl.col("user") == "b"
    line = model_row("m", rows.with_columns(log_likelihood=pl.when(~unknown).then(pl.col("log_likelihood"))), CONFIG)
    assert line["log_likelihood"] == pytest.approx(mean_of_block_means(rows.filter(~unknown), "log_likelihood"))
    assert line["HR@4"] == pytest.approx(mean_of_block_means(rows, "HR@4"))


def test_current_and_frozen_rows() -> None:
    measures = make_measures("m", 0)
    assert set(measures.current.select("model_block", "block").rows()) == {(2, 2), (3, 3)}
    assert set(measures.frozen.select("model_block", "block").rows()) == {(1, 2), (1, 3)}


def test_the_table_lists_runs_then_what_stands_beside_them() -> None:
    ceiling = {2: {"HR@2": 0.5, "log_likelihood": -1.0}, 3: {"HR@2": 0.7, "log_likelihood": -3.0}}
    first, second = make_measures("peso", 0, ceiling=ceiling), make_measures("finetune", 4)
    lines = table([first, second])
    assert [line["model"] for line in lines] == ["peso", "finetune", "frozen", *COUNTS, "ceiling"]
    assert lines[0] == model_row("peso", first.current, CONFIG)
    assert lines[1] == model_row("finetune", second.current, CONFIG)
    assert lines[2] == model_row("frozen", first.frozen, CONFIG)
    assert lines[3] == model_row(COUNTS[0], first.references[COUNTS[0]], CONFIG)
    assert lines[-1] == ceiling_row(ceiling, CONFIG)
    assert lines[-1]["HR@2"] == pytest.approx(0.6)
    assert lines[-1]["log_likelihood"] == pytest.approx(-2.0)
    assert lines[-1]["MRR"] is None
    assert "ceiling" not in [line["model"] for line in table([second])]


def test_a_difference_is_the_difference_of_two_cells() -> None:
    measures = [make_measures("peso", 0), make_measures("finetune", 4)]
    cells = {line["model"]: line for line in table(measures)}
    lines = differences(measures)
    assert [line["difference"] for line in lines] == [f"peso - {n}" for n in ("finetune", "frozen", *COUNTS)]
    for line in lines:
        other = cells[line["difference"].removeprefix("peso - ")]
        assert line["HR@4"] == pytest.approx(cells["peso"]["HR@4"] - other["HR@4"])
        if other["log_likelihood"] is None:
            assert line["log_likelihood"] is None
            assert "log_likelihood shown" not in line
        else:
            expected = cells["peso"]["log_likelihood"] - other["log_likelihood"]
            assert line["log_likelihood"] == pytest.approx(expected)


def test_equal_runs_show_no_difference_and_a_constant_gain_is_shown() -> None:
    first = make_measures("peso", 0)
    better = Measures("b", first.rows.with_columns(pl.col("log_likelihood") + 0.5), {}, BASE, CONFIG)
    (same, *_), (gain, *_) = differences([first, make_measures("twin", 0)]), differences([better, first])
    assert (same["HR@4"], same["HR@4 shown"]) == (0.0, NO_DIFFERENCE)
    assert gain["log_likelihood"] == pytest.approx(0.5)
    assert gain["log_likelihood shown"].startswith("+0.5000 [")


def test_one_user_has_no_paired_interval() -> None:
    first, second = (
        replace(m, rows=m.rows.filter(pl.col("user") == "a"), references={})
        for m in (make_measures("peso", 0), make_measures("finetune", 4))
    )
    lines = differences([first, second])
    assert [line["HR@4"] for line in lines] == [None, None]


def test_a_run_that_adapts_nothing_has_the_base_s_rows_alone() -> None:
    measures = make_measures("frozen", 0, model_blocks=[1])
    assert measures.current.is_empty()
    assert [line["model"] for line in table([measures])] == ["frozen", *COUNTS]
    assert table([measures])[0]["MRR"] == pytest.approx(mean_of_block_means(measures.frozen, "MRR"))
    assert differences([measures]) == []
    # beside a run that adapts it stands once, as the frozen line
    lines = table([make_measures("peso", 0), measures])
    assert [line["model"] for line in lines] == ["peso", "frozen", *COUNTS]


def test_the_matrix_holds_the_mean_of_every_cell() -> None:
    measures = make_measures("m", 0)
    grid = matrix(measures, "NDCG@4")
    assert (grid.model_blocks, grid.blocks, grid.base) == ((1, 2, 3), (1, 2, 3), BASE)
    for t, s in product((1, 2, 3), repeat=2):
        cell = measures.rows.filter((pl.col("model_block") == t) & (pl.col("block") == s))
        assert grid[t, s] == pytest.approx(fmean(value(row, "NDCG@4") for row in cell.to_dicts()))


def test_continual_summaries_by_hand() -> None:
    measures = make_measures("m", 0)
    r = matrix(measures, "MRR")
    (line,) = continual_summary(measures, ["MRR"])
    assert line == {
        "metric": "MRR",
        "average": pytest.approx((r[2, 2] + r[3, 3]) / 2),
        "backward transfer": pytest.approx((r[3, 1] - r[1, 1] + r[3, 2] - r[2, 2]) / 2),
        "forward transfer": pytest.approx(r[2, 3] - r[1, 3]),
        "plasticity": pytest.approx((r[2, 2] - r[1, 2] + r[3, 3] - r[2, 3]) / 2),
    }
    (nothing,) = continual_summary(make_measures("frozen", 0, model_blocks=[1]), ["MRR"])
    assert nothing["average"] is None


class Asked:
    """Stands for an evaluator and remembers what it was asked."""

    def __init__(self, **config: Any) -> None:
        self.config = EvalConfig(**{"top_k": (2, 4), "beams": 6, "bootstrap": 200, **config})
        self.held_out: list[tuple[str, int, int]] = []
        self.first: list[tuple[str, int, int]] = []

    def rows(self, lm: str, model_block: int, block: int, first: bool = False) -> pl.DataFrame:
        (self.first if first else self.held_out).append((lm, model_block, block))
        return make_rows(0, [model_block]).filter(pl.col("block") == block)


def candidates(*names: str) -> list[Candidate]:
    """Models of blocks 1, 2, … that stand for themselves by name."""
    return [Candidate(block, partial(nullcontext, cast("Any", name))) for block, name in enumerate(names, 1)]


def test_every_model_meets_every_block_in_order_and_the_first_events_of_the_next() -> None:
    asked, notes = Asked(), []  # type: ignore[var-annotated]
    models = candidates("base", "second", "third")
    found, following = measure_run(asked, models, [1, 2, 3], notes.append)  # type: ignore[arg-type]
    names = ("base", "second", "third")
    assert asked.held_out == [(name, t, s) for t, name in enumerate(names, 1) for s in (1, 2, 3)]
    # the base stands beside the model of block 2 on block 3; block 4 does not exist
    assert asked.first == [("base", 1, 3), ("second", 2, 3)]
    assert found.select("model_block", "block").unique(maintain_order=True).rows() == [*product((1, 2, 3), repeat=2)]
    assert following.select("model_block", "block").unique(maintain_order=True).rows() == [(1, 3), (2, 3)]
    assert notes[1] == "tested the model of block 1 on block 2: 4 users"
    assert notes[3] == "and on the first events of block 3: 2 users"


@pytest.mark.parametrize("config", [{"next_block": False}, {"targets": "valid"}])
def test_nothing_is_chosen_by_the_next_block(config: dict[str, Any]) -> None:
    asked = Asked(**config)
    models = candidates("base", "second")
    _, following = measure_run(asked, models, [1, 2, 3], lambda _: None)  # type: ignore[arg-type]
    assert following.is_empty()
    assert asked.first == []


def test_what_an_earlier_evaluation_has_is_not_measured_again() -> None:
    whole = measure_run(Asked(), candidates("a", "b", "c"), [1, 2, 3], lambda _: None)  # type: ignore[arg-type]
    known = Measures("m", whole[0], {}, BASE, CONFIG, next=Measures("m", whole[1], {}, BASE, CONFIG, lag=1))
    opened: list[str] = []

    @contextmanager
    def opening(name: str) -> Iterator[Any]:
        opened.append(name)
        yield name

    models = [Candidate(block, partial(opening, name)) for block, name in enumerate("abc", 1)]
    asked, earlier = Asked(), Earlier(known, models={1, 2}, blocks=[1, 2])
    found = measure_run(asked, models, [1, 2, 3], lambda _: None, earlier)  # type: ignore[arg-type]
    assert all(one.equals(other) for one, other in zip(found, whole, strict=True))  # in the same order
    assert asked.held_out == [("a", 1, 3), ("b", 2, 3), ("c", 3, 1), ("c", 3, 2), ("c", 3, 3)]
    assert asked.first == [("a", 1, 3), ("b", 2, 3)]
    assert (earlier.kept, earlier.measured) == (4, 7)
    assert opened == ["a", "b", "c"]

    asked, earlier = Asked(), Earlier(known, models={1, 2, 3}, blocks=[1, 2, 3])
    opened.clear()
    found = measure_run(asked, models, [1, 2, 3], lambda _: None, earlier)  # type: ignore[arg-type]
    assert all(one.equals(other) for one, other in zip(found, whole, strict=True))
    assert (asked.held_out, asked.first, opened) == ([], [], [])  # no model is loaded for nothing

    asked, earlier = Asked(), Earlier(known, models={1, 2}, blocks=[2])
    rows, following = measure_run(asked, models, [1, 2, 3], lambda _: None, earlier, [3])  # type: ignore[arg-type]
    kept = (pl.col("block") == 2) & (pl.col("model_block") < 3)
    assert rows.equals(whole[0].filter(kept | (pl.col("block") == 3)))
    assert following.equals(whole[1])


def test_counts_are_made_up_to_the_tested_block_or_to_the_one_before() -> None:
    stream = simulate(SimulateConfig(users=40, items=40, topics=4, blocks=3)).stream

    def cases(block: int, first: bool) -> Cases:
        return first_event_cases(stream, block, True) if first else held_out_cases(stream, block, "test", True)

    evaluator: Any = SimpleNamespace(stream=stream, config=CONFIG, cases=cases)
    for lag, blocks in ((0, [2, 3]), (1, [3])):
        found = measure_counts(evaluator, blocks, lag)
        assert tuple(found) == COUNTS[:2]  # seen items may not be recommended
        for name in found:
            expected = [evaluate_counts(stream, name, b - lag, evaluator.cases(b, lag > 0), True, 6) for b in blocks]
            assert found[name].equals(pl.concat(expected))
        known = Measures("m", found[COUNTS[0]].clear(), found, BASE, CONFIG)
        earlier = Earlier(Measures("m", known.rows, {}, BASE, CONFIG, next=known) if lag else known, blocks=[3])
        again = measure_counts(evaluator, blocks[:-1], lag, earlier)
        del evaluator.cases
        kept = measure_counts(evaluator, [3], lag, earlier)
        assert all(kept[name].equals(found[name].filter(pl.col("block") == 3)) for name in found)
        assert all(again[name].equals(found[name].filter(pl.col("block") < 3)) for name in again)
        evaluator.cases = cases
    assert measure_counts(evaluator, []) == {}


def test_the_rows_of_the_next_block_are_judged_a_block_later() -> None:
    rows = make_rows(0)
    after = Measures("m", rows, {}, BASE, CONFIG, lag=1)
    assert set(after.current.select("model_block", "block").rows()) == {(2, 3)}
    assert set(after.frozen.select("model_block", "block").rows()) == {(1, 3)}
    assert [line["model"] for line in table([after])] == ["m", "frozen"]
    assert table([after])[0]["HR@4"] == pytest.approx(mean_of_block_means(after.current, "HR@4"))


def test_slices_take_the_run_s_current_rows_or_the_base_s() -> None:
    stream = simulate(SimulateConfig(users=40, items=40, topics=4, blocks=3)).stream
    measures, frozen = make_measures("m", 0), make_measures("frozen", 0, model_blocks=[1])
    for which, rows in ((measures, measures.current), (frozen, frozen.frozen)):
        lines = {line["slice"]: line for line in slice_table(which, stream)}
        assert lines["all"]["MRR"] == pytest.approx(fmean(value(row, "MRR") for row in rows.to_dicts()))
        assert list(lines["all"]) == ["slice", "users", "HR@4", "MRR", "log_likelihood"]
        assert lines["new users"]["users"] == rows["user"].n_unique()
        assert lines["dormant users"]["users"] == 0


def test_the_current_scope_tests_each_model_on_its_own_block_and_the_base_on_the_later_ones() -> None:
    asked = Asked(scope="current")
    models = candidates("base", "second", "third")
    found, following = measure_run(asked, models, [1, 2, 3], lambda _: None)  # type: ignore[arg-type]
    assert found.select("model_block", "block").unique(maintain_order=True).rows() == [(1, 2), (1, 3), (2, 2), (3, 3)]
    assert following.select("model_block", "block").unique(maintain_order=True).rows() == [(1, 3), (2, 3)]
    with pytest.raises(ConfigError, match=r"no model is tested on \[1\] with scope=current"):
        measure_run(asked, models, [1], lambda _: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["HR@2", "log_likelihood"])
def test_backward_transfer_of_users_is_that_of_the_matrix_and_its_difference_is_paired(metric: str) -> None:
    one, two = make_measures("a", 0), make_measures("b", 3)
    parts = [backward_rows(measures, [metric]) for measures in (one, two)]
    means = []
    for measures, rows in zip((one, two), parts, strict=True):
        assert rows is not None
        assert sorted(rows["block"].unique()) == [1, 2]
        mean = rows.group_by("block").agg(pl.col(metric).mean())[metric].mean()
        (line,) = continual_summary(measures, [metric])
        assert mean == pytest.approx(line["backward transfer"])
        means.append(mean)
    effect = backward_effects(*(rows for rows in parts if rows is not None), CONFIG, [metric])[metric]
    assert effect.mean == pytest.approx(means[0] - means[1])
    assert effect.low <= effect.mean <= effect.high


def test_backward_transfer_of_users_leaves_out_what_was_learned() -> None:
    whole = make_measures("a", 0)
    part = replace(whole, learned=frozenset({(3, 1), (2, 1)}))
    rows, kept = backward_rows(whole, ["HR@2"]), backward_rows(part, ["HR@2"])
    assert rows is not None
    assert kept is not None
    assert kept.equals(rows.filter(pl.col("block") == 2))
    (line,) = continual_summary(part, ["HR@2"])
    assert line["backward transfer"] == pytest.approx(kept["HR@2"].mean())
    assert "without block 1:" in line["left out"]
    assert "left out" not in continual_summary(whole, ["HR@2"])[0]
    every = replace(whole, learned=frozenset({(3, 1), (3, 2)}))
    assert backward_rows(every, ["HR@2"]) is None
    assert continual_summary(every, ["HR@2"])[0]["backward transfer"] is None
    assert [cell["learned"] for cell in cells(part)] == [False] * 3 + [True] + [False] * 2 + [True] + [False] * 2


def test_there_is_no_backward_transfer_without_the_earlier_blocks() -> None:
    whole = make_measures("a", 0)
    rows = whole.rows.filter(pl.col("model_block") == pl.col("block"))
    assert backward_rows(replace(whole, rows=rows), ["HR@2"]) is None


def test_differences_by_block_and_their_slope_against_plain_arithmetic() -> None:
    one, two = (make_measures("x", seed).current for seed in (0, 3))
    found = effects_by_block(one, two, CONFIG, ("log_likelihood",))
    gaps = {}
    for block in (2, 3):
        means = [fmean(rows.filter(pl.col("block") == block)["log_likelihood"].to_list()) for rows in (one, two)]
        gaps[block] = means[0] - means[1]
        assert found[str(block), "log_likelihood"].mean == pytest.approx(gaps[block])
    slope = found["slope", "log_likelihood"]
    assert slope.mean == pytest.approx(gaps[3] - gaps[2])  # least squares through two points
    assert slope.low <= slope.mean <= slope.high
    assert found.keys() == {(block, "log_likelihood") for block in ("2", "3", "slope")}


def test_the_slope_is_that_of_least_squares() -> None:
    blocks = [2, 3, 4, 6]
    rows = make_rows(0, [2]).filter(pl.col("block") == 2)
    gaps = dict(zip(blocks, [0.5, 0.1, 0.9, 1.7], strict=True))
    copies = [rows.with_columns(block=pl.lit(b, pl.Int32)) for b in blocks]
    one = pl.concat([r.with_columns(pl.col("log_likelihood") + gaps[b]) for r, b in zip(copies, blocks, strict=True)])
    slope = effects_by_block(one, pl.concat(copies), CONFIG, ("log_likelihood",))["slope", "log_likelihood"]
    expected = np.polyfit(blocks, list(gaps.values()), 1)[0]
    assert (slope.mean, slope.low, slope.high) == pytest.approx((expected,) * 3)  # all users have the same gap


def test_own_history_is_counted_only_where_seen_items_may_be_recommended() -> None:
    stream = simulate(SimulateConfig(users=30, items=30, topics=3, blocks=3)).stream
    for seen, expected in ((True, COUNTS[:2]), (False, COUNTS)):
        config = CONFIG.model_copy(update={"exclude_seen": seen})
        evaluator: Any = SimpleNamespace(
            config=config, stream=stream, cases=lambda b, first=False: held_out_cases(stream, b, "test", False)
        )
        assert tuple(measure_counts(evaluator, [2])) == expected
    assert expected[-1] == OWN_HISTORY
