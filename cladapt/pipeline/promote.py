"""Which adapter of a run is served: `current.json` names it, a promotion replaces it, a rollback takes it back.

The file is replaced as a whole, so at any moment it names one adapter or none; its history keeps every decision.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, PositiveInt

from cladapt.artifacts import hash_file, read_record, write_json
from cladapt.config import PromoteConfig, resolve
from cladapt.errors import CheckFailed, ConfigError, DataError
from cladapt.eval.promotion import CURRENT, Decision, decide
from cladapt.lock import locked
from cladapt.model.adapter import adapted_lm
from cladapt.model.history import unload
from cladapt.model.saved import ADAPTER_FILE, load_adapter
from cladapt.pipeline.inputs import open_inputs
from cladapt.run import Run, latest_run, open_run
from cladapt.train.blocks import adapter_folder
from cladapt.train.sinks import Sink
from cladapt.workloads._base import FittedBase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "current.json"
CHALLENGER, FROZEN = "challenger", "frozen"


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
    path: Path | None, settings: Mapping[str, Any], block: int | None, sink: Sink, again: bool = True
) -> dict[str, Any]:
    """Judge an adapter of a run (by default the newest) and make it the current one, or refuse it.

    `again`: also where it was judged before. `CheckFailed` when it is refused; `current.json` keeps the decision.
    """
    config = resolve(PromoteConfig, settings, "promote", PromoteConfig.shown_by)
    run = open_run(latest_run() if path is None else path)
    with locked(run.path):
        report = judge(run, config, block, sink, again)
    if report["decision"] == "refused":
        raise CheckFailed(
            f"block {report['block']} of {run.path} is not promoted: {'; '.join(report['reasons'])}",
            f"the current adapter stays ({_name(report['current'])}); --promote always takes the new one all the same",
            report,
        )
    return report


def judge(run: Run[Any], config: PromoteConfig, block: int | None, sink: Sink, again: bool) -> dict[str, Any]:
    """Decide about an adapter and write `current.json`; what was decided, why, and what is current now."""
    adapters = run.adapters
    if not adapters:
        raise DataError(
            f"{run.path} has no adapter (method {run.config.method.name})", "train with a method that adapts"
        )
    chosen = max(adapters) if block is None else block
    if chosen not in adapters:
        raise ConfigError(f"--block {chosen}: {run.path} has {sorted(adapters)}", "choose one of these blocks")
    current, weights = read_current(run), hash_file(adapters[chosen] / ADAPTER_FILE)
    before = current_block(run)
    event = None if again else current.judged(chosen, weights)
    if event is None and (before, current.weights) == (chosen, weights):
        event = current.judged(chosen, weights)
    if event is None:
        decision = compare(run, config, chosen, before, sink)
        event = Event(
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            action="promoted" if decision.promoted else "refused",
            block=chosen,
            weights=weights,
            rule=config.rule,
            reasons=list(decision.reasons),
            differences=[dict(line) for line in decision.differences],
        )
        _write(run, current, event)
    return {
        "run": str(run.path),
        "block": chosen,
        "decision": event.action,
        "rule": event.rule,
        "reasons": event.reasons,
        "current": read_current(run).block,
        "differences": event.differences,
    }


def compare(run: Run[Any], config: PromoteConfig, block: int, current: int | None, sink: Sink) -> Decision:
    """Judge the adapter of `block` against the current one, the base alone and counting, on its validation targets."""
    stream, base = open_inputs(run)
    sink.emit({"kind": "note", "text": f"judging the adapter of block {block} on the validation targets of its block"})
    folders = {} if current in (None, block) else {CURRENT: adapter_folder(run.path, int(current))}
    folders[CHALLENGER] = adapter_folder(run.path, block)
    models = _models(folders, base)
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
        at = datetime.now(UTC).isoformat(timespec="seconds")
        reasons = [f"back from block {current.block}"]
        _write(
            run,
            current,
            Event(at=at, action="rolled back", block=target.block, weights=target.weights, reasons=reasons),
        )
    return {"run": str(run.path), "current": target.block, "before": current.block}


def _write(run: Run[Any], current: Current, event: Event) -> None:
    """Add a decision to `current.json`; what is promoted follows from the history."""
    changed = current.model_copy(update={"history": [*current.history, event]})
    if event.action != "refused":
        folder = adapter_folder(run.path, event.block).relative_to(run.path)
        changed = changed.model_copy(
            update={"block": event.block, "adapter": folder.as_posix(), "weights": event.weights}
        )
    write_json(run.path / FILE, changed.model_dump(mode="json"))


def _models(folders: Mapping[str, Path], base: FittedBase) -> Iterator[tuple[str, "PreTrainedModel"]]:
    """The base alone, then it with each adapter; a model is gone when the next one is asked for."""
    yield FROZEN, base.model
    for name, folder in folders.items():
        model = load_adapter(base, folder)
        yield name, adapted_lm(model)
        unload(model)


def _name(block: int | None) -> str:
    return "none yet" if block is None else f"block {block}"
