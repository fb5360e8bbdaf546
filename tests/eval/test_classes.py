"""Measures of class-incremental learning against their formulas in plain loops, and intervals that behave."""

from statistics import fmean

import numpy as np
import polars as pl
import pytest

from cladapt.errors import DataError
from cladapt.eval.classes import (
    MEASURES,
    OF_CLASSIFIERS,
    OVER_HEAD,
    Outcomes,
    differences,
    effects,
    effects_of,
    judged_by,
    known_further,
    measures,
)
from cladapt.eval.images import ROWS


def make_rows(seed: int, first: int = 0, blocks: int = 4, images: int = 12, skill: float = 0.6) -> pl.DataFrame:
    """Models `first` to `blocks` on blocks 1 to `blocks`; the base has learned `first` blocks."""
    rng = np.random.default_rng(seed)
    rows = []
    for model in range(first, blocks + 1):
        for block in range(1, blocks + 1):
            for image in range(images - block):
                correct, biased, prototype = (
                    int(rng.random() < chance) if block <= model else None for chance in (skill, 0.5, 0.7)
                )
                judged = (correct, biased, prototype, int(rng.random() < 0.5))
                rows.append((model, block, 100 * block + image, *judged))
    return pl.DataFrame(rows, schema=ROWS, orient="row")


def brute(rows: pl.DataFrame) -> dict[str, float]:
    models, blocks = (sorted(rows[name].unique()) for name in ("model", "block"))
    r, p = {}, {}
    for i in models:
        for j in blocks:
            own = rows.filter((pl.col("model") == i) & (pl.col("block") == j))
            r[i, j], p[i, j] = own["correct"].mean(), own["probe"].mean()
    last, first = models[-1], models[0]
    known = [j for j in blocks if j in models]
    earlier = [j for j in known if j < last]
    return {
        "ACC": fmean(r[last, j] for j in known),
        "MAA": fmean(fmean(r[i, j] for j in known if j <= i) for i in models if i in blocks),
        "learning": fmean(r[j, j] for j in known),
        "BWT": fmean(r[last, j] - r[j, j] for j in earlier),
        "forgetting": fmean(max(r[i, j] for i in models if j <= i < last) - r[last, j] for j in earlier),
        "FWT": fmean(p[i, j] - p[first, j] for i in models[1:] for j in blocks if j > i),
    }


@pytest.mark.parametrize("first", [0, 1])
def test_measures_are_their_formulas(first: int) -> None:
    rows = make_rows(3, first)
    outcomes = Outcomes.of(rows.sample(fraction=1.0, shuffle=True, seed=0))  # the order of rows does not matter
    found = measures(*outcomes.matrices(), outcomes.models, outcomes.blocks)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(brute(rows))


def test_effects_are_means_over_seeds_and_differences_are_paired() -> None:
    one, two = (
        {seed: make_rows(seed + shift, skill=skill) for seed in range(3)} for shift, skill in ((0, 0.8), (50, 0.4))
    )
    for by_seed in (one, two):
        found = effects(by_seed, 200)
        for name in MEASURES:
            assert found[name].mean == pytest.approx(fmean(brute(rows)[name] for rows in by_seed.values()))
            assert found[name].low <= found[name].mean <= found[name].high
    paired = differences(one, two, 200)
    for name in MEASURES:
        expected = fmean(brute(one[s])[name] - brute(two[s])[name] for s in range(3))
        assert paired[name].mean == pytest.approx(expected)
    assert paired["ACC"].low > 0


@pytest.mark.parametrize("classifier", ["biased", "prototype"])
def test_a_further_classifier_has_the_measures_of_its_own_column_and_what_it_gains(classifier: str) -> None:
    rows = {0: make_rows(4), 1: make_rows(5)}
    other = {s: frame.with_columns(correct=pl.col(classifier)) for s, frame in rows.items()}
    found = effects_of(rows, classifier, 200)
    assert [*found] == [*OF_CLASSIFIERS, OVER_HEAD]
    for name in OF_CLASSIFIERS:
        assert found[name].mean == pytest.approx(fmean(brute(frame)[name] for frame in other.values()))
    gain = fmean(brute(other[s])["ACC"] - brute(rows[s])["ACC"] for s in rows)
    assert found[OVER_HEAD].mean == pytest.approx(gain)
    assert found[OVER_HEAD].low < gain < found[OVER_HEAD].high
    assert effects_of(rows, "correct", 200) == effects(rows, 200)
    assert judged_by(rows[0], "correct").equals(rows[0])


def test_a_classifier_is_known_where_it_told_whatever_the_head_did() -> None:
    rows = make_rows(0)
    assert known_further(rows) == ["biased", "prototype"]
    assert known_further(rows.with_columns(biased=pl.lit(None, pl.Int8))) == ["prototype"]
    assert known_further(rows.filter(pl.col("model") == 0)) == ["biased", "prototype"]  # nothing is told by anyone


def test_a_run_against_itself_shows_nothing_at_all() -> None:
    rows = {0: make_rows(1), 1: make_rows(2)}
    for effect in differences(rows, rows, 100).values():
        assert (effect.mean, effect.low, effect.high) == (0.0, 0.0, 0.0)


def test_the_interval_has_the_width_of_the_binomial() -> None:
    rows = make_rows(0, first=1, blocks=1, images=401, skill=0.5)  # one model, one block of 400 images
    effect = effects({0: rows}, 2000)["ACC"]
    width = (effect.high - effect.low) / (2 * 1.96)
    assert width == pytest.approx((effect.mean * (1 - effect.mean) / 400) ** 0.5, rel=0.1)
    assert np.isnan(effects({0: rows}, 100)["BWT"].mean)


def test_more_seeds_on_the_same_images_do_not_narrow_what_the_images_leave_open() -> None:
    rows = make_rows(5, first=1, images=60)
    one, many = effects({0: rows}, 1000)["ACC"], effects(dict.fromkeys(range(8), rows), 1000)["ACC"]
    assert (many.low, many.high) == pytest.approx((one.low, one.high))


def test_rows_that_do_not_fit_together_are_told() -> None:
    rows = make_rows(0)
    again = pl.when((pl.col("model") == 1) & (pl.col("image") == 203)).then(202).otherwise("image").cast(pl.Int64)
    with pytest.raises(DataError, match="block 2: not every model was tested on every image once"):
        Outcomes.of(rows.with_columns(image=again))
    with pytest.raises(DataError, match=r"models after the blocks \[0, 1, 2, 3, 4\] against \[0\]"):
        differences({0: rows}, {0: rows.filter(pl.col("model") == 0)})
    with pytest.raises(DataError, match="block 2: not every model was tested on every image once"):
        Outcomes.of(rows.filter(~((pl.col("model") == 1) & (pl.col("image") == 203))))
    with pytest.raises(DataError, match=r"seeds \[0\] against \[1\]"):
        differences({0: rows}, {1: rows})
    with pytest.raises(DataError, match="seed 0: the two were tested on different images"):
        differences({0: rows}, {0: make_rows(0, images=9)})
