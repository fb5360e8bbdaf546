"""Which adapter of a run is served: `current.json` names it, a promotion replaces it, a rollback takes it back.

The file is replaced as a whole, so at any moment it names one adapter or none; its history keeps every decision.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from pydantic import BaseModel, PositiveInt

from cladapt.artifacts import hash_file, read_record, write_json
from cladapt.config import PromoteConfig, resolve
from cladapt.errors import CheckFailed, ConfigError, DataError
from cladapt.eval.cells import Candidate
from cladapt.eval.promotion import CURRENT, Decision, decide
from cladapt.lock import locked
from cladapt.model.saved import ADAPTER_FILE, LEARNED, adapted, adapter_provenance
from cladapt.pipeline.inputs import open_inputs, verify_inputs
from cladapt.run import Run, latest_run, open_run
from cladapt.train.blocks import adapter_folder
from cladapt.train.sinks import Sink

FILE = "current.json"
CHALLENGER, FROZEN = "challenger", "frozen"
PROMOTED: Literal["promoted"] = "promoted"
REFUSED: Literal["refused"] = "refused"


class Event(BaseModel):
    """One decision: what was decided of which adapter, and why."""

    at: str
    action: Literal["promoted", "refused", "rolled back"]
    block: PositiveInt
    """The challenger's block; of a rollback, the block that is current again."""
    weights: str
    """Hash of that adapter's weights."""
    rule: str = ""
    reasons: list[str] = []
    differences: list[dict[str, Any]] = []


class Current(BaseModel):
    """What current.json must hold; `block` None while nothing is promoted."""

    schema_version: Literal[1] = 1
    block: PositiveInt | None = None
    adapter: str | None = None
    """Folder below the run directory."""
    weights: str | None = None
    history: list[Event] = []

    def stack(self) -> list[Event]:
        """The promotions in force, the present one last: what a rollback can go back to."""
        found: list[Event] = []
        for event in self.history:
            if event.action == "promoted":
                found.append(event)
            elif event.action == "rolled back":
                while found and found[-1].block != event.block:
                    found.pop()
        return found

    def judged(self, block: int, weights: str) -> Event | None:
        """The last decision about an adapter, None where there is none yet."""
        return next((e for e in reversed(self.history) if (e.block, e.weights) == (block, weights) and e.rule), None)


def read_current(run: Run[Any]) -> Current:
    """What is promoted in a run; `DataError` where the file is damaged."""
    file = run.path / FILE
    if not file.is_file():
        return Current()
    hint = "restore this file; without it the newest adapter is used, and `cladapt promote` starts anew"
    return Current.model_validate(read_record(file, Current, hint))


def current_block(run: Run[Any]) -> int | None:
    """The block of the promoted adapter; `DataError` where its weights are not those that were promoted."""
    current = read_current(run)
    if current.block is None:
        return None
    folder = adapter_folder(run.path, current.block)
    if not (folder / ADAPTER_FILE).is_file():
        raise DataError(
            f"{run.path / FILE} names {current.adapter}, which is not there",
            f"restore it, or go back: cladapt rollback {run.path}",
        )
    if (found := hash_file(folder / ADAPTER_FILE)) != current.weights:
        raise DataError(
            f"{folder} has the weights {found}, {FILE} has promoted {current.weights}",
            "restore the adapter, or judge the new one with `cladapt promote`",
        )
    return current.block


def promote(
    path: Path | None,
    settings: Mapping[str, Any],
    block: int | None,
    sink: Sink,
    data: Path | None = None,
    base: Path | None = None,
) -> dict[str, Any]:
    """Judge an adapter of a run (by default the newest of the latest run) and make it the current one, or refuse it.

    `CheckFailed` when it is refused; `current.json` keeps the decision. `data`, `base`: where these are now.
    """
    config = resolve(PromoteConfig, settings, "promote", PromoteConfig.shown_by)
    report = judge(latest_run() if path is None else path, config, block, sink, data=data, base=base)
    if report["decision"] == REFUSED:
        raise refusal(report, report)
    return report


def refusal(decided: Mapping[str, Any], result: dict[str, Any]) -> CheckFailed:
    """The error that says of a decision that the adapter is refused."""
    current = "none is current" if decided["current"] is None else f"that of block {decided['current']} stays current"
    return CheckFailed(
        f"the adapter of block {decided['block']} is not promoted: {'; '.join(decided['reasons'])}",
        f"{current}; to take it all the same: cladapt promote {quote(str(result['run']))} --block {decided['block']} "
        "--promote always",
        result,
    )


def judge(
    path: Path,
    config: PromoteConfig,
    block: int | None,
    sink: Sink,
    *,
    data: Path | None = None,
    base: Path | None = None,
    again: bool = True,
) -> dict[str, Any]:
    """Decide about an adapter and write `current.json`; what was decided, why, and what is current now.

    `again`: also where it was decided before; otherwise only a refusal by another rule is decided anew. An adapter that
    is current is not compared with itself.
    """
    run = open_run(path, data, base)
    with locked(run.path):
        chosen = run.choose(block)
        current, weights = read_current(run), hash_file(run.adapters[chosen] / ADAPTER_FILE)
        before = current_block(run)
        is_current = (before, current.weights) == (chosen, weights)
        known = current.judged(chosen, weights)
        if (again and not is_current) or (known and known.action == REFUSED and known.rule != config.rule):
            known = None
        event = known or _event(config, chosen, weights, compare(run, config, chosen, before, sink))
        if known is None:
            current = _write(run, current, event)
    return {
        "run": str(path),
        "block": chosen,
        "decision": event.action,
        "new": known is None,
        "rule": event.rule,
        "reasons": event.reasons,
        "current": current.block,
        "differences": event.differences,
    }


def _event(config: PromoteConfig, block: int, weights: str, decision: Decision) -> Event:
    return Event(
        at=_now(),
        action=PROMOTED if decision.promoted else REFUSED,
        block=block,
        weights=weights,
        rule=config.rule,
        reasons=list(decision.reasons),
        differences=[dict(line) for line in decision.differences],
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def compare(run: Run[Any], config: PromoteConfig, block: int, current: int | None, sink: Sink) -> Decision:
    """Judge the adapter of `block` against the current one, the base alone and counting, on its validation targets."""
    stream, base = open_inputs(run)
    verify_inputs(run, base)
    sink.emit({"kind": "note", "text": f"judging the adapter of block {block} on the validation targets of its block"})
    learned = run.workload.learned_block(run.config, base)
    if current is not None and current != block and config.rule != "always":
        known = adapter_provenance(adapter_folder(run.path, current)).get(LEARNED, ())
        if block in known:
            raise ConfigError(
                f"the current adapter, of block {current}, has learned the validation targets of block {block}: they "
                "tell nothing of it",
                "take the older one without a comparison: --promote always, or cladapt rollback",
            )
    base_of = partial(run.workload.base_of, run.config, stream, base)
    models = {FROZEN: Candidate(learned, lambda: nullcontext(base.model), base=base_of(None))}
    for name, chosen in ((CURRENT, current), (CHALLENGER, block)):
        if chosen is not None and (name, chosen) != (CURRENT, block):
            folder = adapter_folder(run.path, chosen)
            models[name] = Candidate(chosen, partial(adapted, base, folder), base=base_of(folder))
    return decide(run.workload.judge(run.config, config, stream, base, models, block), config)


def rollback(path: Path | None, to: int | None) -> dict[str, Any]:
    """Make the adapter current that was so before the present one, or that of block `to` among the earlier ones."""
    run = open_run(latest_run() if path is None else path)
    with locked(run.path):
        current = read_current(run)
        earlier = current.stack()[:-1]
        if not earlier:
            raise DataError(
                f"{run.path} has no earlier adapter to go back to: "
                + ("nothing is promoted" if current.block is None else f"block {current.block} was promoted first"),
                "promote another one: cladapt promote --block K --promote always",
            )
        target = earlier[-1] if to is None else next((e for e in reversed(earlier) if e.block == to), None)
        if target is None:
            known = sorted({event.block for event in earlier})
            raise ConfigError(f"--to {to}: not current before", f"the blocks that were: {known}")
        folder = adapter_folder(run.path, target.block) / ADAPTER_FILE
        if not folder.is_file() or hash_file(folder) != target.weights:
            raise DataError(f"{folder} is not what was promoted then", "restore it, or go back further with --to")
        reasons = [f"back from block {current.block}"]
        _write(
            run,
            current,
            Event(at=_now(), action="rolled back", block=target.block, weights=target.weights, reasons=reasons),
        )
    return {
        "run": str(run.path),
        "current": target.block,
        "before": current.block,
        "next": "exports are as they were: `cladapt export --overwrite` or the next `cladapt update` renews them",
    }


def _write(run: Run[Any], current: Current, event: Event) -> Current:
    """Add a decision to `current.json`, and return what it holds then."""
    changed = current.model_copy(update={"history": [*current.history, event]})
    if event.action != "refused":
        folder = adapter_folder(run.path, event.block).relative_to(run.path)
        changed = changed.model_copy(
            update={"block": event.block, "adapter": folder.as_posix(), "weights": event.weights}
        )
    write_json(run.path / FILE, changed.model_dump(mode="json"))
    return changed
