"""Runs against runs: those that differ in the seed alone are pooled, and the groups are compared user by user."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import polars as pl
from pydantic import BaseModel, NonNegativeInt, StringConstraints

from cladapt.artifacts import atomic_dir, hash_value, read_parquet, read_record
from cladapt.config import EvalConfig, MethodConfig, describe, resolve
from cladapt.errors import ConfigError, DataError
from cladapt.eval import significance
from cladapt.eval.metrics import ROWS
from cladapt.eval.protocol import (
    COUNTS,
    FROZEN,
    Measures,
    backward_effects,
    backward_rows,
    ceiling_row,
    effects,
    metric_columns,
    model_row,
    pool,
)
from cladapt.eval.report import KeyValues, Section, render_report
from cladapt.export.place import refuse_existing
from cladapt.methods import Compose, build
from cladapt.model.load import PROVENANCE, base_provenance
from cladapt.pipeline.report import INTERVALS, block_curves, rows_table
from cladapt.run import Run

SAME_QUESTION = ("top_k", "beams", "exclude_seen", "targets", "max_users", "next_block")
"""Evaluation settings that must agree; the others change the effort, not the figures."""
NEXT_TABLES = {
    "next_block_summary": "The next block: each model on the first events of the block after its own, seeds pooled",
    "next_block_differences": "Paired differences on the next block",
}
R = TypeVar("R")
Lines = Mapping[str, Mapping[int, pl.DataFrame]]


class CellRecord(BaseModel):
    """A row of R[t][s]: the block that the model was tested on."""

    block: int


class MetricsRecord(BaseModel):
    """What metrics.json must hold; evaluations of older versions do not name their stream."""

    base_block: NonNegativeInt
    config: dict[str, Any]
    ceiling: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], dict[str, float]]
    matrix: list[CellRecord]
    stream: str | None = None


@dataclass(frozen=True)
class Evaluated:
    """A run with what its evaluation wrote; `stream` is None where the evaluation did not record it."""

    run: Run
    measures: Measures
    stream: str | None

    @classmethod
    def read(cls, run: Run) -> "Evaluated":
        """Read per-user rows and metrics.json; `DataError` when the run was not evaluated."""
        metrics_file, users = run.path / "metrics.json", run.path / "users"
        tested = sorted(users.glob("block_*.parquet"))
        if not metrics_file.is_file() or not tested:
            raise DataError(f"{run.path} is not evaluated yet", f"cladapt eval {run.path}")
        again = f"cladapt eval {run.path}"
        metrics = read_record(metrics_file, MetricsRecord, again)
        written = {f"block_{cell['block']:03d}.parquet" for cell in metrics["matrix"]}
        if apart := sorted(written ^ {path.name for path in tested}):
            raise DataError(
                f"{users} and {metrics_file} are of two evaluations: {', '.join(apart)} in one alone", again
            )
        try:
            config = resolve(EvalConfig, metrics["config"], f"{metrics_file}: config")
        except ConfigError as error:  # no mistake of a user: `cladapt eval` wrote this file
            raise DataError(error.message, again) from error
        name, base_block = run.config.method.name, metrics["base_block"]
        first, after = users / "next_block.parquet", None
        if first.is_file():
            rows = read_parquet(first, ROWS)
            after = Measures(name, rows, _counts(users, "next_counts"), base_block, config, lag=1)
        measures = Measures(
            name,
            pl.concat([read_parquet(path, ROWS) for path in tested]),
            _counts(users, "counts"),
            base_block,
            config,
            {int(block): values for block, values in metrics["ceiling"].items()},
            next=after,
        )
        if measures.own.is_empty():
            raise DataError(
                f"{run.path} is evaluated on the blocks {measures.rows['block'].unique().sort().to_list()} alone, "
                f"its base has seen block {measures.base_block}",
                f"cladapt eval {run.path}",
            )
        return cls(run, measures, metrics.get("stream"))


@dataclass(frozen=True)
class Group:
    """Evaluated runs by seed, equal in all else; `base` identifies what their frozen rows belong to."""

    name: str
    base: str
    by_seed: Mapping[int, Evaluated]

    @property
    def own(self) -> dict[int, pl.DataFrame]:
        return {seed: each.measures.own for seed, each in self.by_seed.items()}

    @property
    def trained(self) -> bool:
        return any(each.measures.current.height for each in self.by_seed.values())


@dataclass(frozen=True)
class Comparison:
    """Groups of runs and all lines that stand beside them, seeds pooled."""

    groups: Sequence[Group]

    @cached_property
    def lines(self) -> Lines:
        """Rows by name and seed: the groups, their frozen bases, the counts-only models."""
        lines: dict[str, dict[int, pl.DataFrame]] = {group.name: group.own for group in self.groups}
        frozen = {group.base: group.name for group in self.groups if not group.trained}
        counts: dict[str, dict[int, pl.DataFrame]] = {}
        for group in self.groups:
            first = FROZEN not in {*frozen.values(), *lines}
            name = frozen.setdefault(group.base, FROZEN if first else f"{FROZEN} ({group.name})")
            for seed, each in group.by_seed.items():
                lines.setdefault(name, {}).setdefault(seed, each.measures.frozen)
                for model, rows in each.measures.beside.items():
                    counts.setdefault(model, {}).setdefault(seed, rows)
        return {**lines, **counts}

    @cached_property
    def backward(self) -> Lines:
        """Per-user backward transfer of the groups for which it was measured."""
        main = self._main
        found = {g.name: {s: backward_rows(e.measures, main) for s, e in g.by_seed.items()} for g in self.groups}
        return {
            name: {seed: rows for seed, rows in by_seed.items() if rows is not None}
            for name, by_seed in found.items()
            if all(rows is not None for rows in by_seed.values())
        }

    @property
    def next(self) -> "Comparison | None":
        """The same groups on the first events of the block after each model's own; None unless all have it."""
        groups = []
        for group in self.groups:
            after = {
                seed: replace(each, measures=each.measures.next)
                for seed, each in group.by_seed.items()
                if each.measures.next is not None and not each.measures.next.own.is_empty()
            }
            if after.keys() != group.by_seed.keys():
                return None
            groups.append(replace(group, by_seed=after))
        return Comparison(groups)

    @property
    def _main(self) -> tuple[str, str]:
        return f"HR@{max(self.config.top_k)}", "log_likelihood"

    @property
    def config(self) -> EvalConfig:
        return next(iter(self.groups[0].by_seed.values())).measures.config

    @property
    def ceiling(self) -> Mapping[int, Mapping[str, float]]:
        known = (each.measures.ceiling for group in self.groups for each in group.by_seed.values())
        return next((found for found in known if found), {})

    def summary(self) -> list[dict[str, Any]]:
        """One row per line, seeds pooled, and the ceiling where it is known; counting has no seed."""
        rows = [
            model_row(name, pool(by_seed), self.config) | ({} if name in COUNTS else {"seeds": len(by_seed)})
            for name, by_seed in self.lines.items()
        ]
        return [*rows, ceiling_row(self.ceiling, self.config)] if self.ceiling else rows

    def differences(self, reference: str, names: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Each other line (or `names`) of the same seeds minus the reference: one row per metric that both have."""
        rows: list[dict[str, Any]] = []
        others = self.lines[reference]
        for name in self.lines if names is None else names:
            if name == reference or self.lines[name].keys() != others.keys():
                continue
            found = effects(pool(self.lines[name]), pool(others), self.config, metric_columns(self.config))
            if name in self.backward and reference in self.backward:
                one, two = pool(self.backward[name]), pool(self.backward[reference])
                transfers = backward_effects(one, two, self.config, self._main)
                found |= {f"backward {metric}": effect for metric, effect in transfers.items()}
            rows += [
                {
                    "difference": f"{name} - {reference}",
                    "metric": metric,
                    "effect": effect.mean,
                    "low": effect.low,
                    "high": effect.high,
                    "shown": significance.describe(effect),
                }
                for metric, effect in found.items()
                if effect is not None
            ]
        return rows


def compare_runs(paths: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Compare evaluated runs; with `out` also as summary.csv, differences.csv and report.html there."""
    if out is not None:
        refuse_existing(out)
    groups = group_runs([Evaluated.read(run) for run in open_each(paths, Run.open)])
    comparison = Comparison(groups)
    result: dict[str, Any] = {
        "stream": next(iter(groups[0].by_seed.values())).stream,
        "groups": [
            {
                "name": group.name,
                "seeds": sorted(group.by_seed),
                "runs": [str(each.run.path) for _, each in sorted(group.by_seed.items())],
            }
            for group in groups
        ],
        "summary": comparison.summary(),
        "differences": comparison.differences(groups[0].name),
    }
    if following := comparison.next:
        result["next_block_summary"] = following.summary()
        result["next_block_differences"] = following.differences(groups[0].name)
    if out is not None:
        write_comparison(out, comparison, result)
        result = {"out": str(out), **result}
    return result


def group_runs(evaluated: Sequence[Evaluated]) -> list[Group]:
    """Runs of equal configuration, seed apart, as groups in the order given, named by method and what differs.

    `DataError` or `ConfigError` when two of them do not answer the same question.
    """
    _check_comparable(evaluated)
    settings: dict[str, tuple[dict[str, Any], dict[int, Evaluated]]] = {}
    for each in evaluated:
        own = _settings(each.run)
        _, by_seed = settings.setdefault(hash_value(own), (own, {}))
        seed = each.run.config.seed
        if seed in by_seed:
            raise ConfigError(
                f"{by_seed[seed].run.path} and {each.run.path} have the same configuration and seed={seed}",
                "give one run per seed",
            )
        by_seed[seed] = each
    names = _names([(next(iter(by_seed.values())).run, own) for own, by_seed in settings.values()])
    groups = [
        Group(name, hash_value([own["base"], own["from_adapter"]]), by_seed)
        for name, (own, by_seed) in zip(names, settings.values(), strict=True)
    ]
    if any(group.by_seed.keys() != groups[0].by_seed.keys() for group in groups):
        listed = "; ".join(f"{g.name}: {', '.join(map(str, sorted(g.by_seed)))}" for g in groups)
        raise ConfigError(
            f"the groups have different seeds ({listed})", "run the missing seeds, or leave out those that stand alone"
        )
    _check_bases(groups)
    return groups


def write_comparison(out: Path, comparison: Comparison, result: Mapping[str, Any]) -> None:
    """The tables as csv and one HTML page with the curves of every line."""
    main = max(comparison.config.top_k)
    pooled = {name: pool(by_seed) for name, by_seed in comparison.lines.items()}
    sections: list[Section] = [
        rows_table("Mean over the later blocks, seeds pooled", result["summary"], INTERVALS),
        rows_table("Paired differences over users", result["differences"], INTERVALS),
        *block_curves(pooled, comparison.config, comparison.ceiling, [f"HR@{main}", f"NDCG@{main}", "log_likelihood"]),
        *(rows_table(title, result[name], INTERVALS) for name, title in NEXT_TABLES.items() if name in result),
        KeyValues("Runs", {group["name"]: ", ".join(group["runs"]) for group in result["groups"]}),
        KeyValues("Provenance", {"stream": result["stream"], "evaluation": comparison.config.model_dump(mode="json")}),
    ]
    title = "cladapt: " + " against ".join(group.name for group in comparison.groups)
    with atomic_dir(out) as folder:
        for name in ("summary", "differences", *(name for name in NEXT_TABLES if name in result)):
            table = pl.DataFrame(result[name], infer_schema_length=None).write_csv(float_precision=6)
            (folder / f"{name}.csv").write_text(table, encoding="utf-8")
        (folder / "report.html").write_text(render_report(title, sections), encoding="utf-8")


def open_each(paths: Iterable[Path], open_one: Callable[[Path], R]) -> list[R]:
    """What every path holds; `ConfigError` where two of them are one place."""
    found: dict[str, R] = {}
    for path in paths:
        place = os.path.realpath(path)
        if place in found:
            raise ConfigError(f"{path} is given twice", "name each run once")
        found[place] = open_one(path)
    return list(found.values())


def method_options(config: MethodConfig) -> dict[str, Any]:
    """Every option of a configured method with its value, defaults too, as `<method>.<field>`."""
    method = build(config)
    parts = method.methods if isinstance(method, Compose) else ((config.name, method),)
    return {f"{name}.{k}": v for name, part in parts for k, v in part.config.model_dump(mode="json").items()}


def _counts(users: Path, prefix: str) -> dict[str, pl.DataFrame]:
    """Rows of the counts-only models that an evaluation wrote."""
    found = {name: users / f"{prefix}_{name.replace(' ', '_')}.parquet" for name in COUNTS}
    return {name: read_parquet(path, ROWS) for name, path in found.items() if path.is_file()}


def _check_comparable(evaluated: Sequence[Evaluated]) -> None:
    first, *others = evaluated
    for each in evaluated:
        if each.stream is None:
            raise DataError(
                f"the evaluation of {each.run.path} does not say which stream it is of", f"cladapt eval {each.run.path}"
            )
    for other in others:
        if other.stream != first.stream:
            raise DataError(
                f"{first.run.path} was evaluated on the stream {first.stream}, {other.run.path} on {other.stream}",
                "compare runs on one stream",
            )
        one, two = (_question(each.measures) for each in (first, other))
        if apart := [key for key in one if one[key] != two[key]]:
            raise ConfigError(
                f"{first.run.path} and {other.run.path} were evaluated differently: "
                + "; ".join(f"{key} {one[key]} against {two[key]}" for key in apart),
                "evaluate them alike: cladapt eval RUN -o KEY=VALUE",
            )


def _question(measures: Measures) -> dict[str, Any]:
    settings = {key: getattr(measures.config, key) for key in SAME_QUESTION}
    return {**settings, "blocks": measures.own["block"].unique().sort().to_list()}


def _check_bases(groups: Sequence[Group]) -> None:
    """Runs are paired by seed, so bases made alike must be the same base wherever the seed is the same."""
    known: dict[tuple[str, int], tuple[Path, str]] = {}
    for group in groups:
        for seed, each in group.by_seed.items():
            own = each.run.path, str(_made(each.run).get("fingerprint"))
            path, fingerprint = known.setdefault((group.base, seed), own)
            if fingerprint != own[1]:
                raise ConfigError(
                    f"{path} and {own[0]} have seed={seed} but stand on bases that differ in their own seed "
                    f"({fingerprint} against {own[1]})",
                    "give all methods of one seed the same base",
                )


def _settings(run: Run) -> dict[str, Any]:
    """All that shapes a run but its seed and its stream, by dotted key; the method's options with their defaults."""
    apart = ("seed", "data", "base", "from_adapter", "method.options")
    found = {r["key"]: r["value"] for r in describe(run.config) if r["key"] not in apart}
    found = {key: value for key, value in found.items() if not key.startswith("eval.")}
    made = _made(run)
    recipe = {key: value for key, value in made.items() if key not in ("fingerprint", "cladapt", "config")}
    # each seed may have a base of its own: the base's seed is left out like the run's
    config = {key: value for key, value in made.get("config", {}).items() if key != "seed"}
    start = run.inputs.get("from_adapter", run.config.from_adapter)
    return {
        **found,
        "base": hash_value([recipe, config]),
        "from_adapter": start,
        "options": method_options(run.config.method),
    }


def _made(run: Run) -> dict[str, Any]:
    """How the base was made; where it is gone, what the run remembers of it."""
    record = Path(run.config.base) / PROVENANCE
    return base_provenance(record.parent) if record.is_file() else {"base": run.inputs.get("base", run.config.base)}


def _names(groups: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[str]:
    """The method of each group, its options where they vary, and every other setting that is not the same in all."""
    every = [settings for _, settings in groups]
    shared = [k for k in every[0] if k not in ("options", "method.name") and len({str(s[k]) for s in every}) > 1]
    names = []
    for run, own in groups:
        method = own["method.name"]
        alike = [settings["options"] for settings in every if settings["method.name"] == method]
        told = {key: value for key, value in own["options"].items() if any(o[key] != value for o in alike)}
        if "+" not in method:
            told = {key.removeprefix(f"{method}."): value for key, value in told.items()}
        told |= {key: own[key] for key in shared}
        for key in {"base", "from_adapter"} & told.keys():  # names for people, hashes to tell equal names apart
            folder = Path(getattr(run.config, key)).name
            told[key] = f"{folder} ({hash_value(own[key])[:6]})" if folder else "none"
        names.append(" ".join([method, *(f"{key}={_text(value)}" for key, value in told.items())]))
    return names


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
