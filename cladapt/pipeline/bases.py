"""Base+tokens directories: from a pretrained causal LM, or from scratch on block 1."""

from pathlib import Path
from typing import Any, cast

from torch import nn

from cladapt.config import BaseConfig
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError
from cladapt.export.targets import refuse_existing
from cladapt.model.load import Base, extend_model, save_base
from cladapt.ops import compute_device
from cladapt.tokens.build import load_sids
from cladapt.train.bases import base_record, first_block, make_base
from cladapt.train.loop import FitResult
from cladapt.train.pretrain import fit_token_rows
from cladapt.train.sinks import Sink
from cladapt.train.stream import catalogue_softmax


def pretrain_base(data: Path, out: Path, config: BaseConfig, sink: Sink) -> dict[str, Any]:
    """Train a small model from scratch on block 1 and write it as base+tokens."""
    refuse_existing(out)
    stream = Stream.load(data)
    base, result = make_base(out, stream, load_sids(data, stream), config, sink)
    return _report(out, base, result)


def init_base(source: str, data: Path, out: Path, form_name: str, config: BaseConfig, sink: Sink) -> dict[str, Any]:
    """Add the ID tokens to a pretrained model, fit their rows on block 1 and bake them in.

    The model itself stays as it was, so block 1 still has to be learned: adapters of this base start there.
    """
    refuse_existing(out)
    if form_name not in ("packed", "prompt"):
        raise ConfigError(f"form {form_name!r} is not known", "use packed or prompt")
    stream = Stream.load(data)
    sids = load_sids(data, stream)
    model, tokenizer, new = extend_model(source, sids, config.seed)
    cast(nn.Module, model).to(compute_device())  # before the softmax, which lies beside the head
    base = Base(model, tokenizer, sids, {})
    result = None
    if config.epochs:
        softmax = catalogue_softmax(base, stream, 1, config.softmax)
        documents = first_block(stream, base, form_name, config)
        model, result = fit_token_rows(model, new, softmax, *documents, config, sink)
    record = {**base_record(stream, config, fitted_block=0), "source": source, "new_tokens": len(new)}
    save_base(out, model, tokenizer, sids, record)
    return {**_report(out, base, result), "new_tokens": len(new)}


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
