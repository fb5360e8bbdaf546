"""A run block after block: one adapter evolves, and each block leaves an adapter directory.

What a block's examples and loss are is the workload's.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cladapt import ops, ranks
from cladapt.artifacts import hash_file, read_tensors, write_tensors
from cladapt.config import LearningConfig, RunSettings
from cladapt.errors import ExampleWarning
from cladapt.methods import Context, build
from cladapt.model.adapter import AdaptedBase, adapter_parameters, create_adapter
from cladapt.model.observe import Observable
from cladapt.model.saved import (
    ADAPTER_FILE,
    LEARNED,
    adapter_provenance,
    place,
    read_adapter,
    read_own_factors,
    save_adapter,
    start_from,
)
from cladapt.model.sharding import is_cut, shard_base
from cladapt.model.spectrum import saved_spectra, summary
from cladapt.train.checkpoint import clear_checkpoints, load_checkpoint, save_checkpoint
from cladapt.train.feeds import Feed
from cladapt.train.interference import INTERFERENCE, factors_of, interference, past_blocks
from cladapt.train.loop import Fit, FitResult, FitSettings
from cladapt.train.sinks import Sink

if TYPE_CHECKING:
    from peft import PeftModel

Examples = Callable[["PeftModel", Sequence[int]], tuple[nn.Module, Feed]]
"""The loss module of an adapted model and the examples of some blocks: the last is learned, those before it again."""

Provenance = Callable[[int], Mapping[str, Any]]
"""What the `cladapt.json` of a block's adapter says of the run."""


def adapter_folder(run: Path, block: int) -> Path:
    """Where a run keeps the adapter of a block."""
    return run / "adapters" / f"block_{block:03d}"


def fit_settings(config: LearningConfig, seed: int, block: int) -> FitSettings:
    """The loop's settings for one block: later blocks have their own learning-rate factor."""
    return FitSettings(
        lr=config.lr_of(block),
        epochs=config.epochs,
        seed=seed,
        accumulation=config.accumulation,
        schedule=config.schedule,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        keep=config.keep,
        precision=ops.precision(config.precision),
        checkpointing=config.checkpointing,
    )


def learn_blocks(
    run: Path,
    config: RunSettings,
    base: AdaptedBase,
    blocks: Sequence[int],
    examples: Examples,
    sink: Sink,
    config_hash: str,
    provenance: Provenance,
    start: Path | None = None,
) -> dict[int, FitResult]:
    """Adapt to the blocks in order, from the adapter `start` on; finished ones of an interrupted run stay as they are.

    A method that learns on past data has every block from the first one on; one that does not train leaves nothing.
    """
    method = build(config.method)
    if not method.trains:
        return {}
    model = create_adapter(base, config.adapter, config.seed, method.parameters, config.kernels, method.flattens)
    if getattr(config, "sharding", "none") == "full":
        shard_base(model, ops.compute_device())
    initial = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    if start is not None:
        start_from(model, start, base)
    results: dict[int, FitResult] = {}
    checkpoints = run / "checkpoints"

    def note(text: str) -> None:
        sink.emit({"kind": "note", "text": text})

    for block in blocks:
        folder = adapter_folder(run, block)
        if folder.is_dir():
            place(model, base, read_own_factors(folder, base))
            method.load_state_dict(read_tensors(_method_file(run, block)))
            continue
        for parameter in base.extra_parameters.values():
            parameter.requires_grad_(True)
        module, feed = examples(model, method.learned_with(block))
        ctx = replace(Context.of(model, block, initial, config.kernels), extra_parameters=base.extra_parameters)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        fit = Fit(module, method, ctx, feed, fit_settings(config.train, config.seed, block), sink)
        last = adapter_folder(run, block - 1)  # which has its history, a model that is taken up again has not yet
        before = read_adapter(last, base) if last.is_dir() else factors_of(model)
        result = results[block] = fit.run(
            checkpoint=partial(save_checkpoint, checkpoints, block, config_hash),
            checkpoint_steps=config.train.checkpoint_steps,
            resume=ranks.once(partial(load_checkpoint, checkpoints, block, config_hash, note)),
        )
        base.settle()
        figures = module.end() if isinstance(module, Observable) else {}
        state, record = method.state_dict(), {**provenance(block), **feed.record, **figures}
        if (past := past_blocks(block)) and not any(map(is_cut, model.parameters())):
            with warnings.catch_warnings():  # it was said when they were learned
                warnings.simplefilter("ignore", ExampleWarning)
                look = fit.look.at(*examples(model, past))
            record[INTERFERENCE] = interference(model, before, look)
        ranks.once(partial(_finish_block, run, block, model, base, state, record, start, result))
        if ranks.is_main():
            spectra = saved_spectra(folder)
            modules = {name: spectrum.values for name, spectrum in spectra.items()}
            sink.emit({"kind": "spectrum", "block": block, **summary(spectra), "modules": modules})
            sink.emit(
                {
                    "kind": "block",
                    "block": block,
                    "kept_epoch": result.epoch,
                    "valid_log_likelihood": result.score,
                    "steps": result.steps,
                    feed.unit: result.used,
                    "seconds": result.seconds,
                    **feed.record,
                    **figures,
                    **result.log,
                    **({"peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}),
                }
            )
    return results


def _finish_block(
    run: Path,
    block: int,
    model: "PeftModel",
    base: AdaptedBase,
    state: Mapping[str, torch.Tensor],
    provenance: Mapping[str, Any],
    start: Path | None,
    result: FitResult,
) -> None:
    write_tensors(_method_file(run, block), state)
    before = adapter_folder(run, block - 1)
    parent = before if before.is_dir() else start
    record = {
        **provenance,
        "block": block,
        "parent": before.name if parent == before else parent and str(parent),
        "parent_hash": hash_file(parent / ADAPTER_FILE) if parent else None,
        "kept_epoch": result.epoch,
        "valid_log_likelihood": result.score if math.isfinite(result.score) else None,
    }
    learned = {*record.get(LEARNED, ()), *(adapter_provenance(parent).get(LEARNED, ()) if parent else ())}
    if learned:
        record[LEARNED] = sorted(learned)
    save_adapter(adapter_folder(run, block), model, base, record)
    clear_checkpoints(run / "checkpoints", block)


def _method_file(run: Path, block: int) -> Path:
    return run / "method" / f"block_{block:03d}.safetensors"
