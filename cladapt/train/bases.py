"""A base from scratch: a small causal LM with the tokens of a stream's IDs, trained on block 1."""

from pathlib import Path
from typing import Any, cast

from torch import nn

from cladapt import ranks
from cladapt.config import BaseConfig, PretrainConfig, TuneConfig
from cladapt.data.histories import split_block
from cladapt.data.schema import Stream
from cladapt.model.load import Base, new_model, save_base
from cladapt.model.source import check_reach
from cladapt.ops import compute_device
from cladapt.tokens.prompts import Document
from cladapt.tokens.sids import SidTable
from cladapt.train.loop import FitResult
from cladapt.train.pretrain import pretrain
from cladapt.train.sinks import Sink
from cladapt.train.stream import catalogue_softmax, make_form, training_documents, validation_documents


def make_base(out: Path, stream: Stream, sids: SidTable, config: PretrainConfig, sink: Sink) -> tuple[Base, FitResult]:
    """Train a small model from scratch on block 1 and write it as base+tokens, with the IDs of the items known then.

    It is the same whatever blocks follow.
    """
    stream = stream.prefix(1)
    sids = sids.align(stream.items["item"].to_list())
    model, tokenizer = new_model(config.preset, sids, config.seed, config.tie_embeddings)
    cast(nn.Module, model).to(compute_device())  # before the softmax, which lies beside the head
    base = Base(model, tokenizer, sids, {})
    softmax = catalogue_softmax(base, stream, 1, config.softmax)
    result = pretrain(model, softmax, *first_block(stream, base, "packed", config), config, sink)
    record = {**base_record(stream.fingerprint, config, fitted_block=1), **fitted_form("packed", config)}
    ranks.once(lambda: save_base(out, model, tokenizer, sids, record))
    return base, result


def first_block(stream: Stream, base: Base, form: str, config: BaseConfig) -> tuple[list[Document], list[Document]]:
    """Documents of block 1 to train and to validate on."""
    made = make_form(form, base, config.window, config.row_tokens)
    check_reach(base.model.config, made.reach)
    split = split_block(stream, 1)
    return training_documents(split, made), validation_documents(split, made)


def base_record(stream: str, config: BaseConfig | TuneConfig, fitted_block: int) -> dict[str, Any]:
    """What the `cladapt.json` of a base says of how it was made; `stream`: fingerprint of the blocks it has learned."""
    return {"stream": stream, "fitted_block": fitted_block, "config": config.model_dump(mode="json")}


def fitted_form(form: str, config: BaseConfig | TuneConfig) -> dict[str, Any]:
    """How the histories looked that the ID rows were fitted on; empty where none were."""
    if not config.epochs:
        return {}
    found = {"form": form, "window": config.window, "softmax": config.softmax}
    return found | ({"history": config.history} if isinstance(config, TuneConfig) else {})
