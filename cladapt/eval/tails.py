"""Head and tail of the items by two notions, and how models do on either.

By data: how often an item was trained on up to the tested block; validation and test events do not count. By prior: how
probable the unadapted base finds its ID, or its title, before any history (`cladapt.eval.prior`). The head is the first
fifth of the items in descending order, equal items by their order in the stream. Ordered are by data the items that
were trained on, by prior those of the block's catalogue; an item never trained on is of the data's tail.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from cladapt.config import EvalConfig
from cladapt.data.histories import training_sequences
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.eval.cases import Cases
from cladapt.eval.cells import Earlier
from cladapt.eval.metrics import user_metrics
from cladapt.eval.prior import Priors
from cladapt.eval.protocol import TESTS, Measures, Tester, headline, rows_by_line
from cladapt.eval.significance import Effect, bounds, compare, interval

PLACES = {
    "block": pl.Int32(),  # the tested block, up to which training events count
    "item": pl.String(),  # a target there
    "data_quintile": pl.Int32(),  # 1 (most frequent) to 5 among the items trained on; null: it never was
    "prior": pl.Float64(),  # log-probability per token of its ID; null: it is not in the catalogue
    "prior_quintile": pl.Int32(),  # 1 (most probable) to 5 among the catalogue's items; null where `prior` is
    "title_prior": pl.Float64(),  # the same of its title; null without words that the base knows
    "title_quintile": pl.Int32(),
}
"""Where the targets of a block stand among its items."""
NOTE = (
    "Means over tests on the block just learned, with 95 % intervals over users. Data: by training events up to that "
    "block; prior: by the log-probability per token that the unadapted base gives an ID (title: a title) after "
    "no history. Head: the first fifth of the items, equal ones in the stream's order; tail: all others, by data also "
    "those never trained on. Quintile 1 is the most frequent. A target outside the catalogue has no prior. Differences "
    "by prior are given where both models have one base."
)


def quintiles(values: np.ndarray) -> np.ndarray:
    """Which fifth of the items each is in by descending `values` [n], equal ones by place: 1 to 5, int64 [n].

    1 + floor(5 rank / n) with ranks from 0, so that sizes differ by one at most.
    """
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return 1 + 5 * rank // max(1, len(values))


def measure_places(evaluator: Tester, blocks: Sequence[int], earlier: "Earlier[Measures]") -> pl.DataFrame:
    """PLACES of the held-out targets of each block; what `earlier` has of a block is kept."""
    found, priors = [pl.DataFrame(schema=PLACES)], evaluator.priors()
    for block in blocks:
        known = earlier.on(block)
        kept = None if known is None or known.places is None else known.places.filter(pl.col("block") == block)
        if kept is None or kept.is_empty():
            kept = places_of(evaluator.stream, evaluator.cases(block), priors)
        found.append(kept)
    return pl.concat(found, rechunk=True)


def places_of(stream: Stream, cases: Cases, priors: Priors | None) -> pl.DataFrame:
    """PLACES of the held-out targets of one block; without `priors` nothing is known by them."""
    names, block = stream.items["item"], cases.block
    count = np.bincount(training_sequences(stream, block).item, minlength=stream.n_items)
    trained = np.flatnonzero(count)
    frames: list[dict[str, Any]] = [{"item": names.gather(trained), "data_quintile": quintiles(count[trained])}]
    if priors is not None:
        prior = priors.of_ids(cases.catalogue, f"block {block}, priors of items")
        title = priors.of_titles(block)[cases.catalogue]
        titled = np.flatnonzero(~np.isnan(title))
        frames += [
            {"item": names.gather(cases.catalogue), "prior": prior, "prior_quintile": quintiles(prior)},
            {
                "item": names.gather(cases.catalogue[titled]),
                "title_prior": title[titled],
                "title_quintile": quintiles(title[titled]),
            },
        ]
    places = pl.DataFrame({"item": names.gather(np.unique(cases.target))}).with_columns(block=pl.lit(block))
    for columns in frames:
        places = places.join(pl.DataFrame(columns), on="item", how="left", maintain_order="left")
    unknown = [pl.lit(None).alias(name) for name in PLACES if name not in places.columns]
    return places.with_columns(unknown).select(*PLACES).cast(PLACES)  # type: ignore[arg-type]


def placed(measures: Measures) -> Measures | None:
    """The same with the columns of PLACES in all rows of the later blocks; None where places were not measured."""
    places = measures.places
    if places is None:
        return None
    later = measures.rows.filter(pl.col("block") > measures.base_block)
    if lacking := later.join(places, on=["block", "item"], how="anti").height:
        raise DataError(f"{lacking} tests have a target without a place among the items", "evaluate the run again")
    references = {name: _joined(rows, places) for name, rows in measures.references.items()}
    return replace(measures, rows=_joined(later, places), references=references, next=None)


def _joined(rows: pl.DataFrame, places: pl.DataFrame) -> pl.DataFrame:
    return rows.join(places, on=["block", "item"], how="left", maintain_order="left", validate="m:1")


def groups(rows: pl.DataFrame) -> dict[str, pl.Expr]:
    """The groups of placed rows: data, prior and title by data where these are known, quintiles by data."""
    data_head = (pl.col("data_quintile") == 1).fill_null(False)
    data = {"data head": data_head, "data tail": ~data_head}
    notions = [notion for notion in ("prior", "title") if not rows[f"{notion}_quintile"].is_null().all()]
    grid = {
        f"{notion} {end}, {name}": inside & part
        for notion in notions
        for end, inside in (("head", pl.col(f"{notion}_quintile") == 1), ("tail", pl.col(f"{notion}_quintile") > 1))
        for name, part in data.items()
    }
    by_quintile = {f"data quintile {q}": pl.col("data_quintile") == q for q in range(1, 6)}
    return {**data, **grid, **by_quintile, "never trained on": pl.col("data_quintile").is_null()}


def tail_table(measures: Measures) -> list[dict[str, Any]]:
    """Every line of the run's table by group: one row each; none where places were not measured."""
    found = placed(measures)
    if found is None:
        return []
    return [row for name, rows in rows_by_line(found).items() for row in tail_rows(name, rows, found.config)]


def tail_rows(name: str, rows: pl.DataFrame, config: EvalConfig) -> list[dict[str, Any]]:
    """One row per group of placed rows: users, tests, means over tests, intervals over users for all but NDCG."""
    measured = user_metrics(rows, config.top_k, config.beams)
    return [
        {"model": name, "group": group, **_means(measured.filter(part), config)} for group, part in groups(rows).items()
    ]


def _means(measured: pl.DataFrame, config: EvalConfig) -> dict[str, Any]:
    hits, gain, likelihood = headline(config)
    row: dict[str, Any] = {"users": measured["user"].n_unique(), TESTS: measured.height}
    row |= {metric: measured[metric].mean() for metric in (hits, gain, likelihood)}
    for metric in (hits, likelihood):
        known = measured.drop_nulls(metric)
        enough = known["user"].n_unique() >= 2
        effect = interval(known[metric].to_numpy(), known["user"].to_numpy(), config.bootstrap) if enough else None
        row[f"{metric} 95 %"] = bounds(effect)
    return row


def tail_effects(a: pl.DataFrame, b: pl.DataFrame, config: EvalConfig) -> Mapping[tuple[str, str], Effect]:
    """Paired differences of placed rows, `a` minus `b`, by (group, metric).

    Left out are groups whose tests are not the same on both sides, as by priors of two bases, and fewer than two users.
    """
    left, right = (user_metrics(rows, config.top_k, config.beams) for rows in (a, b))
    found: dict[tuple[str, str], Effect] = {}
    for group, part in groups(a).items():
        one, other = left.filter(part), right.filter(part)
        for metric in headline(config) if _tests(one).equals(_tests(other)) else ():
            known = one.drop_nulls(metric), other.drop_nulls(metric)
            if min(rows["user"].n_unique() for rows in known) >= 2:
                found[group, metric] = compare(*known, metric, config.bootstrap)
    return found


def _tests(rows: pl.DataFrame) -> pl.DataFrame:
    keys = ["block", "user", *(["seed"] if "seed" in rows.columns else [])]
    return rows.select(keys).sort(keys)
