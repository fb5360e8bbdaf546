"""Where the time of an epoch's steps and of a decoding batch goes, phase by phase: what to make faster first.

A phase's time is its own, without that of phases inside it. On a GPU each change of phase waits for the device, so that
its work counts where it was asked for; what is watched so is slower than the same without.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cladapt import workloads
from cladapt.artifacts import atomic_path
from cladapt.config import RunConfig, SimulateConfig, TokensConfig, TrainConfig
from cladapt.data.histories import split_block
from cladapt.errors import ConfigError
from cladapt.eval.lists import Catalogue, make_decoder
from cladapt.methods import available
from cladapt.ops import compute_device
from cladapt.pipeline.bench import USERS, Case, make_case, make_fit, run_steps
from cladapt.pipeline.kernels import check_request
from cladapt.train.sinks import JsonlSink, Sink
from cladapt.train.stream import make_form, training_documents
from cladapt_kernels.timing import WARMUP, Row, quantiles, where, write_rows

STEP = ("data", "forward", "backward", "method", "optimiser", "log")
DECODING = ("data", "model", "scores", "search")
OTHER = "other"
"""What runs between the phases."""
HOOKS = ("watch", "loss_terms", "edit_grads", "after_step")


class Phases:
    """A clock of phases, one of which runs at any time: OTHER, unless one was entered."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self._names, self._device = (*names, OTHER), device
        self._entered = [OTHER]
        self._watched: list[tuple[object, str]] = []
        self.begin()

    def __enter__(self) -> "Phases":
        return self

    def __exit__(self, *_: object) -> None:
        for owner, function in self._watched:
            delattr(owner, function)

    def begin(self) -> None:
        """Start from zero."""
        self._seconds = dict.fromkeys(self._names, 0.0)
        self._since = self._now()

    def end(self) -> dict[str, float]:
        """Seconds of each phase since `begin`; their sum is the time that has passed."""
        self._count()
        return dict(self._seconds)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Inside, time counts for the phase `name` and for none around it."""
        self._count()
        self._entered.append(name)
        try:
            yield
        finally:
            self._count()
            self._entered.pop()

    def watch(self, owner: object, function: str, name: str) -> None:
        """Let every call of an object's function count for the phase `name`, until the clock is left."""
        call = getattr(owner, function)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.during(name):
                return call(*args, **kwargs)

        setattr(owner, function, watched)
        self._watched.append((owner, function))

    def _count(self) -> None:
        now = self._now()
        self._seconds[self._entered[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def profile(
    method: str, runs: int, base: Path | None, data: Path | None, out: Path | None, sink: Sink
) -> dict[str, Any]:
    """Shares of the phases in the training steps of an epoch and in a decoding batch; rows go to the csv `out` too.

    `base` and `data` are a base and its stream, whose last block is learned; None both: a tiny base and a simulated
    stream. `ConfigError` for a method that trains nothing, or one of the two without the other.
    """
    check_request(runs, out)
    if (base is None) != (data is None):
        raise ConfigError("--base and --data belong together", "give both, or neither: then a stream is simulated")
    learning = sorted(name for name, kind in available().items() if kind.trains)
    if method not in learning:
        raise ConfigError(f"--method {method} is not a method that trains", f"use one of {', '.join(learning)}")
    if base is None or data is None:
        sink.emit({"kind": "note", "text": "simulating a stream and training a base on its first block"})
        case, name = make_case(SimulateConfig(), TokensConfig()), "tiny"
    else:
        case, name = open_case(base, data), base.name
    sink.emit({"kind": "note", "text": f"measuring {runs} epochs of {method} and {runs} decoding batches"})
    rows = [*profile_steps(case, name, method, runs), *profile_decoding(case, name, runs)]
    here = where(case.device)
    if out is not None:
        with atomic_path(out) as temporary:
            write_rows(temporary, [{**row, **here} for row in rows])
    shown = [{key: row[key] for key in ("name", "provider", "q20", "q50", "q80", "shape")} for row in rows]
    return {**here, "method": method, "runs": runs, "out": None if out is None else str(out), "shares": shown}


def open_case(base: Path, data: Path) -> Case:
    """The last block of a stream, to be learned by a base on the defaults of training."""
    train = TrainConfig()
    stream, opened = workloads.get("recommend").open_inputs(RunConfig(data=str(data), base=str(base)))
    form = make_form("packed", opened, train.window, train.row_tokens)
    return Case(stream, opened, form, split_block(stream, stream.n_blocks), train, compute_device())


def profile_steps(case: Case, base: str, method: str, runs: int) -> list[Row]:
    """Epochs of a method's steps: data, forward and backward passes, the method's hooks, optimiser, log."""
    fit = make_fit(case, method, training_documents(case.split, case.form))
    with tempfile.TemporaryDirectory() as folder, Phases(STEP, case.device) as phases:
        fit.sink = JsonlSink(Path(folder) / "log.jsonl")
        phases.watch(fit, "steps", "data")
        phases.watch(fit.module, "forward", "forward")
        phases.watch(fit.accelerator, "backward", "backward")
        for hook in HOOKS:
            phases.watch(fit.method, hook, "method")
        for function in ("step", "zero_grad"):
            phases.watch(fit.optimizer, function, "optimiser")
        phases.watch(fit, "clip", "optimiser")
        phases.watch(fit.sink, "emit", "log")
        shape = f"{base}, {method}, {len(fit.steps(0))} steps of {case.train.batch_tokens} tokens"
        return shares("training step", shape, lambda: run_steps(fit, fit.steps(0)), phases, runs)


def profile_decoding(case: Case, base: str, runs: int) -> list[Row]:
    """A batch of the block's test users: prompts, the model's passes, scores of codes, and search in the trie."""
    catalogue = Catalogue(case.base.sids, case.stream.catalogue(case.split.block))
    decoder = make_decoder(case.base.model, case.base, catalogue, case.beams, case.train.softmax)
    users = case.split.test_users[:USERS]
    shape = f"{base}, {len(users)} users, {case.beams} beams, {len(catalogue.items_of_leaf)} IDs"
    with Phases(DECODING, case.device) as phases:
        phases.watch(decoder.backbone, "forward", "model")
        phases.watch(decoder, "scores", "scores")
        phases.watch(decoder, "expand", "search")

        def batch() -> None:
            with phases.during("data"):
                prompts = [case.form.prompt(case.split.history(int(user), before="test")) for user in users]
            decoder.decode(prompts)

        return shares("decoding batch", shape, batch, phases, runs)


def shares(name: str, shape: str, call: Callable[[], None], phases: Phases, runs: int) -> list[Row]:
    """A row per phase: quantiles over calls of its part of a call's time."""
    taken: list[Mapping[str, float]] = []
    for run in range(WARMUP + runs):
        phases.begin()
        call()
        if run >= WARMUP:
            taken.append(phases.end())
    common: Row = {"name": name, "shape": shape, "metric": "share of the time", "unit": "share", "runs": runs}
    return [
        {**common, "provider": phase, **quantiles([seconds[phase] / sum(seconds.values()) for seconds in taken])}
        for phase in taken[0]
    ]
