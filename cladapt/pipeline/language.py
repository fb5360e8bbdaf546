"""Perplexity of a text file under a run's models: what it started from, what that was made from, and every adapter."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel
from torch import nn

from cladapt.artifacts import hash_file, read_json
from cladapt.errors import DataError
from cladapt.eval.perplexity import Text, Windows, perplexity, windows_of
from cladapt.model.load import PROVENANCE, Base, load_base, load_model
from cladapt.model.saved import ADAPTER_FILE, adapted
from cladapt.pipeline.report import METRICS
from cladapt.run import Run
from cladapt.tokens.tokenizer import sid_token_ids
from cladapt.train.sinks import Sink

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LanguageRecord(BaseModel):
    """What metrics.json must hold of a text, so that a later evaluation can keep it."""

    file: str
    hash: str
    base: str
    adapters: dict[str, str]
    rows: list[dict[str, Any]]


def measure_text(text: Text, base: Base, adapters: Mapping[int, Path], sink: Sink) -> dict[str, Any]:
    """The record of a text in metrics.json: a row per model, and by fingerprints which weights those were."""
    windows = text_windows(text, base)
    rows = [_row("base", base.fitted_block, base.model, windows)]
    for name, model, tokenizer in _sources(base, sink):
        try:
            own = windows_of(text, tokenizer)
        except DataError as error:
            sink.emit({"kind": "note", "text": f"{name} is left out of the perplexities: {error.message}"})
            continue
        rows.append(_row(name, None, model, own))
    for block, folder in adapters.items():
        sink.emit({"kind": "note", "text": f"perplexity of {text.name} with the adapter of block {block}"})
        with adapted(base, folder) as model:
            rows.append(_row("adapter", block, model, windows))
    return {
        "file": text.name,
        "hash": text.fingerprint,
        "base": base.fingerprint,
        "adapters": weights_of(adapters),
        "rows": rows,
    }


def text_windows(text: Text, base: Base) -> Windows:
    """A text in the tokens of a base; `DataError` where it has none, or spells an item's."""
    return windows_of(text, base.tokenizer, sid_token_ids(base.tokenizer, base.sids).tolist())


def weights_of(adapters: Mapping[int, Path]) -> dict[str, str]:
    """The hash of each adapter's weights by its block."""
    return {str(block): hash_file(folder / ADAPTER_FILE) for block, folder in adapters.items()}


def earlier_text(run: Run[Any], base: str, adapters: Mapping[int, Path], sink: Sink) -> dict[str, Any] | None:
    """What an earlier evaluation has measured of a text, while base and adapters are those that it was measured of."""
    file = run.path / METRICS
    try:
        found = read_json(file) if file.is_file() else {}
    except DataError:  # the evaluation that is kept, or not, says that this file is torn
        return None
    record = found.get("text") if isinstance(found, dict) else None
    if record is None:
        return None
    try:
        known = LanguageRecord.model_validate(record)
    except ValueError:
        why = "its record is damaged"
    else:
        now = weights_of(adapters)
        if known.base == base and known.adapters.items() <= now.items():
            return known.model_dump()
        why = f"{known.file} was measured under other weights"
    sink.emit({"kind": "note", "text": f"the perplexities of an earlier evaluation are left out: {why}; see --text"})
    return None


def _row(name: str, block: int | None, model: "PreTrainedModel", windows: Windows) -> dict[str, Any]:
    counts = {
        "tokens": windows.tokens.numel(),
        "bytes": windows.bytes,
        "tokens_left_out": windows.left_out,
        "unknown_tokens": windows.unknown,
    }
    return {"model": name, "block": block, **perplexity(model, windows), **counts}


def _sources(base: Base, sink: Sink) -> "Iterator[tuple[str, PreTrainedModel, Any]]":
    """What a base was made from, and what that was made from, where it is there and still the same."""
    record, seen = base.provenance, set()
    device = next(cast(nn.Module, base.model).parameters()).device
    while (named := record.get("source")) and named not in seen:
        seen.add(named)
        name, path = f"source {named}", Path(named)
        if not path.exists():
            sink.emit({"kind": "note", "text": f"{name} is not there, so its perplexity is not measured"})
            return
        try:
            if (path / PROVENANCE).is_file():
                found = load_base(path, base.model.dtype)
                model, tokenizer, above = found.model, found.tokenizer, dict(found.provenance)
                if record.get("parent_base", found.fingerprint) != found.fingerprint:
                    raise DataError(f"it is the base {found.fingerprint}, not {record['parent_base']}", "")
            else:
                model, tokenizer = load_model(path, base.model.dtype)
                above = {}
        except DataError as error:
            sink.emit({"kind": "note", "text": f"{name} is left out of the perplexities: {error.message}"})
            return
        cast(nn.Module, model).to(device)
        yield name, model, tokenizer
        record = above
