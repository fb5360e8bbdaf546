"""The nightly job: a new log comes in, is learned, judged, promoted and exported, in stages that can be repeated.

    append -> extend -> continue -> evaluate -> decide -> export

Every stage does nothing where its work is done, so a job that was killed is simply started again, and the same log
twice changes nothing. What a stage has done is in the files that it wrote; there is no other state.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cladapt.config import PromoteConfig, merge_overrides, resolve
from cladapt.errors import ConfigError, DataError
from cladapt.export.targets import TARGETS, refuse_existing
from cladapt.lock import locked
from cladapt.model.load import PROVENANCE
from cladapt.pipeline import evaluation, growth, runs, ship, streams
from cladapt.pipeline.promote import REFUSED, current_block, judge, refusal
from cladapt.run import Run, latest_run, open_run
from cladapt.train.sinks import Sink

WAITING, NOTHING = "waiting", "nothing new"


def update(
    source: str,
    path: Path | None,
    data: Path | None,
    base: Path | None,
    sink: Sink,
    *,
    dates: Sequence[str] = (),
    late: str = "reject",
    rejects: Path | None = None,
    least: int = 30,
    items: Path | None = None,
    index: Path | None = None,
    held_out: str = "next",
    promotion: PromoteConfig | None = None,
    target: str = "peft",
    out: Path | None = None,
) -> dict[str, Any]:
    """Bring a run (by default the latest) up to date with a log; what each stage did, and the `outcome` of the night.

    `least`: users that must be tested in a new block; with fewer its rows wait in the stream for the next log. The
    outcome is `promoted`, `refused` (then `CheckFailed`, after all is written), `waiting` or `nothing new`. `items`,
    `index`: texts and IDs of new items. `data`, `base`: where the run's stream and base are now.
    """
    path = latest_run() if path is None else path
    run = open_run(path, data, base)
    _check(run, target, held_out, index, out)
    stream = Path(run.config.data)
    with locked(path / ".update"):  # the stages lock run and stream for themselves
        appended = growth.append_data(stream, source, dates=dates, late=late, rejects=rejects, least=least, items=items)
        extended = streams.extend_tokens(stream, index)
        learned = runs.continue_run(path, sink, data=data, base=base, held_out=held_out)
        report: dict[str, Any] = {
            "run": str(path),
            "stream": str(stream),
            "append": _brief(appended, "stream", "blocks", "losses", "warnings"),
            "extend": _brief(extended, "sids", "fingerprint"),
            "learn": [line["block"] for line in learned["blocks"]],
        }
        outcome = WAITING if appended["waiting"] else NOTHING
        if open_run(path).adapters:
            measured = evaluation.evaluate(path, {}, None, sink, data=data, base=base)
            report["evaluate"] = {**measured["cells"], "report": measured["report"]}
            decided = judge(path, promotion or PromoteConfig(), None, sink, data=data, base=base, again=False)
            report["decide"] = _brief(decided, "run", "differences")
            report["export"] = _export(path, target, out, stream, base)
            report |= {"differences": decided["differences"], "table": measured["table"]}
            if decided["new"]:
                outcome = decided["decision"]
        report |= {"outcome": outcome, "warnings": appended["warnings"]}
    if outcome == REFUSED:
        raise refusal(report["decide"], report)
    return report


def _check(run: Run[Any], target: str, held_out: str, index: Path | None, out: Path | None) -> None:
    """Mistakes that would show in a late stage show before the first."""
    if target not in TARGETS:
        raise ConfigError(f"target {target!r} is not known", f"use one of {', '.join(TARGETS)}")
    resolve(type(run.config), merge_overrides({}, [f"train.held_out={held_out}"]), "update")
    if index is not None and not index.is_file():
        raise DataError(f"no such file: {index}", "check --index")
    if not (Path(run.config.base) / PROVENANCE).is_file():
        raise DataError(
            f"{run.config.base} is not a base directory: it has no {PROVENANCE}", "say where it is: --base DIR"
        )
    if target != "vllm":
        refuse_existing(out or run.path / "export" / target, replace=True)


def _export(run: Path, target: str, out: Path | None, data: Path, base: Path | None) -> dict[str, Any] | None:
    """Export the current adapter where it is not exported as it is now; None where nothing is promoted."""
    block = current_block(open_run(run))
    if block is None:
        return None
    place, source = out or run / "export" / target, ship.find_source(run, base, block)
    written = not ship.is_exported(source, target, place, ship.offered_of(source, data))
    if written:
        ship.export(run, target, place, base, block, data=data, overwrite=True)
    return {"out": str(place), "block": block, "written": written}


def _brief(report: Mapping[str, Any], *without: str) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in without}
