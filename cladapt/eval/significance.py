"""Which differences the data shows: paired bootstrap over users, each user's rows drawn together.

A user may have several rows (blocks, seeds); they are not independent, so the user is the unit that is resampled.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from cladapt.errors import ConfigError, DataError

LEVEL = 0.95
NO_DIFFERENCE = "no difference shown"
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Effect:
    """A mean over rows with its 95 % interval; `n` users stand behind it."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def covers_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


def interval(values: np.ndarray, users: np.ndarray, resamples: int = 2000, seed: int = 0) -> Effect:
    """Mean of `values` [n] with the percentile interval of a bootstrap over `users` [n] (any ids).

    A resample draws as many users as there are, with replacement, and is worth sum(values) / number(rows) of the drawn.
    """
    values = np.asarray(values, dtype=np.float64)
    if resamples < 100:
        raise ConfigError(f"resamples={resamples} is too few for a 95 % interval", "use 100 or more, e.g. 2000")
    if values.ndim != 1 or len(values) != len(users):
        raise DataError(f"{values.shape} values for {len(users)} user ids", "give one user id per value")
    if not np.isfinite(values).all():
        lacking = int((~np.isfinite(values)).sum())
        raise DataError(f"{lacking} of {len(values)} values are not finite", "drop rows without a value on both sides")
    ids, cluster = np.unique(users, return_inverse=True)
    n = len(ids)
    if n < 2:
        raise DataError(f"an interval over users needs at least 2 of them, found {n}", "test on more users")
    total = np.bincount(cluster, weights=values, minlength=n)
    count = np.bincount(cluster, minlength=n).astype(np.float64)
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWS_AT_ONCE // n)
    means = []
    for first in range(0, resamples, step):
        drawn = rng.integers(n, size=(min(step, resamples - first), n))
        means.append(total[drawn].sum(axis=1) / count[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Effect(float(values.mean()), float(low), float(high), n)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, users: np.ndarray, resamples: int = 2000, seed: int = 0) -> Effect:
    """Mean of a - b with its interval over users; row i of `a`, `b` and `users` is the same case."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise DataError(f"{len(a)} values against {len(b)}", "pair the rows first, see `compare`")
    return interval(a - b, users, resamples, seed)


def compare(a: pl.DataFrame, b: pl.DataFrame, metric: str, resamples: int = 2000, seed: int = 0) -> Effect:
    """Mean of `metric` in `a` minus in `b`, rows paired by (block, user) and by seed when there are seeds.

    `DataError` when a row lacks its partner, or a case occurs twice: a difference over other cases is another question.
    """
    keys = ["block", "user", *(["seed"] if "seed" in a.columns or "seed" in b.columns else [])]
    for side, frame in (("first", a), ("second", b)):
        lacking = [name for name in (*keys, metric) if name not in frame.columns]
        if lacking:
            raise DataError(f"the {side} rows lack the column {lacking[0]!r}", f"they have {', '.join(frame.columns)}")
        repeated = int(frame.select(keys).is_duplicated().sum())
        if repeated:
            raise DataError(f"{repeated} of the {side} rows share their {', '.join(keys)}", "keep one row per case")
    alone_a, alone_b = a.join(b, on=keys, how="anti").height, b.join(a, on=keys, how="anti").height
    if alone_a or alone_b:
        raise DataError(
            f"{alone_a} of {a.height} rows on the first side and {alone_b} of {b.height} on the second lack a partner "
            f"with the same {', '.join(keys)}",
            "evaluate both on the same blocks, users and seeds",
        )
    pairs = a.select(*keys, a=metric).join(b.select(*keys, b=metric), on=keys)
    pairs = pairs.with_columns(pl.col("a", "b").cast(pl.Float64).fill_null(float("nan"))).sort(keys)
    return paired_bootstrap(pairs["a"].to_numpy(), pairs["b"].to_numpy(), pairs["user"].to_numpy(), resamples, seed)


def bounds(effect: Effect | None) -> str | None:
    """The ends of an interval, e.g. `[0.0040, 0.0200]`; None for None."""
    return None if effect is None else f"[{effect.low:.4f}, {effect.high:.4f}]"


def describe(effect: Effect) -> str:
    """`no difference shown` when the interval covers zero, else e.g. `+0.0123 [0.0040, 0.0200]`; `-` for NaN."""
    if not np.isfinite(effect.mean):
        return "-"
    if effect.covers_zero:
        return NO_DIFFERENCE
    return f"{effect.mean:+.4f} {bounds(effect)}"
