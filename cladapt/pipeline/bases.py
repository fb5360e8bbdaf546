"""Base+tokens directories: from a pretrained causal LM, or from scratch on block 1."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from cladapt import ranks
from cladapt.config import BaseConfig
from cladapt.data.histories import split_block
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.export.targets import refuse_existing
from cladapt.model.load import (
    LEFT_OUT,
    PROVENANCE,
    Base,
    base_provenance,
    extend_model,
    new_model,
    reuse_base,
    save_base,
)
from cladapt.ops import compute_device
from cladapt.pipeline.streams import load_sids
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import sid_token_ids
from cladapt.train.loop import FitResult
from cladapt.train.pretrain import fit_token_rows, pretrain
from cladapt.train.sinks import Sink
from cladapt.train.stream import catalogue_softmax, make_form, training_documents, validation_documents


def pretrain_base(data: Path, out: Path, config: BaseConfig, sink: Sink) -> dict[str, Any]:
    """Train a small model from scratch on block 1 and write it as base+tokens."""
    refuse_existing(out)
    stream = Stream.load(data)
    sids = load_sids(data, stream)
    model, tokenizer = new_model(config.preset, sids, config.seed, config.tie_embeddings)
    cast(nn.Module, model).to(compute_device())  # before the softmax, which lies beside the head
    base = Base(model, tokenizer, sids, {})
    form = make_form("packed", base, config.window, config.row_tokens)
    split = split_block(stream, 1)
    softmax = catalogue_softmax(base, stream, 1, config.softmax)
    documents = training_documents(split, form), validation_documents(split, form)
    result = pretrain(model, softmax, *documents, config, sink)
    record = {**_provenance(stream, config, fitted_block=1), **(_fitted("packed", config) if config.epochs else {})}
    ranks.once(lambda: save_base(out, model, tokenizer, sids, record))
    return _report(out, base, result)


def init_base(
    source: str, data: Path, out: Path, form_name: str, config: BaseConfig, sink: Sink, refit: bool = False
) -> dict[str, Any]:
    """Add the ID tokens to a pretrained model, fit their rows on block 1 and bake them in.

    The model itself stays as it was, so block 1 still has to be learned: adapters of this base start there. A source
    that is a base of the same IDs, such as a merged export, keeps its rows and what it has learned; `refit` fits all
    ID rows again.
    """
    refuse_existing(out)
    if form_name not in ("packed", "prompt"):
        raise ConfigError(f"form {form_name!r} is not known", "use packed or prompt")
    stream = Stream.load(data)
    sids = load_sids(data, stream)
    base, new = _start(source, sids, stream, config)
    fitted = new
    if refit:
        fitted = sid_token_ids(base.tokenizer, sids).tolist()
    cast(nn.Module, base.model).to(compute_device())  # before the softmax, which lies beside the head
    result, record = None, dict(base.provenance)
    if config.epochs and fitted:
        form = make_form(form_name, base, config.window, config.row_tokens)
        split = split_block(stream, 1)
        softmax = catalogue_softmax(base, stream, 1, config.softmax)
        documents = training_documents(split, form), validation_documents(split, form)
        model, result = fit_token_rows(base.model, fitted, softmax, *documents, config, sink)
        base = replace(base, model=model)
        record |= _fitted(form_name, config)
    learned = _provenance(stream, config, int(record.get("fitted_block", 0)))
    record |= {**learned, "source": source, "new_tokens": len(new)}
    save_base(out, base.model, base.tokenizer, sids, record)
    left_out = base_provenance(out)[LEFT_OUT]
    return {**_report(out, base, result), "new_tokens": len(new), "fitted_tokens": len(fitted), LEFT_OUT: left_out}


def _start(source: str, sids: SidTable, stream: Stream, config: BaseConfig) -> tuple[Base, list[int]]:
    """The model to begin with, and the ids of the tokens that it did not have."""
    if not (Path(source) / PROVENANCE).is_file():
        model, tokenizer, new = extend_model(source, sids, config.seed)
        return Base(model, tokenizer, sids, {}), new
    base = reuse_base(Path(source), sids)
    if base.fitted_block and base.provenance.get("stream") != stream.fingerprint:
        raise DataError(
            f"{source} has learned up to block {base.fitted_block} of the stream {base.provenance.get('stream')}, "
            f"this is the stream {stream.fingerprint}",
            "use the stream that it has learned, so that no test event is in its training data",
        )
    return replace(base, provenance={**base.provenance, "parent_base": base.fingerprint}), []


def _fitted(form: str, config: BaseConfig) -> dict[str, Any]:
    """How the histories looked that the ID rows were fitted on."""
    return {"form": form, "window": config.window, "softmax": config.softmax}


def _provenance(stream: Stream, config: BaseConfig, fitted_block: int) -> dict[str, Any]:
    return {"stream": stream.fingerprint, "fitted_block": fitted_block, "config": config.model_dump(mode="json")}


def _report(out: Path, base: Base, result: FitResult | None) -> dict[str, Any]:
    report: dict[str, Any] = {
        "base": str(out),
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "vocabulary": len(base.tokenizer),
    }
    if result is not None:
        report |= {
            "kept_epoch": result.epoch,
            "valid_log_likelihood": result.score,
            "seconds": round(result.seconds, 1),
        }
    return report
