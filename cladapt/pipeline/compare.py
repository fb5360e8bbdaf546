"""Runs against runs: those that differ in the seed alone are pooled, and the groups are compared case by case."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl

from cladapt.artifacts import atomic_dir, hash_value
from cladapt.config import MethodConfig, describe
from cladapt.errors import ConfigError, DataError
from cladapt.eval.report import KeyValues, Section, render_report, rows_table
from cladapt.export.place import refuse_existing
from cladapt.methods import Compose, build
from cladapt.model.load import PROVENANCE
from cladapt.pipeline.evaluation import Evaluated
from cladapt.pipeline.report import INTERFERENCE_NOTE, INTERFERENCE_TITLE, REPORT, interference_log
from cladapt.run import Run, open_run
from cladapt.train.interference import FIGURES, INTERFERENCE
from cladapt.workloads._base import Comparison, Group, Workload, effect_lines

TAILS = "tails"


@dataclass(frozen=True)
class Pooled:
    """Evaluated runs by seed, equal in all else; `base` identifies how their bases were made."""

    name: str
    base: str
    by_seed: Mapping[int, Evaluated]

    @property
    def measures(self) -> Group[Any]:
        """What was measured of them."""
        return Group(self.name, self.base, {seed: each.measures for seed, each in self.by_seed.items()})


def compare_runs(paths: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Compare evaluated runs of one task; with `out` also as summary.csv, differences.csv and report.html there."""
    if out is not None:
        refuse_existing(out)
    pooled = group_runs([Evaluated.read(run) for run in _open_each(paths)])
    comparison = comparison_of(pooled)
    streams = list(dict.fromkeys(each.stream for group in pooled for each in group.by_seed.values()))
    result: dict[str, Any] = {
        "stream": streams[0] if len(streams) == 1 else streams,
        "groups": [
            {
                "name": group.name,
                "seeds": sorted(group.by_seed),
                "runs": [str(each.run.path) for _, each in sorted(group.by_seed.items())],
            }
            for group in pooled
        ],
        **tables(comparison, pooled[0].name),
    }
    if changes := interference_table(pooled):
        result[INTERFERENCE] = changes
    if out is not None:
        write_comparison(out, comparison, result, _workload(pooled).note)
        result = {"out": str(out), **result}
    return result


def comparison_of(pooled: Sequence[Pooled]) -> Comparison[Any]:
    """The lines of groups of one task."""
    return _workload(pooled).compare([group.measures for group in pooled])


def _workload(pooled: Sequence[Pooled]) -> Workload[Any, Any, Any, Any]:
    return next(iter(pooled[0].by_seed.values())).run.workload


def group_runs(evaluated: Sequence[Evaluated]) -> list[Pooled]:
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
    pooled = [
        Pooled(name, hash_value([own["base"], own["from_adapter"]]), by_seed)
        for name, (own, by_seed) in zip(names, settings.values(), strict=True)
    ]
    if any(group.by_seed.keys() != pooled[0].by_seed.keys() for group in pooled):
        listed = "; ".join(f"{g.name}: {', '.join(map(str, sorted(g.by_seed)))}" for g in pooled)
        raise ConfigError(
            f"the groups have different seeds ({listed})", "run the missing seeds, or leave out those that stand alone"
        )
    _check_bases(pooled)
    return pooled


def tables(comparison: Comparison[Any], reference: str) -> dict[str, list[dict[str, Any]]]:
    """Summary and differences of the groups, and of what else they are judged by under prefixed names."""
    found = {"summary": comparison.summary(), "differences": comparison.differences(reference)}
    if tails := comparison.tails():
        found |= {TAILS: tails, f"{TAILS}_differences": tail_differences(comparison, reference)}
    for name, (_, more) in comparison.further.items():
        found |= {f"{name}_{table}": rows for table, rows in tables(more, reference).items()}
    return found


def interference_table(pooled: Sequence[Pooled]) -> list[dict[str, Any]]:
    """A row per group that has adapted to more than one block: means over blocks and seeds of what each has changed
    for the inputs of those before it; see `cladapt.train.interference`."""
    lines = []
    for group in pooled:
        known = [log for each in group.by_seed.values() if (log := interference_log(each.run))]
        means = {figure: [fmean(row[figure] for row in log) for log in known] for figure in FIGURES}
        if known:
            lines.append({"model": group.name, "seeds": len(known), **{name: fmean(v) for name, v in means.items()}})
    return lines


def tail_differences(comparison: Comparison[Any], reference: str) -> list[dict[str, Any]]:
    """Each other line minus the reference by head and tail: a row per group."""
    pairs = [(name, reference) for name in comparison.names if name != reference]
    return [line for pair in pairs for line in effect_lines(pair, "group", comparison.effects_by_tail(*pair))]


def write_comparison(out: Path, comparison: Comparison[Any], result: Mapping[str, Any], note: str) -> None:
    """The tables as csv and one HTML page with the curves of every line."""
    titles = {"": "Seeds pooled", **{f"{name}_": title for name, (title, _) in comparison.further.items()}}
    summaries = [rows_table(title, result[f"{prefix}summary"], note) for prefix, title in titles.items()]
    differences = [
        rows_table(f"{title}: paired differences", result[f"{prefix}differences"], note)
        for prefix, title in titles.items()
    ]
    tails = [name for name in (TAILS, f"{TAILS}_differences") if result.get(name)]
    changes = [INTERFERENCE] if INTERFERENCE in result else []
    tail_titles = ("Head and tail of the items", "Head and tail of the items: paired differences")
    sections: list[Section] = [
        *(table for pair in zip(summaries, differences, strict=True) for table in pair),
        *(rows_table(t, result[n], comparison.tails_note) for t, n in zip(tail_titles, tails, strict=False)),
        *(rows_table(INTERFERENCE_TITLE, result[name], INTERFERENCE_NOTE) for name in changes),
        *comparison.charts(),
        KeyValues("Runs", {group["name"]: ", ".join(group["runs"]) for group in result["groups"]}),
        KeyValues("Provenance", {"stream": result["stream"], "evaluation": comparison.config.model_dump(mode="json")}),
    ]
    title = "cladapt: " + " against ".join(group.name for group in comparison.groups)
    with atomic_dir(out) as folder:
        for name in (
            *(f"{prefix}{table}" for prefix in titles for table in ("summary", "differences")),
            *tails,
            *changes,
        ):
            table = pl.DataFrame(result[name], infer_schema_length=None).write_csv(float_precision=6)
            (folder / f"{name}.csv").write_text(table, encoding="utf-8")
        (folder / REPORT).write_text(render_report(title, sections), encoding="utf-8")


def _open_each(paths: Sequence[Path]) -> list[Run[Any]]:
    """The run of every path; `ConfigError` where two of them are one place, or of two tasks."""
    found: dict[str, Run[Any]] = {}
    for path in paths:
        place = os.path.realpath(path)
        if place in found:
            raise ConfigError(f"{path} is given twice", "name each run once")
        found[place] = open_run(path)
    first, *others = found.values()
    for other in others:
        if other.task != first.task:
            raise ConfigError(
                f"{first.path} is a run of --task {first.task}, {other.path} of --task {other.task}",
                "compare runs of one task",
            )
    return list(found.values())


def method_options(config: MethodConfig) -> dict[str, Any]:
    """Every option of a configured method with its value, defaults too, as `<method>.<field>`."""
    method = build(config)
    parts = method.methods if isinstance(method, Compose) else ((config.name, method),)
    return {f"{name}.{k}": v for name, part in parts for k, v in part.config.model_dump(mode="json").items()}


def _check_comparable(evaluated: Sequence[Evaluated]) -> None:
    """All runs answer one question on one stream, or on one per seed where the workload draws it by seed."""
    work = evaluated[0].run.workload
    by_seed: dict[int, Evaluated] = {}
    for each in evaluated:
        if each.stream is None:
            raise DataError(
                f"the evaluation of {each.run.path} does not say which stream it is of", f"cladapt eval {each.run.path}"
            )
    for each in evaluated:
        first = by_seed.setdefault(0 if work.one_stream else each.run.config.seed, each)
        if each.stream != first.stream:
            raise DataError(
                f"{first.run.path} was evaluated on the stream {first.stream}, {each.run.path} on {each.stream}",
                f"compare runs on one stream{'' if work.one_stream else ' per seed'}",
            )
        one, two = (_question(e) for e in (evaluated[0], each))
        if apart := [key for key in one if one[key] != two[key]]:
            raise ConfigError(
                f"{evaluated[0].run.path} and {each.run.path} were evaluated differently: "
                + "; ".join(f"{key} {one[key]} against {two[key]}" for key in apart),
                "evaluate them alike, on the same blocks and by the same settings: cladapt eval RUN -o KEY=VALUE",
            )


def _question(evaluated: Evaluated) -> dict[str, Any]:
    work, measures = evaluated.run.workload, evaluated.measures
    return {**{key: getattr(measures.config, key) for key in work.same_question}, **work.question(measures)}


def _check_bases(pooled: Sequence[Pooled]) -> None:
    """Runs are paired by seed, so bases made alike must be the same base wherever the seed is the same."""
    known: dict[tuple[str, int], tuple[Path, str]] = {}
    for group in pooled:
        for seed, each in group.by_seed.items():
            own = each.run.path, _made(each.run)[0]
            path, fingerprint = known.setdefault((group.base, seed), own)
            if fingerprint != own[1]:
                raise ConfigError(
                    f"{path} and {own[0]} have seed={seed} but stand on bases that differ in their own seed "
                    f"({fingerprint} against {own[1]})",
                    "give all methods of one seed the same base",
                )


def _settings(run: Run[Any]) -> dict[str, Any]:
    """All that shapes a run but its seed and its stream, by dotted key; the method's options with their defaults."""
    apart = ("seed", "data", "base", "from_adapter", "method.options", "track")
    found = {r["key"]: r["value"] for r in describe(run.config) if r["key"] not in apart}
    found = {key: value for key, value in found.items() if not key.startswith("eval.")}
    _, recipe = _made(run)
    # each seed may have a base of its own: the base's seed is left out like the run's
    config = {key: value for key, value in recipe.get("config", {}).items() if key != "seed"}
    start = run.workload.starts_from(run.config)
    return {
        **found,
        "base": hash_value([{key: value for key, value in recipe.items() if key != "config"}, config]),
        "from_adapter": run.inputs.get("from_adapter", "" if start is None else str(start)),
        "options": method_options(run.config.method),
    }


def _made(run: Run[Any]) -> tuple[str, Mapping[str, Any]]:
    """The base's fingerprint and how it was made; where it is gone, what the run remembers of it."""
    folder = Path(run.config.base)
    if (folder / PROVENANCE).is_file():
        return run.workload.base_recipe(folder)
    remembered = run.inputs.get("base", run.config.base)
    return remembered, {"base": remembered}


def _names(groups: Sequence[tuple[Run[Any], Mapping[str, Any]]]) -> list[str]:
    """The method of each group, its options where they vary, and every other setting that is not the same in all."""
    every = [settings for _, settings in groups]
    shared = [k for k in every[0] if k not in ("options", "method.name") and len({str(s[k]) for s in every}) > 1]
    names = []
    for run, own in groups:
        method = own["method.name"]
        alike = [settings["options"] for settings in every if settings["method.name"] == method]
        shown = {key: value for key, value in own["options"].items() if any(o[key] != value for o in alike)}
        if "+" not in method:
            shown = {key.removeprefix(f"{method}."): value for key, value in shown.items()}
        shown |= {key: own[key] for key in shared}
        for key in {"base", "from_adapter"} & shown.keys():  # names for people, hashes to tell equal names apart
            folder = Path(getattr(run.config, key, "")).name
            shown[key] = f"{folder} ({hash_value(own[key])[:6]})" if folder else "none"
        names.append(" ".join([method, *(f"{key}={_text(value)}" for key, value in shown.items())]))
    return names


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
