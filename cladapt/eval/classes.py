"""Measures of class-incremental learning and their intervals, from one row for each model and test image.

    R[i][j]      accuracy of the model after block i on block j <= i, among all classes of the blocks up to i
    P[i][j]      accuracy of a nearest-class-mean probe on its features, among the classes of block j alone
    ACC          mean_j R[T][j]                        MAA        mean_i mean_{j<=i} R[i][j]
    learning     mean_j R[j][j]                        BWT        mean_{j<T} (R[T][j] - R[j][j])
    forgetting   mean_{j<T} (max_{j<=i<T} R[i][j] - R[T][j])
    FWT          mean_{i>first, j>i} (P[i][j] - P[first][j]): a head knows no class to come, features may

R is the head's, or that of another classifier of the same models whose rows take the place of the head's (`judged_by`).
i and j run over the blocks that were learned as blocks; the first row is the base's. An interval resamples the images
of each block, the same ones for every model and for every seed that was tested on them, and the seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from cladapt.errors import DataError
from cladapt.eval.images import FURTHER, HEAD
from cladapt.eval.significance import LEVEL, Effect

FORWARD = "FWT"
OF_CLASSIFIERS = ("ACC", "MAA", "learning", "BWT", "forgetting")
MEASURES = (*OF_CLASSIFIERS, FORWARD)
OVER_HEAD = "ACC - head"


def judged_by(rows: pl.DataFrame, classifier: str) -> pl.DataFrame:
    """Rows of `cladapt.eval.images.ROWS` with one of `FURTHER` in the place of the head; P and FWT stay the probe's."""
    return rows.with_columns(pl.col(classifier).alias(HEAD))


def known_further(rows: pl.DataFrame) -> list[str]:
    """Those of `FURTHER` that told the class wherever the head did."""
    told = rows.filter(pl.col(HEAD).is_not_null())
    return [name for name in FURTHER if not told[name].null_count()]


@dataclass(frozen=True)
class Outcomes:
    """What every model made of every image: float64 [models, images] for each block, NaN where nothing is told."""

    models: tuple[int, ...]
    blocks: tuple[int, ...]
    correct: tuple[np.ndarray, ...]
    probe: tuple[np.ndarray, ...]
    images: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, rows: pl.DataFrame) -> "Outcomes":
        """From rows of `cladapt.eval.images.ROWS`; `DataError` where a model lacks an image that another has."""
        models, blocks = (tuple(sorted(rows[name].unique().to_list())) for name in ("model", "block"))
        correct, probe, images = [], [], []
        for block in blocks:
            own = rows.filter(pl.col("block") == block).sort("model", "image")
            counts = own.group_by("model", maintain_order=True).len()["len"].unique().to_list()
            names = own["image"].unique().sort().to_numpy()
            twice = own.select("model", "image").is_duplicated().any()
            if twice or counts != [len(names)] or own["model"].n_unique() != len(models):
                raise DataError(f"block {block}: not every model was tested on every image once", "evaluate again")
            shape = (len(models), len(names))
            correct.append(own[HEAD].cast(pl.Float64).fill_null(np.nan).to_numpy().reshape(shape))
            probe.append(own["probe"].cast(pl.Float64).to_numpy().reshape(shape))
            images.append(names)
        return cls(models, blocks, tuple(correct), tuple(probe), tuple(images))

    def matrices(self, drawn: Sequence[np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """R and P as [..., models, blocks]; `drawn`: weights [draws, images] of each block's images, rows sum to 1."""
        parts = []
        for outcomes in (self.correct, self.probe):
            if drawn is None:
                parts.append(np.stack([o.mean(axis=1) for o in outcomes], axis=-1))
            else:
                parts.append(np.stack([w @ o.T for w, o in zip(drawn, outcomes, strict=True)], axis=-1))
        return parts[0], parts[1]


def measures(r: np.ndarray, p: np.ndarray, models: Sequence[int], blocks: Sequence[int]) -> dict[str, np.ndarray]:
    """`MEASURES` from R and P [..., models, blocks]; NaN where a measure has no term."""
    row = {model: i for i, model in enumerate(models)}
    column = {block: j for j, block in enumerate(blocks)}
    known = [block for block in blocks if block in row]  # blocks after which there is a model
    last = models[-1]
    empty = np.full(r.shape[:-2], np.nan)

    def cell(i: int, j: int) -> np.ndarray:
        return np.asarray(r[..., row[i], column[j]])

    def mean(terms: Sequence[np.ndarray]) -> np.ndarray:
        return np.mean(terms, axis=0) if len(terms) else empty

    earlier = [j for j in known if j < last]
    best = [np.max([cell(i, j) for i in models if j <= i < last], axis=0) for j in earlier]
    first = row[models[0]]
    ahead = [p[..., row[i], column[j]] - p[..., first, column[j]] for i in models[1:] for j in blocks if j > i]
    return {
        "ACC": mean([cell(last, j) for j in known]),
        "MAA": mean([mean([cell(i, j) for j in known if j <= i]) for i in models if i in column]),
        "learning": mean([cell(j, j) for j in known]),
        "BWT": mean([cell(last, j) - cell(j, j) for j in earlier]),
        "forgetting": mean([high - cell(last, j) for high, j in zip(best, earlier, strict=True)]),
        FORWARD: mean(ahead),
    }


def effects(by_seed: Mapping[int, pl.DataFrame], resamples: int = 2000, seed: int = 0) -> dict[str, Effect]:
    """Each measure, as the mean over seeds, with its 95 % interval over images and seeds; n is the images'."""
    return _effects([[Outcomes.of(rows)] for _, rows in sorted(by_seed.items())], resamples, seed)


def effects_of(
    by_seed: Mapping[int, pl.DataFrame], classifier: str, resamples: int = 2000, seed: int = 0
) -> dict[str, Effect]:
    """`effects` by the head, or by one of `FURTHER` without FWT, which is the probe's, and with its ACC less the
    head's, paired."""
    if classifier == HEAD:
        return effects(by_seed, resamples, seed)
    judged = {s: judged_by(rows, classifier) for s, rows in by_seed.items()}
    found = effects(judged, resamples, seed)
    gain = differences(judged, by_seed, resamples, seed)["ACC"]
    return {**{name: found[name] for name in OF_CLASSIFIERS}, OVER_HEAD: gain}


def differences(
    one: Mapping[int, pl.DataFrame], other: Mapping[int, pl.DataFrame], resamples: int = 2000, seed: int = 0
) -> dict[str, Effect]:
    """Each measure of `one` minus that of `other`, paired by seed and image."""
    if one.keys() != other.keys():
        raise DataError(f"seeds {sorted(one)} against {sorted(other)}", "compare runs of the same seeds")
    pairs = [[Outcomes.of(one[s]), Outcomes.of(other[s])] for s in sorted(one)]
    for s, (a, b) in zip(sorted(one), pairs, strict=True):
        if a.models != b.models:
            raise DataError(
                f"seed {s}: models after the blocks {list(a.models)} against {list(b.models)}",
                "compare runs that adapted to the same blocks",
            )
        if a.blocks != b.blocks or any(not np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True)):
            raise DataError(f"seed {s}: the two were tested on different images", "compare runs on the same stream")
    return _effects(pairs, resamples, seed)


def _effects(sides: Sequence[Sequence[Outcomes]], resamples: int, seed: int) -> dict[str, Effect]:
    """Mean over seeds of the first side's measures (minus the second's) and percentile intervals."""
    rng = np.random.default_rng(seed)
    point: list[dict[str, np.ndarray]] = []
    spread: list[dict[str, np.ndarray]] = []
    shared: dict[tuple[int, bytes], np.ndarray] = {}  # seeds tested on the same images are not independent
    for of_seed in sides:
        keys = [(b, i.tobytes()) for b, i in zip(of_seed[0].blocks, of_seed[0].images, strict=True)]
        for key, own in zip(keys, of_seed[0].images, strict=True):
            if key not in shared:
                shared[key] = _weights(rng, resamples, len(own))
        drawn = [shared[key] for key in keys]
        point.append(_difference([measures(*o.matrices(), o.models, o.blocks) for o in of_seed]))
        spread.append(_difference([measures(*o.matrices(drawn), o.models, o.blocks) for o in of_seed]))
    which = rng.integers(len(sides), size=(resamples, len(sides)))
    images = sum(len(i) for i in sides[0][0].images)
    found = {}
    for name in MEASURES:
        mean = float(np.mean([p[name] for p in point]))
        stacked = np.stack([s[name] for s in spread])  # [seeds, resamples]
        means = stacked[which, np.arange(resamples)[:, None]].mean(axis=1)
        finite = np.isfinite(mean)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if finite else (np.nan, np.nan)
        found[name] = Effect(mean, float(low), float(high), images)
    return found


def _difference(sides: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    first, *rest = sides
    return {name: value - rest[0][name] if rest else value for name, value in first.items()}


def _weights(rng: np.random.Generator, resamples: int, images: int) -> np.ndarray:
    """How often each image is drawn in each resample, as shares [resamples, images]."""
    return rng.multinomial(images, np.full(images, 1.0 / images), size=resamples) / images
