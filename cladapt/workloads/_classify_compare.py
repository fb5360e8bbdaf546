"""What was measured of classifiers, the lines of several runs in one table, and the charts of one run or of many."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from cladapt.config import ClassEvalConfig
from cladapt.eval import classes
from cladapt.eval.classes import FORWARD, Outcomes, judged_by, known_further
from cladapt.eval.images import FURTHER, HEAD
from cladapt.eval.report import Curves, HeatMap, Section, Series
from cladapt.eval.significance import Effect
from cladapt.workloads._base import Comparison


@dataclass(frozen=True)
class ClassMeasures:
    """Rows of every model of a run on every test image, and what classified beside the head; see
    `cladapt.eval.images`."""

    name: str
    rows: pl.DataFrame
    prototypes: pl.DataFrame
    biases: pl.DataFrame
    base_block: int
    config: ClassEvalConfig


@dataclass(frozen=True)
class Accuracies(Comparison[ClassMeasures]):
    """One line per group, judged by one classifier; images and seeds are drawn together for every line."""

    classifier: str = HEAD

    @property
    def names(self) -> Sequence[str]:
        return [group.name for group in self.groups]

    def rows(self, name: str) -> dict[int, pl.DataFrame]:
        """Rows of a group by seed."""
        (group,) = (group for group in self.groups if group.name == name)
        return {seed: each.rows for seed, each in group.by_seed.items()}

    def _judged(self, name: str) -> dict[int, pl.DataFrame]:
        return {seed: judged_by(rows, self.classifier) for seed, rows in self.rows(name).items()}

    @property
    def further(self) -> "Mapping[str, tuple[str, Accuracies]]":
        """The same models judged by other classifiers than the head; each where all runs have it."""
        if self.classifier != HEAD:
            return {}
        known = [known_further(each.rows) for group in self.groups for each in group.by_seed.values()]
        return {
            name: (title, replace(self, classifier=name))
            for name, title in FURTHER.items()
            if all(name in names for names in known)
        }

    def summary(self) -> list[dict[str, Any]]:
        lines = [(name, self.rows(name)) for name in self.names]
        return [
            measure_line(name, classes.effects_of(rows, self.classifier, self.config.bootstrap), seeds=len(rows))
            for name, rows in lines
        ]

    def effects(self, name: str, reference: str) -> dict[str, Effect]:
        found = classes.differences(self._judged(name), self._judged(reference), self.config.bootstrap)
        if self.classifier != HEAD:
            found.pop(FORWARD)
        return {measure: effect for measure, effect in found.items() if math.isfinite(effect.mean)}

    def charts(self) -> list[Section]:
        """The accuracy among all classes known so far, after every block, by every classifier; seeds averaged."""
        charts: list[Section] = [self._curves("Accuracy on the classes of all blocks so far")]
        return charts + [part._curves(f"Accuracy so far. {title}") for title, part in self.further.values()]

    def _curves(self, title: str) -> Curves:
        series = []
        for name in self.names:
            found = [Outcomes.of(rows) for rows in self._judged(name).values()]
            after = [i for i, model in enumerate(found[0].models) if model in found[0].blocks]
            means = np.mean([[np.nanmean(each.matrices()[0][i]) for i in after] for each in found], axis=0)
            series.append(Series(name, [float(mean) for mean in means]))
        return Curves(title, [found[0].models[i] for i in after], series, y_name="accuracy")


def measure_line(name: str, found: Mapping[str, Effect], **more: Any) -> dict[str, Any]:
    """A line of the table: each measure with its interval, null where it has no term."""
    line: dict[str, Any] = {"model": name, **more}
    for measure, effect in found.items():
        known = math.isfinite(effect.mean)
        line[measure] = effect.mean if known else None
        line[f"{measure} 95 %"] = f"[{effect.low:.4f}, {effect.high:.4f}]" if known else None
    return line


def classifier_lines(measures: ClassMeasures) -> list[dict[str, Any]]:
    """A line for the head and one for each further classifier of the same models; FWT is the probe's, and left out."""
    lines = []
    for classifier in (HEAD, *known_further(measures.rows)):
        found = classes.effects_of({0: measures.rows}, classifier, measures.config.bootstrap)
        found.pop(FORWARD, None)
        lines.append(measure_line(measures.name, found, classifier="head" if classifier == HEAD else classifier))
    return lines


def matrix_lines(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """R by the head and by each further classifier, and P: a line per model and block, null where nothing is told."""
    outcomes = Outcomes.of(rows)
    accuracy, probe = outcomes.matrices()
    found = {"accuracy": accuracy}
    found |= {name: Outcomes.of(judged_by(rows, name)).matrices()[0] for name in known_further(rows)}
    found["probe"] = probe
    return [
        {
            "model_block": model,
            "block": block,
            "images": len(outcomes.images[j]),
            **{name: finite(float(values[i, j])) for name, values in found.items()},
        }
        for i, model in enumerate(outcomes.models)
        for j, block in enumerate(outcomes.blocks)
    ]


def matrix_of(figures: Mapping[str, Any], name: str, title: str = "", note: str = "") -> HeatMap:
    """One figure of `matrix` with a row per model and a column per block."""
    models, blocks = (list(dict.fromkeys(cell[key] for cell in figures["matrix"])) for key in ("model_block", "block"))
    found = {(cell["model_block"], cell["block"]): cell[name] for cell in figures["matrix"]}
    return HeatMap(title, models, blocks, [[found[m, b] for b in blocks] for m in models], "model / block", note)


def finite(value: float) -> float | None:
    """The value; None in place of NaN."""
    return value if math.isfinite(value) else None
