"""What the evaluation of a run has written, read back."""

from dataclasses import dataclass
from typing import Any

from cladapt.artifacts import read_record
from cladapt.config import resolve
from cladapt.errors import ConfigError, DataError
from cladapt.pipeline.report import METRICS
from cladapt.run import Run

__all__ = ["METRICS", "Evaluated"]


@dataclass(frozen=True)
class Evaluated:
    """A run with what its evaluation wrote; `stream` is None where the evaluation did not record it."""

    run: Run[Any]
    measures: Any
    stream: str | None

    @classmethod
    def read(cls, run: Run[Any]) -> "Evaluated":
        """Read rows and metrics.json; `DataError` when the run was not evaluated."""
        file, rows, again = run.path / METRICS, run.path / run.workload.rows_folder, f"cladapt eval {run.path}"
        if not file.is_file() or not any(rows.glob("*.parquet")):
            raise DataError(f"{run.path} is not evaluated yet", again)
        metrics = read_record(file, run.workload.record, again)
        try:
            config = resolve(type(run.config.eval), metrics["config"], f"{file}: config")
        except ConfigError as error:  # no mistake of a user: `cladapt eval` wrote this file
            raise DataError(error.message, again) from error
        measures = run.workload.read(rows, metrics, run.config.method.name, config, again)
        return cls(run, measures, metrics.get("stream"))
