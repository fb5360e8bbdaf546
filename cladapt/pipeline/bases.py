"""Base+tokens directories: from a pretrained causal LM, or from scratch on block 1."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from cladapt.config import BaseConfig
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError
from cladapt.export.targets import refuse_existing
from cladapt.model.load import (
    LEFT_OUT,
    PROVENANCE,
    Base,
    base_provenance,
    check_home,
    extend_model,
    load_base,
    save_base,
)
from cladapt.ops import compute_device
from cladapt.tokens.build import load_sids
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import sid_token_ids
from cladapt.train.bases import base_record, first_block, fitted_form, make_base
from cladapt.train.loop import FitResult
from cladapt.train.pretrain import fit_token_rows
from cladapt.train.sinks import Sink
from cladapt.train.stream import catalogue_softmax


def pretrain_base(data: Path, out: Path, config: BaseConfig, sink: Sink) -> dict[str, Any]:
    """Train a small model from scratch on block 1 and write it as base+tokens."""
    refuse_existing(out)
    stream = Stream.load(data).prefix(1)
    base, result = make_base(out, stream, load_sids(data, stream), config, sink)
    return _report(out, base, result)


def init_base(
    source: str, data: Path, out: Path, form_name: str, config: BaseConfig, sink: Sink, refit: bool = False
) -> dict[str, Any]:
    """Add the ID tokens to a pretrained model, fit their rows on block 1 and bake them in.

    The model itself stays as it was, so block 1 still has to be learned: adapters of this base start there. It has the
    IDs of the items known at block 1, and is the same whatever blocks follow. A source that is a base of the same IDs,
    such as a merged export, keeps its rows, its IDs and what it has learned; `refit` fits all ID rows again.
    """
    refuse_existing(out)
    if form_name not in ("packed", "prompt"):
        raise ConfigError(f"form {form_name!r} is not known", "use packed or prompt")
    whole = Stream.load(data)
    stream = whole.prefix(1)
    sids = load_sids(data, stream)
    base, new = _start(source, sids, whole, config, str(data))
    fitted = new
    if refit:
        fitted = sid_token_ids(base.tokenizer, sids).tolist()
    cast(nn.Module, base.model).to(compute_device())  # before the softmax, which lies beside the head
    result, record = None, dict(base.provenance)
    if config.epochs and fitted:
        known = base.with_sids(sids)
        softmax = catalogue_softmax(known, stream, 1, config.softmax)
        documents = first_block(stream, known, form_name, config)
        model, result = fit_token_rows(base.model, fitted, softmax, *documents, config, sink)
        base = replace(base, model=model)
        record |= fitted_form(form_name, config)
    fitted_block = int(record.get("fitted_block", 0))
    learned = str(record["stream"]) if fitted_block else stream.fingerprint
    record |= {**base_record(learned, config, fitted_block), "source": source, "new_tokens": len(new)}
    save_base(out, base.model, base.tokenizer, base.sids, record)
    left_out = base_provenance(out)[LEFT_OUT]
    return {
        **_report(out, base, result),
        "new_tokens": len(new),
        "fitted_tokens": len(fitted) if result else 0,
        LEFT_OUT: left_out,
    }


def _start(source: str, sids: SidTable, stream: Stream, config: BaseConfig, data: str) -> tuple[Base, list[int]]:
    """The model to begin with, and the ids of the tokens that it did not have."""
    if not (Path(source) / PROVENANCE).is_file():
        model, tokenizer, new = extend_model(source, sids, config.seed)
        return Base(model, tokenizer, sids, {}), new
    base = load_base(Path(source))
    check_home(base, stream, source, data)
    base.with_sids(sids)  # the same tokens must stand for the same items
    return replace(base, provenance={**base.provenance, "parent_base": base.fingerprint}), []


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
