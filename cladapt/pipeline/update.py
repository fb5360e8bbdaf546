"""The nightly job: a new log comes in, is learned, judged, promoted and exported, in stages that can be repeated.

    append -> extend -> continue -> evaluate -> decide -> export

Every stage does nothing where its work is done, so a job that was killed is simply started again, and the same log
twice changes nothing. What a stage has done is in the files that it wrote; there is no other state. A run without a
language model exports nothing, and its stream is extended where it has IDs all the same.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cladapt.config import PromoteConfig, merge_overrides, resolve
from cladapt.errors import CheckFailed, ConfigError, DataError
from cladapt.eval.significance import NO_DIFFERENCE
from cladapt.export.targets import TARGETS, refuse_existing
from cladapt.lock import locked
from cladapt.model.load import PROVENANCE
from cladapt.pipeline import evaluation, growth, runs, ship, streams
from cladapt.pipeline.inputs import open_inputs, verify_inputs
from cladapt.pipeline.promote import REFUSED, current_block, judge, refusal
from cladapt.run import Run, latest_run, open_run
from cladapt.tokens.sids import read_index
from cladapt.train.sinks import Sink

WAITING, NOTHING, LATE = "waiting", "nothing new", "all late"


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
    ids: int | None = None,
    promotion: PromoteConfig | None = None,
    target: str = "peft",
    out: Path | None = None,
) -> dict[str, Any]:
    """Bring a run (by default the latest) up to date with a log; what each stage did, and the `outcome` of the night.

    `least`: users that must be tested in a new block; with fewer its rows wait in the stream for the next log. The
    outcome is `promoted`, `refused`, `waiting`, `nothing new` or `all late`; `CheckFailed`, after all is written, where
    the adapter is refused, or every row is older than the stream's end and not in it. `items`, `index`: texts and IDs
    of new items. `ids`: the version of the IDs that new blocks are learned by, see `continue_run`. `data`, `base`:
    where the run's stream and base are now.
    """
    began = time.monotonic()
    path = latest_run() if path is None else path
    run = open_run(path, data, base)
    _check(run, target, held_out, index, out, ids)
    runs.check_version(run, ids)
    stream = Path(run.config.data)
    with locked(path / ".update"):  # the stages lock run and stream for themselves
        # another stream or base is refused before the log is in it
        verify_inputs(run, open_inputs(run, learning=True)[1])
        appended = growth.append_data(stream, source, dates=dates, late=late, rejects=rejects, least=least, items=items)
        has_ids = run.workload.language or (stream / streams.SIDS).is_file()
        extended = streams.extend_tokens(stream, index) if has_ids else {}
        learned = runs.continue_run(path, sink, data=data, base=base, held_out=held_out, ids=ids)
        report: dict[str, Any] = {
            "run": str(path),
            "stream": str(stream),
            "append": _brief(appended, "stream", "blocks", "losses", "warnings"),
            **({"extend": _brief(extended, "sids", "fingerprint")} if has_ids else {}),
            "learn": [line["block"] for line in learned["blocks"]],
        }
        outcome = WAITING if appended["waiting"] else NOTHING
        measured: dict[str, Any] = {"differences": []}
        if open_run(path).adapters:
            measured = evaluation.evaluate(path, {}, None, sink, data=data, base=base)
            report["evaluate"] = {**measured["cells"], "report": measured["report"]}
            decided = judge(path, promotion or PromoteConfig(), None, sink, data=data, base=base, again=False)
            report["decide"] = _brief(decided, "run", "differences")
            if run.workload.language:
                report["export"] = _export(path, target, out, stream, base)
            report |= {"differences": decided["differences"], "table": measured["table"]}
            if decided["new"] or (outcome == NOTHING and decided["decision"] == REFUSED):
                outcome = decided["decision"]
        if outcome == NOTHING and appended["late"] and not appended["known_rows"]:
            outcome = LATE
        report |= {"outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
        report["warnings"] = [*appended["warnings"], *_warnings(extended, measured["differences"])]
    if outcome == REFUSED:
        raise refusal(report["decide"], report)
    if outcome == LATE:
        raise CheckFailed(
            f"all {appended['late']} rows of {source} come too late: none is after the end of the stream",
            "look at the times of the stream's last block and of this log: a time far in the future ends a block there",
            report,
        )
    return report


def _check(run: Run[Any], target: str, held_out: str, index: Path | None, out: Path | None, ids: int | None) -> None:
    """Mistakes that would show in a late stage show before the first."""
    if target not in TARGETS:
        raise ConfigError(f"target {target!r} is not known", f"use one of {', '.join(TARGETS)}")
    resolve(type(run.config), merge_overrides({}, [f"train.held_out={held_out}"]), "update")
    if not run.workload.recommends:
        raise ConfigError(f"{run.path} is a run of --task {run.task}", "its streams do not grow")
    only = {"--target": target != "peft", "--out": out is not None, "--index": index is not None, "--ids": ids}
    if (given := [option for option, has in only.items() if has]) and not run.workload.language:
        raise ConfigError(
            f"{', '.join(given)}: {run.path} is a run of --task {run.task}, which knows no IDs and exports nothing",
            "leave them out; `cladapt recommend` uses the adapter that is promoted",
        )
    if index is not None:
        read_index(index)
    if not (Path(run.config.base) / PROVENANCE).is_file():
        raise DataError(
            f"{run.config.base} is not a base directory: it has no {PROVENANCE}", "say where it is: --base DIR"
        )
    if run.workload.language and target != "vllm":
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


def _warnings(extended: Mapping[str, Any], differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is worth a look: items whose IDs say nothing, and lines of the table that are shown better."""
    found = []
    for lacking in ("text", "neighbours"):
        if without := extended.get(f"items_without_{lacking}", 0):
            new = extended["new_items"]
            found.append(f"{without} of {new} new items have no {lacking}: their IDs say nothing of them, and stay")
    for line in differences:
        hits = next(key for key in line if key.startswith("HR@") and not key.endswith(" shown"))
        shown = line.get(f"{hits} shown", NO_DIFFERENCE)
        if shown != NO_DIFFERENCE and (line[hits] or 0.0) < 0.0:
            found.append(f"over all blocks, {hits} of {line['difference']} is {shown}: a simpler line is shown better")
    return found


def _brief(report: Mapping[str, Any], *without: str) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in without}
