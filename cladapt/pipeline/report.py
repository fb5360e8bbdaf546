"""What a run's evaluation says, as metrics.json and as one HTML report."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from cladapt.eval.report import KeyValues, Section, Trace, Traces, render_report, rows_table
from cladapt.model.saved import adapter_provenance
from cladapt.model.spectrum import Spectrum, saved_spectra, summary
from cladapt.run import Run
from cladapt.train.interference import FIGURES, INTERFERENCE
from cladapt.train.sequence_bases import DIAGNOSTICS
from cladapt.workloads._base import FittedBase

METRICS = "metrics.json"
REPORT = "report.html"
POINTS = 300
"""Points of a curve over steps, above which neighbours are averaged."""
SPECTRUM = (
    "Means over the modules of the singular values of delta W = scale * B A: Frobenius norm, effective rank "
    "(exponential of the entropy of their shares in the sum), largest over mean of those above 0 (1: all are equal), "
    "largest, smallest. own: of what the block itself has learned, without the history in its adapter."
)
INTERFERENCE_TITLE = "What blocks change for earlier inputs"
INTERFERENCE_NOTE = (
    "Of what a block adds to a layer, delta W, on inputs x of earlier blocks' examples. change: root mean square of "
    "||delta W x||, by which the layer's output moves. alignment: ||delta W X||_F / (||delta W||_F ||X||_F), 0 where "
    "no earlier input meets the update. Means over the modules. The lower, the better earlier inputs are protected."
)
DIAGNOSTICS_NOTE = (
    "Of the base and of the model after each block, dropout off. training_loss: mean over up to 512 training examples. "
    "Of the Hessian of the loss with respect to the sequence vector, means over up to 64 validation targets: largest "
    "eigenvalue, condition number (largest over smallest eigenvalue that is not rounding) and its decimal logarithm, "
    "rank. norm_dispersion: standard deviation over mean of the lengths of the items' rows, before normalisation. "
    "Overlaps: share of the items' 10 neighbours by text, or by common users, that are among an item's 10 nearest rows."
)
TEXT_NOTE = (
    "perplexity: exp of the mean negative log-likelihood of a token, over the whole vocabulary. bits_per_byte: the "
    "same per byte of the text. Lower is better; a rise is what adapting to items costs the language."
)


def run_report(
    run: Run[Any], measures: Any, stream: Any, base: FittedBase, text: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """The HTML page and the content of metrics.json; `text`: the record of a text's perplexities."""
    spectra = Spectra.read(run)
    figures = run.workload.figures(measures, stream)
    result: dict[str, Any] = {
        "task": run.task,
        "method": measures.name,
        "stream": stream.fingerprint,
        "base_block": measures.base_block,
        "config": measures.config.model_dump(mode="json"),
        **figures,
        "spectrum": spectra.log(),
        "interference": interference_log(run),
        **({"diagnostics": found} if (found := diagnostics_log(run, base)) else {}),
        **({} if text is None else {"text": dict(text)}),
    }
    provenance = {
        "run": str(run.path),
        "config": run.config.model_dump(mode="json"),
        "environment": run.environment(),
        "stream": stream.fingerprint,
        "base": base.fingerprint,
    }
    sections: list[Section] = [
        *run.workload.sections(measures, figures, stream, base),
        *([] if text is None else [rows_table(f"Perplexity of {text['file']}", text["rows"], TEXT_NOTE)]),
        rows_table("What the method did", regulariser_log(run)),
        step_curves(run),
        *spectra.sections(),
        *interference_sections(run),
        *diagnostics_sections(run, base),
        KeyValues("Provenance", provenance),
    ]
    return render_report(f"cladapt: {measures.name}, seed {run.config.seed}", sections), result


def diagnostics_log(run: Run, base: FittedBase) -> list[dict[str, Any]]:
    """Figures of the base and of each block's model, where they were taken; see `cladapt.train.sequence_bases`."""
    records = {base.fitted_block: base.provenance}
    records |= {block: adapter_provenance(path) for block, path in run.adapters.items()}
    return [{"block": block, **each[DIAGNOSTICS]} for block, each in records.items() if DIAGNOSTICS in each]


def diagnostics_sections(run: Run, base: FittedBase) -> list[Section]:
    """The log as a table, and the base's loss over its epochs."""
    found = diagnostics_log(run, base)
    losses = base.provenance.get("training_loss") or []
    if not found:
        return []
    line = [(epoch, loss) for epoch, loss in enumerate(losses, start=1)]
    return [
        rows_table("Training loss, curvature and geometry of the item table", found, DIAGNOSTICS_NOTE),
        Traces("How the base learned", [Trace("training loss", [line])], "epoch"),
    ]


def interference_log(run: Run) -> list[dict[str, Any]]:
    """Per block after the first: means over the adapted modules; see `cladapt.train.interference`."""
    return [
        {"block": block, **{figure: float(np.mean([each[figure] for each in found.values()])) for figure in FIGURES}}
        for block, found in _interference(run).items()
    ]


def interference_sections(run: Run) -> list[Section]:
    """The log as a table, and the change of every layer over the blocks."""
    found = _interference(run)
    if not found:
        return []
    modules = list(next(iter(found.values())))
    lines = [
        [(block, each[m]["change"]) for block, each in found.items() if m in each and each[m]["change"] > 0]
        for m in modules
    ]
    trace = Trace("change", lines, labels=[m.removeprefix("base_model.model.") for m in modules], log=True)
    return [
        rows_table(INTERFERENCE_TITLE, interference_log(run), INTERFERENCE_NOTE),
        Traces("Change for earlier inputs by layer", [trace], "block", "One line per module; what is 0 is left out."),
    ]


def _interference(run: Run) -> dict[int, dict[str, dict[str, float]]]:
    records = {block: adapter_provenance(path).get(INTERFERENCE) for block, path in run.adapters.items()}
    return {block: record for block, record in records.items() if record}


@dataclass(frozen=True)
class StepLog:
    """Logged steps by block, in order; of a step that an interrupted run did again, the last."""

    blocks: Mapping[int, Sequence[Mapping[str, Any]]]
    unreadable: int = 0
    """Lines that are no event, as a killed process may leave."""

    @classmethod
    def read(cls, run: Run) -> "StepLog":
        log = run.path / "log.jsonl"
        if not log.is_file():
            return cls({})
        found: dict[tuple[int, int], dict[str, Any]] = {}
        unreadable = 0
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
                if event["kind"] == "step":
                    found[int(event["block"]), int(event["step"])] = {"loss": None, **event}
            except (ValueError, TypeError, KeyError, RecursionError):
                unreadable += 1
        blocks = groupby(sorted(found), key=lambda key: key[0])
        return cls({block: [found[key] for key in keys] for block, keys in blocks}, unreadable)


def regulariser_log(run: Run) -> list[dict[str, Any]]:
    """Per block: mean and last value of what the method logged at each step."""
    lines = []
    for block, steps in StepLog.read(run).blocks.items():
        line: dict[str, Any] = {"block": block, "steps": len(steps), "loss, last": steps[-1]["loss"]}
        for key in (k for k in steps[-1] if "/" in k):
            values = [step[key] for step in steps if step.get(key) is not None]
            line[f"{key}, mean"] = float(np.mean(values)) if values else None
            line[f"{key}, last"] = steps[-1][key]
        lines.append(line)
    return lines


def step_curves(run: Run) -> Traces:
    """The loss and what the method logged, over the steps of all blocks; see `POINTS`."""
    log = StepLog.read(run)
    blocks = log.blocks
    stride = max(1, math.ceil(sum(map(len, blocks.values())) / POINTS))
    starts = dict(zip(blocks, np.cumsum([0, *map(len, blocks.values())]).tolist(), strict=False))
    steps = [step for each in blocks.values() for step in each]
    logged = dict.fromkeys(key for step in steps for key in step if "/" in key)
    traces = []
    for key in ("loss", *logged):
        lines = []
        for block, each in blocks.items():
            y = np.array([step.get(key) for step in each], dtype=np.float64)  # None becomes NaN
            lines.append(_downsample(starts[block] + 1 + np.arange(len(y)), y, stride))
        traces.append(Trace(key, lines, {start + 1: f"block {block}" for block, start in starts.items()}))
    notes = [f"Each point is the mean of {stride} steps."] if stride > 1 else []
    if log.unreadable:
        notes.append(f"{log.unreadable} lines of log.jsonl are unreadable and left out.")
    return Traces("Step by step", traces, "step over all blocks", " ".join(notes))


def _downsample(x: np.ndarray, y: np.ndarray, stride: int) -> list[tuple[float, float]]:
    """(x, y) averaged over runs of `stride` neighbours; what is not finite is left out."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if not len(x):
        return []
    first = np.arange(0, len(x), stride)
    size = np.diff([*first, len(x)])
    return list(zip(*((np.add.reduceat(v, first) / size).tolist() for v in (x, y)), strict=True))


@dataclass(frozen=True)
class Spectra:
    """Singular values of a run's adapters by block and module; `own`: of what a block added to its history."""

    whole: Mapping[int, Mapping[str, Spectrum]]
    own: Mapping[int, Mapping[str, Spectrum]]

    @classmethod
    def read(cls, run: Run) -> "Spectra":
        inheriting = {
            block: path for block, path in run.adapters.items() if adapter_provenance(path).get("history_rank")
        }
        return cls(
            {block: saved_spectra(path) for block, path in run.adapters.items()},
            {block: saved_spectra(path, own=True) for block, path in inheriting.items()},
        )

    def log(self) -> list[dict[str, Any]]:
        """Per block: means over the modules, those of its own delta W under `own_` names."""
        lines = []
        for block, found in self.whole.items():
            own = summary(self.own[block]) if block in self.own else {}
            lines.append({"block": block, **summary(found), **{f"own_{name}": value for name, value in own.items()}})
        return lines

    def sections(self) -> list[Section]:
        """The log as a table, and the last block's values as one line per module."""
        if not self.whole:
            return []
        last = max(self.whole)
        drawn = {"delta W": self.whole[last], "own delta W": self.own.get(last, {})}
        traces = [_values(name, found) for name, found in drawn.items() if found]
        title = f"Singular values of the adapter of block {last}"
        return [
            rows_table("Spectrum of the adapters", self.log(), SPECTRUM),
            Traces(title, traces, "singular value", "One line per module; what is 0 is left out."),
        ]


def _values(name: str, found: Mapping[str, Spectrum]) -> Trace:
    lines = [[(i, v) for i, v in enumerate(spectrum.values, 1) if v > 0] for spectrum in found.values()]
    return Trace(name, lines, labels=[module.removeprefix("base_model.model.") for module in found], log=True)
