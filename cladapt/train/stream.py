"""A run over a stream: one adapter evolves block after block, and each block leaves an adapter directory."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cladapt import ops, ranks
from cladapt.artifacts import hash_file, read_tensors, write_tensors
from cladapt.config import RunConfig, TrainConfig
from cladapt.data.histories import BlockSplit, split_block
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError
from cladapt.methods import Context, build
from cladapt.model.adapter import (
    adapted_lm,
    adapter_parameters,
    adapter_provenance,
    adapter_tensors,
    create_adapter,
    read_own_factors,
    save_adapter,
    set_adapter_tensors,
    set_history,
    start_from,
)
from cladapt.model.load import Base, trie_softmax
from cladapt.model.packed import PackedLoss, Softmax, TrieSoftmax
from cladapt.tokens.prompts import Document, Form, PackedForm, PromptForm
from cladapt.tokens.trie import Trie
from cladapt.train.checkpoint import clear_checkpoints, load_checkpoint, save_checkpoint
from cladapt.train.loop import Fit, FitResult, FitSettings
from cladapt.train.sinks import Sink

if TYPE_CHECKING:
    from peft import PeftModel


def make_form(form: str, base: Base, window: int, row_tokens: int) -> Form:
    """How histories become tokens for this base: `packed` or `prompt`."""
    tokens = base.item_tokens().numpy()
    if form == "prompt":
        return PromptForm(tokens, base.tokenizer, window=window, row_tokens=row_tokens)
    return PackedForm(tokens, bos=base.bos(), window=window, row_tokens=row_tokens)


def training_documents(split: BlockSplit, form: Form) -> list[Document]:
    """Every training event of the block as a target once."""
    return [d for i in range(len(split.user)) for d in form.documents(*split.training(i))]


def validation_documents(split: BlockSplit, form: Form) -> list[Document]:
    """One document per held-out user: the validation event after its history."""
    held_out = np.flatnonzero(split.held_out)
    documents = []
    for i, target in zip(held_out, split.targets("valid"), strict=True):
        history = split.history(int(i), before="valid")
        documents += form.documents(np.append(history, target), len(history))
    return documents


def catalogue_softmax(base: Base, stream: Stream, block: int, softmax: Softmax) -> TrieSoftmax | None:
    """The softmax over the items known by the end of `block`; None for the one over the vocabulary."""
    if softmax == "vocabulary":
        return None
    return trie_softmax(base, Trie.build(base.sids.codes[stream.catalogue(block)]))


def adapter_folder(run: Path, block: int) -> Path:
    """Where a run keeps the adapter of a block."""
    return run / "adapters" / f"block_{block:03d}"


def fit_settings(config: TrainConfig, seed: int, block: int, kernels: ops.Choice = "auto") -> FitSettings:
    """The loop's settings for one block: later blocks have their own learning-rate factor."""
    return FitSettings(
        lr=config.lr * (config.block_lr_factor if block > 1 else 1.0),
        epochs=config.epochs,
        batch_tokens=config.batch_tokens,
        row_tokens=config.row_tokens,
        seed=seed,
        accumulation=config.accumulation,
        schedule=config.schedule,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        keep=config.keep,
        precision=config.precision,
        fold_terms=ops.uses_kernel("prox_adamw", kernels),
    )


def train_stream(
    run: Path,
    config: RunConfig,
    stream: Stream,
    base: Base,
    sink: Sink,
    config_hash: str,
    provenance: Mapping[str, Any],
) -> dict[int, FitResult]:
    """Adapt to every block that the base has not seen; finished blocks of an interrupted run are taken as they are."""
    method = build(config.method)
    if not method.trains:
        return {}
    model = create_adapter(base, config.adapter, config.seed, method.full_rank, config.kernels)
    initial = adapter_tensors(model)
    if config.from_adapter:
        start_from(model, Path(config.from_adapter), base)
    blocks = blocks_to_learn(stream, learned_block(config, base))
    form = make_form(config.train.form, base, config.train.window, config.train.row_tokens)
    results: dict[int, FitResult] = {}
    checkpoints = run / "checkpoints"

    def note(text: str) -> None:
        sink.emit({"kind": "note", "text": text})

    for block in blocks:
        folder = adapter_folder(run, block)
        if folder.is_dir():
            set_adapter_tensors(model, read_own_factors(folder, base))
            method.load_state_dict(read_tensors(_method_file(run, block)))
            continue
        split = split_block(stream, block)
        earlier = [split_block(stream, b) for b in range(1, block)] if method.past_data else []
        fit = Fit(
            PackedLoss(adapted_lm(model), catalogue_softmax(base, stream, block, config.train.softmax)),
            method,
            Context(adapter_parameters(model), block=block, initial=initial, set_history=partial(set_history, model)),
            [document for each in (*earlier, split) for document in training_documents(each, form)],
            validation_documents(split, form),
            fit_settings(config.train, config.seed, block, config.kernels),
            sink,
        )
        result = fit.run(
            checkpoint=partial(save_checkpoint, checkpoints, block, config_hash),
            checkpoint_steps=config.train.checkpoint_steps,
            resume=ranks.once(partial(load_checkpoint, checkpoints, block, config_hash, note)),
        )
        results[block] = result
        ranks.once(partial(_finish_block, run, block, model, base, method.state_dict(), provenance, result))
        if ranks.is_main():
            sink.emit(
                {
                    "kind": "block",
                    "block": block,
                    "kept_epoch": result.epoch,
                    "valid_log_likelihood": result.score,
                    "steps": result.steps,
                    "tokens": result.tokens,
                    "seconds": result.seconds,
                }
            )
    return results


def learned_block(config: RunConfig, base: Base) -> int:
    """The last block that the base, or the adapter a run starts from, has learned; 0 for none."""
    if not config.from_adapter:
        return base.fitted_block
    return max(base.fitted_block, int(adapter_provenance(Path(config.from_adapter)).get("block", 0)))


def blocks_to_learn(stream: Stream, learned: int) -> Sequence[int]:
    """The blocks after the last one that was learned."""
    blocks = range(learned + 1, stream.n_blocks + 1)
    if not blocks:
        raise ConfigError(
            f"block {learned} is learned already, the stream ends at block {stream.n_blocks}",
            "give a longer stream, or start from a base or adapter that has learned fewer blocks",
        )
    return blocks


def _finish_block(
    run: Path,
    block: int,
    model: "PeftModel",
    base: Base,
    state: Mapping[str, torch.Tensor],
    provenance: Mapping[str, Any],
    result: FitResult,
) -> None:
    write_tensors(_method_file(run, block), state)
    before = adapter_folder(run, block - 1)
    start = provenance.get("from_adapter")
    parent = before if before.is_dir() else Path(start) if start else None
    record = {
        **provenance,
        "block": block,
        "parent": before.name if parent == before else start,
        "parent_hash": hash_file(parent / "adapter_model.safetensors") if parent else None,
        "kept_epoch": result.epoch,
        "valid_log_likelihood": result.score if math.isfinite(result.score) else None,
    }
    save_adapter(adapter_folder(run, block), model, base, record)
    clear_checkpoints(run / "checkpoints", block)


def _method_file(run: Path, block: int) -> Path:
    return run / "method" / f"block_{block:03d}.safetensors"
