"""What class-incremental runs show: metrics.json and report.html of one, measures and differences of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cladapt.artifacts import atomic_dir, hash_value, read_parquet
from cladapt.config import ClassEvalConfig, ClassifyConfig, describe
from cladapt.data.images import ImageStream
from cladapt.errors import ConfigError, DataError
from cladapt.eval import significance
from cladapt.eval.classes import MEASURES, Outcomes, differences, effects
from cladapt.eval.images import ROWS
from cladapt.eval.report import HeatMap, KeyValues, Section, Table, render_report
from cladapt.eval.significance import Effect
from cladapt.export.place import refuse_existing
from cladapt.model.vit import VisionBase
from cladapt.pipeline.compare import method_options, open_each
from cladapt.pipeline.report import Spectra, regulariser_log, rows_table, step_curves
from cladapt.run import Run, open_run

NOTE = (
    "R: accuracy among all classes of the blocks up to the model's. FWT: of a nearest-class-mean probe on blocks to "
    "come, minus that of the base. Intervals are 95 %, bootstrap over the images of each block."
)


def class_report(
    run: Run[ClassifyConfig], rows: pl.DataFrame, stream: ImageStream, base: VisionBase, config: ClassEvalConfig
) -> tuple[str, dict[str, Any]]:
    """The HTML page and the content of metrics.json."""
    outcomes = Outcomes.of(rows)
    r, p = outcomes.matrices()
    found = effects({run.config.seed: rows}, config.bootstrap)
    spectra = Spectra.read(run)
    result: dict[str, Any] = {
        "task": run.task,
        "method": run.config.method.name,
        "stream": stream.fingerprint,
        "base_block": base.fitted_block,
        "config": config.model_dump(mode="json"),
        "table": measure_lines(found),
        "matrix": _lines(outcomes, r),
        "probe": _lines(outcomes, p),
        "spectrum": spectra.log(),
    }
    provenance = {
        "run": str(run.path),
        "config": run.config.model_dump(mode="json"),
        "environment": run.environment(),
        "stream": stream.fingerprint,
        "base": base.fingerprint,
    }
    sections: list[Section] = [
        Table("Measures", ["measure", "value"], [[name, effect] for name, effect in found.items()], NOTE),
        _heat("R[t][s]: accuracy after block t on block s", outcomes, r),
        _heat("P[t][s]: accuracy of the probe", outcomes, p),
        rows_table("What the method did", regulariser_log(run)),
        step_curves(run),
        *spectra.sections(),
        KeyValues("Provenance", provenance),
    ]
    return render_report(f"cladapt: {run.config.method.name}, seed {run.config.seed}", sections), result


def measure_lines(found: Mapping[str, Effect]) -> list[dict[str, Any]]:
    """One line per measure with its interval, null where it has no term."""
    return [
        {"measure": name, **{end: _known(getattr(effect, end)) for end in ("mean", "low", "high")}}
        for name, effect in found.items()
    ]


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _lines(outcomes: Outcomes, matrix: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"model": model, **{str(block): _known(float(v)) for block, v in zip(outcomes.blocks, line, strict=True)}}
        for model, line in zip(outcomes.models, matrix, strict=True)
    ]


def _heat(title: str, outcomes: Outcomes, matrix: np.ndarray) -> HeatMap:
    values = [[_known(float(v)) for v in line] for line in matrix]
    return HeatMap(title, outcomes.models, outcomes.blocks, values, corner="model / block")


def read_rows(run: Run[ClassifyConfig]) -> pl.DataFrame:
    """What the evaluation of a run wrote; `DataError` where it was not evaluated."""
    path = run.path / "images" / "rows.parquet"
    if not path.is_file():
        raise DataError(f"{run.path} is not evaluated yet", f"cladapt eval {run.path}")
    return read_parquet(path, ROWS)


def compare_class_runs(paths: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Runs that differ in seed, stream and base alone are one group; each group's measures, and minus the first's.

    With `out` also as summary.csv and differences.csv there.
    """
    if out is not None:
        refuse_existing(out)
    groups: dict[str, dict[int, Run[ClassifyConfig]]] = {}
    for run in open_each(paths, _open):
        by_seed, seed = groups.setdefault(hash_value(_settings(run.config)), {}), run.config.seed
        if seed in by_seed:
            raise ConfigError(
                f"{by_seed[seed].path} and {run.path} have the same configuration and seed={seed}",
                "give one run per seed",
            )
        by_seed[seed] = run
    names = _names([next(iter(by_seed.values())).config for by_seed in groups.values()])
    rows = {
        name: {seed: read_rows(run) for seed, run in by_seed.items()}
        for name, by_seed in zip(names, groups.values(), strict=True)
    }
    result = class_comparison(rows)
    if out is not None:
        with atomic_dir(out) as folder:
            for name, lines in result.items():
                table = pl.DataFrame(lines, infer_schema_length=None).write_csv(float_precision=6)
                (folder / f"{name}.csv").write_text(table, encoding="utf-8")
        result = {"out": str(out), **result}
    return result


def class_comparison(
    rows: Mapping[str, Mapping[int, pl.DataFrame]], resamples: int = 2000, reference: str = ""
) -> dict[str, Any]:
    """`summary`: a line per name, seeds pooled; `differences`: each other name minus the reference, by measure."""
    reference = reference or next(iter(rows))
    if apart := [name for name, by_seed in rows.items() if by_seed.keys() != rows[reference].keys()]:
        told = "; ".join(f"{name}: {sorted(rows[name])}" for name in (reference, *apart))
        raise ConfigError(f"the groups have different seeds ({told})", "run the missing seeds, or leave groups out")
    summary = []
    for name, by_seed in rows.items():
        found = effects(by_seed, resamples)
        line: dict[str, Any] = {"model": name, "seeds": len(by_seed)}
        for measure in MEASURES:
            effect = found[measure]
            line |= {measure: _known(effect.mean), f"{measure} 95 %": f"[{effect.low:.4f}, {effect.high:.4f}]"}
        summary.append(line)
    lines = [
        {
            "difference": f"{name} - {reference}",
            "measure": measure,
            "effect": _known(effect.mean),
            "low": _known(effect.low),
            "high": _known(effect.high),
            "shown": significance.describe(effect),
        }
        for name, by_seed in rows.items()
        if name != reference
        for measure, effect in differences(by_seed, rows[reference], resamples).items()
    ]
    return {"summary": summary, "differences": lines}


def _settings(config: ClassifyConfig) -> dict[str, Any]:
    """All that shapes a run but its seed, stream, base and evaluation, by dotted key; options with their defaults."""
    apart = ("seed", "data", "base", "method.options")
    found = {row["key"]: row["value"] for row in describe(config) if row["key"] not in apart}
    own = {key: value for key, value in found.items() if not key.startswith("eval.")}
    return {**own, **method_options(config.method)}


def _names(configs: Sequence[ClassifyConfig]) -> list[str]:
    """The method of each and every setting that is not the same in all runs of that method."""
    every = [_settings(config) for config in configs]
    names = []
    for own in every:
        method = own["method.name"]
        alike = [settings for settings in every if settings["method.name"] == method]
        told = {key.removeprefix(f"{method}."): v for key, v in own.items() if any(s[key] != v for s in alike)}
        names.append(" ".join([method, *(f"{key}={value}" for key, value in told.items())]))
    return names


def _open(path: Path) -> Run[ClassifyConfig]:
    """A run; `ConfigError` where it recommends."""
    run = open_run(path)
    if not isinstance(run.config, ClassifyConfig):
        raise ConfigError(f"{path} is a run of --task {run.task}", "compare runs of one task")
    return Run(run.path, run.config, run.inputs)
