"""Base directories: base+tokens from a pretrained causal LM or from scratch on block 1, and sequential ones."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from cladapt.artifacts import hash_value
from cladapt.config import InitConfig, PretrainConfig, StartConfig, TuneConfig
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError, DataError
from cladapt.export.targets import refuse_existing
from cladapt.lock import locked
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
from cladapt.model.rows import start_by_meaning, untie
from cladapt.model.sequence_base import load_sequence_base
from cladapt.model.weights import weights_hash
from cladapt.ops import compute_device, precision
from cladapt.sequential import SequentialBaseConfig
from cladapt.tokens.build import load_sids
from cladapt.tokens.sids import SidTable
from cladapt.tokens.tokenizer import sid_token_ids
from cladapt.train.bases import base_record, first_block, fitted_form, make_base
from cladapt.train.checkpoint import clear_checkpoints, load_checkpoint, save_checkpoint
from cladapt.train.loop import FitResult, Snapshot
from cladapt.train.pretrain import fit_token_rows
from cladapt.train.sequence_bases import DIAGNOSTICS, make_sequence_base
from cladapt.train.sinks import Sink
from cladapt.train.stream import catalogue_softmax
from cladapt.train.tune import Lesson, lesson, tune

UNFINISHED = ".unfinished"
"""What the name of a base that is being tuned has more, for the folder of its checkpoints."""


@dataclass(frozen=True)
class Start:
    """What was made of a source before anything was learned.

    `rows_by_meaning`: rows of new ID tokens that start at the words of their items; `head_bytes`: what a head of its
    own adds to the weights.
    """

    new_tokens: int
    rows_by_meaning: int
    head_bytes: int


def pretrain_base(data: Path, out: Path, config: PretrainConfig, sink: Sink) -> dict[str, Any]:
    """Train a small model from scratch on block 1 and write it as base+tokens."""
    refuse_existing(out)
    stream = Stream.load(data).prefix(1)
    base, result = make_base(out, stream, load_sids(data, stream), config, sink)
    return _report(out, base, result)


def sequential_base(data: Path, out: Path, config: SequentialBaseConfig, sink: Sink) -> dict[str, Any]:
    """Train a sequential model from scratch on block 1 and write it as a base of `train --task sequential`."""
    refuse_existing(out)
    config.refuse_unread()
    config.table.refuse_unread()
    result = make_sequence_base(out, Stream.load(data), config, sink)
    base = load_sequence_base(out)
    return {
        "base": str(out),
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "items": len(base.sequence.items),
        "kept_epoch": result.epoch,
        "valid_log_likelihood": result.score,
        "seconds": round(result.seconds, 1),
        DIAGNOSTICS: base.provenance[DIAGNOSTICS],
    }


def init_base(
    source: str, data: Path, out: Path, form_name: str, config: InitConfig, sink: Sink, refit: bool = False
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
    base, new, start = _start(source, sids, whole, config, config.seed, str(data))
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
    record |= {**base_record(learned, config, fitted_block), "source": source, **asdict(start)}
    refuse_existing(out)  # what came there meanwhile stays
    save_base(out, base.model, base.tokenizer, base.sids, record)
    left_out = base_provenance(out)[LEFT_OUT]
    return {
        **_report(out, base, result),
        **asdict(start),
        "fitted_tokens": len(fitted) if result else 0,
        LEFT_OUT: left_out,
    }


def tune_base(source: str, data: Path, out: Path, config: TuneConfig, sink: Sink) -> dict[str, Any]:
    """Fit a pretrained model on block 1, on the next item and on what aligns its words with IDs, as base+tokens.

    `source`: a base of `init_base`, or what that takes. A command that was stopped goes on from its last checkpoint, in
    a folder beside `out`, when it is given again with the same settings.
    """
    refuse_existing(out)
    config = config.model_copy(update={"precision": precision(config.precision)})  # the one that resuming goes on with
    whole = Stream.load(data)
    stream = whole.prefix(1)
    sids = load_sids(data, stream)
    base, _, start = _start(source, sids, whole, config, config.seed, str(data))
    known = base.with_sids(sids)
    learned = lesson(known, stream, config)
    feed = learned.feed(config)
    settings = config.model_dump(mode="json", exclude={"checkpoint_steps", "checkpointing"})
    identity = hash_value([settings, weights_hash(base.model), sids.fingerprint, stream.fingerprint])
    cast(nn.Module, base.model).to(compute_device())  # before the softmax, which lies beside the head
    softmax = catalogue_softmax(known, stream, 1, config.softmax)
    work = out.with_name(out.name + UNFINISHED)
    with locked(work):
        refuse_existing(out)  # another command may have written it before this one had the lock
        resume = _unfinished(work, identity, sink)
        keep = partial(save_checkpoint, work, 1, identity, again="the same command again")
        model, result = tune(known, softmax, feed, config, sink, keep, resume)
        record: dict[str, Any] = {**base.provenance, **fitted_form(config.form, config), **feed.record}
        fitted_block = max(1, int(record.get("fitted_block", 0)))
        home = str(record["stream"]) if record.get("fitted_block") else stream.fingerprint
        record |= {**base_record(home, config, fitted_block), "source": source, **asdict(start)}
        refuse_existing(out)
        save_base(out, model, base.tokenizer, base.sids, record)
        clear_checkpoints(work, 1)
    with suppress(OSError):  # what is not of this command stays
        work.rmdir()
    if result.score < result.start_score:
        warnings.warn(
            f"{out}: tuning has left the validation log-likelihood at {result.score:.4f}, it began at "
            f"{result.start_score:.4f}: lower lr, or give the sequence task more weight",
            stacklevel=2,
        )
    return {
        **_report(out, replace(base, model=model), result),
        "start_log_likelihood": result.start_score,
        **asdict(start),
        "tasks": _tasks(learned),
        "cut_texts": learned.cut_texts,
        **feed.record,
        LEFT_OUT: base_provenance(out)[LEFT_OUT],
    }


def _unfinished(work: Path, identity: str, sink: Sink) -> Snapshot | None:
    """The last checkpoint of the same work, or None."""
    try:
        return load_checkpoint(work, 1, identity, lambda text: sink.emit({"kind": "note", "text": text}))
    except DataError as error:
        raise DataError(
            error.message, f"give the source, the stream and the settings it began with, or remove {work} to begin anew"
        ) from error


def _tasks(learned: Lesson) -> list[dict[str, Any]]:
    return [
        {"task": name, "documents": len(documents), "weight": weight}
        for name, (documents, weight) in learned.tasks.items()
    ]


def _start(
    source: str, sids: SidTable, stream: Stream, config: StartConfig, seed: int, data: str
) -> tuple[Base, list[int], Start]:
    """The model to begin with, the ids of the tokens that it did not have, and what was made of it."""
    new: Sequence[int] = []
    meant = 0
    if (Path(source) / PROVENANCE).is_file():
        if config.weights == "random":
            raise ConfigError(
                f"weights=random: {source} is a base with ID tokens, whose rows would be lost with its weights",
                "give the checkpoint that the base was made from",
            )
        base = load_base(Path(source))
        check_home(base, stream, source, data)
        base.with_sids(sids)  # the same tokens must stand for the same items
        base = replace(base, provenance={**base.provenance, "parent_base": base.fingerprint})
    else:
        model, tokenizer, new = extend_model(source, sids, seed, config.weights)
        if taken := sorted({*sids.tokens} - {*tokenizer.convert_ids_to_tokens(list(new))}):
            warnings.warn(
                f"{source} has {len(taken)} of the {len(sids.tokens)} ID tokens already, the first {taken[0]}: their "
                "rows stay what the source has made of them; `base init --refit` fits them too",
                stacklevel=2,
            )
        if config.rows == "meaning":
            meant = start_by_meaning(model, tokenizer, sids, stream.prefix(1).items["text"].to_list(), new)
        base = Base(model, tokenizer, sids, {})
    added = untie(base.model) if config.untie else 0
    return base, list(new), Start(len(new), meant, added)


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
