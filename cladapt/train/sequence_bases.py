"""Sequential bases, trained from scratch on block 1, and the figures by which their learning is judged."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from cladapt import ops, ranks
from cladapt.data.schema import Stream
from cladapt.model.geometry import Graphs, conditioning, hessians, norm_dispersion
from cladapt.model.sequence import SequenceLoss, SequenceModel
from cladapt.model.sequence_base import new_model, save_sequence_base
from cladapt.sequential import SequentialBaseConfig, SequentialTrainConfig
from cladapt.tokens.sequences import form_of_backbone
from cladapt.tokens.table import TextMap
from cladapt.train.feeds import Batch, evenly
from cladapt.train.loop import FitResult
from cladapt.train.pretrain import fit_base
from cladapt.train.sequences import SequenceFeed, make_sequence_feed
from cladapt.train.sinks import Fan, Sink

DIAGNOSTICS = "diagnostics"
"""In the `cladapt.json` of a sequential base and of its adapters: the figures of `figures`."""
CURVATURE, TRAINING = 64, 512
"""Validation targets whose Hessians are decomposed, and training examples whose loss is taken, at most."""


def make_sequence_base(out: Path, stream: Stream, config: SequentialBaseConfig, sink: Sink) -> FitResult:
    """Train a sequential model on block 1 and write it as a base directory; it is the same whatever blocks follow.

    Its `cladapt.json` has the mean training loss of every epoch, and `figures`.
    """
    stream, texts = stream.prefix(1), None
    if config.table.source == "llm":
        texts = TextMap.fit(stream, config.table, config.hidden, config.seed)
    model = new_model(config, stream.items, texts).to(ops.compute_device())
    form = form_of_backbone(config, config.mask)
    feed = make_sequence_feed(stream, [1], form, SequentialTrainConfig(batch_sequences=config.batch_sequences))
    graphs = partial(Graphs.of, stream, 1, texts, config.table, config.seed)
    curve = LossCurve()
    loss = SequenceLoss(model, stream.n_items)
    result = fit_base(loss, dict(model.named_parameters()), feed, config, Fan([sink, curve]))
    record = {
        "stream": stream.fingerprint,
        "fitted_block": 1,
        "config": config.model_dump(mode="json"),
        "kept_epoch": result.epoch,
        "valid_log_likelihood": result.score,
        "training_loss": curve.epochs,
        DIAGNOSTICS: figures(loss, feed, graphs()),
    }
    ranks.once(lambda: save_sequence_base(out, model.cpu(), texts, stream, record))
    return result


class LossCurve:
    """A sink that keeps the mean loss of the steps of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self._steps: list[float] = []

    def emit(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "step":
            self._steps.append(event["loss"])
        elif event["kind"] == "epoch":
            self.epochs.append(float(np.mean(self._steps)))
            self._steps.clear()


@torch.no_grad()
def figures(loss: SequenceLoss, feed: SequenceFeed, graphs: Graphs) -> dict[str, float | None]:
    """Of a model as it stands, dropout off.

    training_loss: mean over an evenly spaced part of the training examples. Of the Hessian of the loss with respect to
    the sequence vector, on an evenly spaced part of the validation targets (of the training examples where there are
    none): see `conditioning`. norm_dispersion: of the known items' rows, before normalisation. semantic_overlap,
    collaborative_overlap: see `Graphs`.
    """
    loss.eval()
    model, known = loss.model, loss.known
    batches = feed.sample(min(1.0, TRAINING / len(feed)))
    losses = torch.cat([loss(*_on_device(model, batch)) for batch in batches])
    held_out = feed.held_out or feed.spans
    judged = SequenceFeed([], evenly(held_out, min(1.0, CURVATURE / len(held_out))), feed.form, CURVATURE, feed.items)
    table = model.items(known)
    query = []
    for batch in judged.validation():
        sequence, _, counted = _on_device(model, batch)
        query.append(model.query(model.encode(sequence, table)[counted])[:CURVATURE])
    rows = F.normalize(table, dim=1) if model.normalises else table
    return {
        "training_loss": losses.double().mean().item(),
        **conditioning(hessians(torch.cat(query)[:CURVATURE], rows, model.temperature)),
        "norm_dispersion": norm_dispersion(table),
        **graphs.overlaps(table),
    }


def _on_device(model: SequenceModel, batch: Batch) -> Batch:
    return tuple(tensor.to(model.special.device) for tensor in batch)
