import numpy as np
import polars as pl
import pytest

from cladapt.errors import ConfigError, DataError
from cladapt.eval.significance import Effect, compare, describe, interval, paired_bootstrap


def frame(user: list[str], value: list[float | None], block: int = 2, **more: list) -> pl.DataFrame:
    return pl.DataFrame({"block": [block] * len(user), "user": user, "HR@5": value, **more})


def test_one_row_per_user_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).normal(0.3, 1.0, size=2000)
    effect = interval(values, np.arange(2000), resamples=8000)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert effect.mean == pytest.approx(values.mean())
    assert effect.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert effect.high == pytest.approx(values.mean() + half, abs=0.06 * half)
    assert effect.n == 2000


def test_repeating_every_row_of_a_user_adds_no_certainty():
    values = np.random.default_rng(2).normal(size=300)
    once = interval(values, np.arange(300))
    thrice = interval(np.repeat(values, 3), np.repeat(np.arange(300), 3))
    assert (once.low, once.high, once.n) == (pytest.approx(thrice.low), pytest.approx(thrice.high), thrice.n)


def test_users_of_unequal_size_agree_with_the_ratio_estimators_normal_approximation():
    rng = np.random.default_rng(3)
    size = rng.integers(1, 6, size=1500)
    users = np.repeat(np.arange(1500), size)
    values = np.repeat(rng.normal(size=1500), size) + rng.normal(size=len(users))
    mean = values.mean()
    residual = np.bincount(users, weights=values - mean)
    half = 1.96 * np.sqrt((residual**2).sum()) / size.sum()
    effect = interval(values, users, resamples=6000)
    assert effect.high - effect.low == pytest.approx(2 * half, rel=0.05)
    assert effect.mean == pytest.approx(mean)


def test_coverage_of_a_known_effect_is_near_95_percent():
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(300):
        user = np.repeat(rng.normal(size=80), 2)
        b = user + rng.normal(size=160)
        a = b + 0.2 + np.repeat(rng.normal(size=80), 2) * 0.5
        effect = paired_bootstrap(a, b, np.repeat(np.arange(80), 2), resamples=400, seed=trial)
        covered += effect.low <= 0.2 <= effect.high
    assert 0.91 <= covered / 300 <= 0.98  # 3 standard errors about 0.945


def test_pairing_removes_what_the_two_sides_share():
    rng = np.random.default_rng(5)
    shared = rng.normal(scale=10.0, size=400)
    effect = paired_bootstrap(shared + 0.1, shared, np.arange(400))
    assert (effect.mean, effect.low, effect.high) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))


def test_the_seed_decides_the_interval():
    values, users = np.random.default_rng(6).normal(size=50), np.arange(50)
    assert interval(values, users, seed=1) == interval(values, users, seed=1)
    assert interval(values, users, seed=1) != interval(values, users, seed=2)


def test_batches_of_resamples_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch):
    values, users = np.random.default_rng(7).normal(size=50), np.arange(50)
    whole = interval(values, users)
    monkeypatch.setattr("cladapt.eval.significance._DRAWS_AT_ONCE", 50 * 7)
    assert interval(values, users) == whole


def test_compare_pairs_rows_whatever_their_order():
    a = frame(["x", "y", "z"], [1.0, 0.0, 1.0])
    b = frame(["z", "x", "y"], [0.5, 0.5, 0.5])
    assert compare(a, b, "HR@5").mean == pytest.approx(0.5 / 3)
    assert compare(a, b, "HR@5") == compare(a.reverse(), b, "HR@5")


def test_compare_pairs_seed_with_seed():
    a = frame(["x", "x", "y", "y"], [1.0, 0.0, 1.0, 0.0], seed=[0, 1, 0, 1])
    b = frame(["x", "x", "y", "y"], [0.0, 1.0, 0.0, 1.0], seed=[1, 0, 1, 0])
    effect = compare(a, b, "HR@5")
    assert (effect.mean, effect.low, effect.high, effect.n) == (0.0, 0.0, 0.0, 2)


def test_rows_without_a_partner_are_counted_on_both_sides():
    with pytest.raises(DataError, match="2 of 3 rows on the first side and 1 of 2 on the second lack a partner"):
        compare(frame(["x", "y", "z"], [0.0] * 3), frame(["x", "w"], [0.0] * 2), "HR@5")


def test_the_same_user_in_another_block_is_no_partner():
    with pytest.raises(DataError, match="with the same block, user"):
        compare(frame(["x", "y"], [0.0] * 2, block=2), frame(["x", "y"], [0.0] * 2, block=3), "HR@5")


def test_seeds_on_one_side_only_are_refused():
    with pytest.raises(DataError, match="the second rows lack the column 'seed'"):
        compare(frame(["x", "y"], [0.0] * 2, seed=[0, 0]), frame(["x", "y"], [0.0] * 2), "HR@5")


def test_a_case_that_occurs_twice_is_refused():
    with pytest.raises(DataError, match="2 of the first rows share their block, user"):
        compare(frame(["x", "x"], [0.0, 1.0]), frame(["x", "y"], [0.0] * 2), "HR@5")


def test_missing_values_are_refused():
    with pytest.raises(DataError, match="1 of 2 values are not finite"):
        compare(frame(["x", "y"], [None, 1.0]), frame(["x", "y"], [0.0] * 2), "HR@5")


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="needs at least 2 of them, found 1"):
        interval(np.ones(3), np.zeros(3))
    with pytest.raises(DataError, match="needs at least 2 of them, found 0"):
        interval(np.ones(0), np.zeros(0))
    with pytest.raises(DataError, match=r"\(3,\) values for 2 user ids"):
        interval(np.ones(3), np.zeros(2))
    with pytest.raises(DataError, match="3 values against 2"):
        paired_bootstrap(np.ones(3), np.ones(2), np.arange(3))
    with pytest.raises(ConfigError, match="resamples=10 is too few"):
        interval(np.ones(3), np.arange(3), resamples=10)


@pytest.mark.parametrize(
    ("effect", "text"),
    [
        (Effect(0.0123, 0.004, 0.02, 9), "+0.0123 [0.0040, 0.0200]"),
        (Effect(-0.5, -0.75, -0.25, 9), "-0.5000 [-0.7500, -0.2500]"),
        (Effect(0.01, -0.001, 0.02, 9), "no difference shown"),
        (Effect(0.01, 0.0, 0.02, 9), "no difference shown"),
        (Effect(float("nan"), float("nan"), float("nan"), 9), "-"),
    ],
)
def test_a_difference_is_told_only_when_it_is_shown(effect: Effect, text: str):
    assert describe(effect) == text
