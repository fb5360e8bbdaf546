"""What leaves the tool: merged checkpoints, serving adapters, recommendations."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import polars as pl
from torch import nn

from cladapt import ranks
from cladapt.artifacts import atomic_path, check_writable, hash_file, read_json, read_record
from cladapt.config import EvalConfig
from cladapt.data.schema import MANIFEST, Stream
from cladapt.errors import ConfigError, DataError
from cladapt.eval.recommend import SUFFIXES, read_catalogue, read_histories
from cladapt.eval.recommend import recommend as recommend_items
from cladapt.eval.sequences import recommend_by_rows
from cladapt.export.card import CARD, Facts, facts_of
from cladapt.export.catalogue import CATALOGUE, SIDS, Offered, chosen, offered_items
from cladapt.export.compress import compressed
from cladapt.export.preflight import RULES as SERVERS
from cladapt.export.preflight import refuse
from cladapt.export.targets import export as export_to
from cladapt.export.vllm import check as check_vllm
from cladapt.model.adapter import adapted_lm
from cladapt.model.load import PROVENANCE, Base, load_base
from cladapt.model.saved import (
    ADAPTER_FILE,
    CONFIG_FILE,
    adapter_provenance,
    adapter_settings,
    ids_version,
    load_adapter,
    read_alone,
    read_by,
)
from cladapt.model.sequence import SequenceModel
from cladapt.model.sequence_base import load_sequence_base
from cladapt.ops import compute_device
from cladapt.pipeline.promote import current_block, read_current
from cladapt.pipeline.report import METRICS
from cladapt.run import Run, latest_run, open_run
from cladapt.tokens.build import load_sids
from cladapt.tokens.sequences import form_of_backbone
from cladapt.train.prompting import names_by_text, recorded_form
from cladapt.workloads._base import MetricsRecord


@dataclass(frozen=True)
class Source:
    """An adapter and the base it belongs to."""

    adapter: Path
    base: Path
    run: Run[Any] | None

    @property
    def language(self) -> bool:
        """Whether its base is a language model, and no sequential one."""
        return "items" not in adapter_provenance(self.adapter)


@dataclass(frozen=True)
class Request:
    """What is to be recommended: to which users, from which items, how many, and in which way.

    Attributes:
        histories: the items of each user, oldest first.
        listed: the items to choose from, those of the file `catalogue`; None: all that are offered.
        beams: the width of the search, as asked for; None: that of the evaluation.
    """

    histories: Mapping[str, Sequence[str]]
    listed: list[str] | None
    catalogue: Path | None
    top_k: int
    beams: int | None
    exclude_seen: bool


def find_source(path: Path | None, base: Path | None, block: int | None) -> Source:
    """The adapter that a run, an adapter directory or the latest run stands for.

    Of a run that of `block`, else the current one, else that of the last block.
    """
    if path is not None and (path / CONFIG_FILE).is_file():
        if block is not None:
            raise ConfigError(f"--block {block} with an adapter directory", "name its run directory instead")
        run = _run_of(path)
        if base is None and run is None:
            raise ConfigError(f"{path} does not say where its base is", "give --base DIR")
        return Source(path, base or Path(run.config.base), run)  # type: ignore[union-attr]
    run = _ranking(latest_run() if path is None else path)
    chosen = run.choose(_served(run) if block is None else block)
    return Source(run.adapters[chosen], base or Path(run.config.base), run)


def _ranking(path: Path) -> Run[Any]:
    """A run whose models rank items for histories."""
    run = open_run(path)
    if not run.workload.recommends:
        raise ConfigError(f"{path} is a run of --task {run.task}", "this works for runs that recommend items")
    return run


def _served(run: Run[Any]) -> int | None:
    """The block of the current adapter; None where none was judged yet, `DataError` where none was promoted."""
    current = current_block(run)
    if current is None and (history := read_current(run).history):
        raise DataError(
            f"no adapter of {run.path} is current: that of block {history[-1].block} was {history[-1].action}",
            f"name one with --block, or promote it: cladapt promote {run.path} --promote always",
        )
    return current


def _run_of(adapter: Path) -> Run[Any] | None:
    folder = adapter.resolve().parent.parent
    return _ranking(folder) if (folder / "config.json").is_file() and (folder / "adapters").is_dir() else None


def offered_of(source: Source, data: Path | None = None) -> Offered | None:
    """The IDs and the catalogue as of the newest block of the stream that an adapter has learned, by its own version.

    That is the run's stream, or `data` where it is given. An export outside a run brings them along; None for one of
    before it did.
    """
    if data is None and source.run is None:
        return Offered.load(source.adapter)
    folder, stream = _stream_of(source, data)
    names = names_by_text(adapter_provenance(source.adapter))
    return Offered.of(stream, load_sids(folder, stream, ids_version(source.adapter)), names)


def _stream_of(source: Source, data: Path | None) -> tuple[Path, Stream]:
    """The stream directory that an adapter has learned, its run's or `data`, and what is in it now."""
    if data is None and source.run is None:
        raise ConfigError(f"{source.adapter} does not say where its stream is", "give --data DIR")
    folder = data or Path(source.run.config.data)  # type: ignore[union-attr]
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} is not a stream directory", "say where the stream is now: --data DIR")
    stream = Stream.load(folder)
    learned = adapter_provenance(source.adapter).get("stream")
    if stream.home_of(learned) is None:
        raise DataError(
            f"{source.adapter} has learned the stream {learned}, {folder} is the stream {stream.fingerprint}",
            "name the stream that it has learned: --data DIR",
        )
    return folder, stream


def export(
    path: Path | None,
    target: str,
    out: Path | None,
    base: Path | None,
    block: int | None,
    all_blocks: bool = False,
    rank: int | None = None,
    data: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Export an adapter; by default the latest run's current one, or its last, into `<run>/export/<target>`.

    The IDs of the whole stream and the items that may be recommended now go with it; `data`: where the stream is.
    `all_blocks`: the adapter of every block of the run, for a target that holds several. `rank`: each cut to it, see
    `compressed`; the result states what was lost. `overwrite`: an earlier export may be replaced.
    """
    if all_blocks and target != "vllm":
        raise ConfigError(f"--all-blocks with --target {target}", "only --target vllm holds several adapters")
    sources = _sources(path, base, block, all_blocks)
    last = sources[-1]
    if out is None:
        if last.run is None:
            raise ConfigError("export of an adapter directory outside a run needs a place", "give --out DIR")
        out = last.run.path / "export" / target
    if all_blocks:  # no block is written unless all can be
        for source in sources:
            refuse(str(source.adapter), [f for f in check_vllm(source.adapter, source.base) if f.server == "vllm"])
    facts = facts_of(last.run, adapter_provenance(last.adapter).get("stream"), data)
    of_version = {ids_version(source.adapter): source for source in sources}
    offered = {version: offered_of(source, data) for version, source in of_version.items()}
    results = [
        _export_one(target, source, out, facts, offered[ids_version(source.adapter)], rank, overwrite)
        for source in sources
    ]
    return results[0] if not all_blocks else {**results[-1], "block": [result["block"] for result in results]}


def _export_one(
    target: str, source: Source, out: Path, facts: Facts, offered: Offered | None, rank: int | None, replace: bool
) -> dict[str, Any]:
    found = {} if offered is None else {"offered_items": len(offered.items), "ids": offered.sids.version}
    if rank is None:
        return {**export_to(target, source.adapter, source.base, out, facts, offered, replace), **found}
    with compressed(source.adapter, source.base, rank) as (adapter, lost):
        return {**export_to(target, adapter, source.base, out, facts, offered, replace), **found, "compressed": lost}


def is_exported(source: Source, target: str, out: Path, offered: Offered | None) -> bool:
    """Whether `out` holds this export as it would be written now; of a serving folder that is not known."""
    if target not in ("peft", "merged") or not all((out / name).is_file() for name in (PROVENANCE, CARD)):
        return False
    record, there = read_json(out / PROVENANCE), Offered.load(out)
    made_of = record.get("merged", {}) if target == "merged" else record
    if target == "peft" and adapter_settings(out)["base_model_name_or_path"] != str(source.base.resolve()):
        return False
    if made_of.get("weights") != hash_file(source.adapter / ADAPTER_FILE) or (there is None) != (offered is None):
        return False
    return there is None or offered is None or there.same(offered)


def check(path: Path | None, base: Path | None, block: int | None, all_blocks: bool = False) -> dict[str, Any]:
    """What vLLM and llama.cpp would mind about an export to `vllm`; nothing is written."""
    rows: list[dict[str, Any]] = []
    for source in _sources(path, base, block, all_blocks):
        rows += [{"adapter": source.adapter.name, **f.row()} for f in check_vllm(source.adapter, source.base)]
    refused = {row["server"] for row in rows if row["level"] == "error"}
    return {**{server: server not in refused for server in SERVERS}, "findings": rows}


def _sources(path: Path | None, base: Path | None, block: int | None, all_blocks: bool) -> list[Source]:
    source = find_source(path, base, block)
    if not source.language:
        raise ConfigError(
            f"{source.adapter} is of --task sequential: servers of language models cannot take it",
            "write its recommendations to a file with `cladapt recommend`",
        )
    if not all_blocks:
        return [source]
    if block is not None:
        raise ConfigError(f"--all-blocks with --block {block}", "give one of them")
    if source.run is None or (path is not None and (path / CONFIG_FILE).is_file()):
        raise ConfigError("--all-blocks with an adapter directory", "name its run directory instead")
    return [Source(adapter, source.base, source.run) for adapter in source.run.adapters.values()]


def recommend(
    histories: Path,
    out: Path,
    path: Path | None,
    base_folder: Path | None,
    block: int | None,
    top_k: int,
    beams: int | None,
    catalogue: Path | None,
    exclude_seen: bool,
    overwrite: bool = False,
    user: str = "user",
    item: str = "item",
    timestamp: str = "timestamp",
    data: Path | None = None,
) -> dict[str, Any]:
    """Write the best items for each history to `out`, of a language model or a sequential one; returns the counts.

    The items are those that may be recommended now (see `offered_of`), of the file `catalogue` where it is given;
    withdrawn ones never. `beams` None: those of the evaluation, or `top_k` where that is more; a sequential model has
    none. `user`, `item` and `timestamp` name the columns of the histories.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: unknown kind of file {out.suffix!r}", f"use one of {', '.join(SUFFIXES)}")
    if os.path.realpath(out) == os.path.realpath(histories):
        raise ConfigError(f"--out {out} is the file of the histories", "name another file")
    ranks.once(lambda: _check_out(out, overwrite))
    wanted = read_histories(histories, user, item, timestamp)
    listed = None if catalogue is None else read_catalogue(catalogue)
    source = find_source(path, base_folder, block)
    by = _by_ids if source.language else _by_rows
    frame, counts = by(source, data, Request(wanted, listed, catalogue, top_k, beams, exclude_seen))
    if out.suffix == ".csv":
        frame, counts["escaped_cells"] = escaped(frame)
    ranks.once(lambda: _write_table(out, frame))
    return {"out": str(out), "adapter": str(source.adapter), **counts}


def _by_ids(source: Source, data: Path | None, request: Request) -> tuple[pl.DataFrame, dict[str, Any]]:
    """What a language model recommends: semantic IDs that it generates, and the items behind them."""
    record = adapter_provenance(source.adapter)
    width = _width(source, record, request.top_k, request.beams)
    base = load_base(source.base)
    cast(nn.Module, base.model).to(compute_device())
    lacking = {"form", "window", "softmax"} - set(record)
    if lacking:
        raise DataError(f"{source.adapter / PROVENANCE} lacks {', '.join(sorted(lacking))}", "export the adapter again")
    model = load_adapter(base, source.adapter)
    offered = _offered(source, data)
    base, allowed, withdrawn = _catalogue(offered, base, source.adapter, request)
    form = recorded_form(record, base, None if offered is None else offered.texts)
    frame, counts = recommend_items(
        adapted_lm(model),
        base,
        form,
        record["softmax"],
        request.histories,
        allowed,
        request.top_k,
        width,
        request.exclude_seen,
    )
    return frame, {"beams": width, **counts, "withdrawn_catalogue_items": withdrawn}


def _by_rows(source: Source, data: Path | None, request: Request) -> tuple[pl.DataFrame, dict[str, Any]]:
    """What a sequential model recommends: the items of the stream with the best scores."""
    if request.beams is not None:
        raise ConfigError(
            f"--beams {request.beams} with {source.adapter} of --task sequential, which scores every item",
            "leave --beams out",
        )
    stream, base = _stream_of(source, data)[1], load_sequence_base(source.base)
    base.extend(stream)
    cast(nn.Module, base.model).to(compute_device())
    model = load_adapter(base, source.adapter)
    items = stream.items["item"].to_list()
    allowed, withdrawn = chosen(offered_items(stream), items, request.listed)
    _refuse_none(allowed, withdrawn, request.catalogue)
    form = form_of_backbone(base.config, base.config.mask)
    lm = cast(SequenceModel, adapted_lm(model))
    frame, counts = recommend_by_rows(lm, form, items, request.histories, allowed, request.top_k, request.exclude_seen)
    return frame, {**counts, "withdrawn_catalogue_items": withdrawn}


def _offered(source: Source, data: Path | None) -> Offered | None:
    """As `offered_of`, with a warning where an export has none."""
    offered = offered_of(source, data)
    if offered is None:
        warnings.warn(
            f"{source.adapter} has no {SIDS} and no {CATALOGUE}: items and IDs are those of its base, withdrawn and "
            "new items are not known; export the adapter again, or name the stream with --data DIR",
            stacklevel=3,
        )
    return offered


def _catalogue(
    offered: Offered | None, base: Base, adapter: Path, request: Request
) -> tuple[Base, list[str] | None, int]:
    """The base with the stream's IDs, the items to recommend, and how many listed ones are withdrawn."""
    if offered is None:
        return read_alone(base, adapter), request.listed, 0
    allowed, withdrawn = offered.chosen(request.listed)
    _refuse_none(allowed, withdrawn, request.catalogue)
    return read_by(base, offered.sids, adapter), allowed, withdrawn


def _refuse_none(allowed: Sequence[str], withdrawn: int, file: Path | None) -> None:
    if not allowed:
        raise DataError(f"all {withdrawn} items of {file} are withdrawn", "list items that are offered")


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder", "name a file")
    if os.path.lexists(out) and not overwrite:
        raise ConfigError(f"--out {out} exists", "choose another --out, or give --overwrite")
    check_writable(out)


def _width(source: Source, record: Mapping[str, Any], top_k: int, asked: int | None) -> int:
    """The beam width: never below that of the evaluation, so that what was measured is what is recommended."""
    evaluated = record.get("beams") or (source.run.config.eval if source.run else EvalConfig()).beams
    if source.run and (file := source.run.path / METRICS).is_file():  # it may have been wider than the run asked for
        metrics = read_record(file, MetricsRecord, f"cladapt eval {source.run.path}")
        evaluated = max(evaluated, int(metrics["config"].get("beams", evaluated)))
    if asked is not None and asked < evaluated:
        raise ConfigError(
            f"--beams {asked} is below the {evaluated} of the evaluation: its figures would not hold",
            f"give --beams {evaluated} or more, or leave it out",
        )
    return max(evaluated, top_k) if asked is None else asked


def escaped(frame: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """The texts of a csv with `'` before those that a spreadsheet takes for a formula, and how many those are.

    Such texts begin with = + - @ or a control character and are no plain number.
    """
    columns = [name for name, dtype in frame.schema.items() if dtype == pl.String]
    formula = {
        name: pl.col(name).str.contains(r"^[=+\-@\t\r\n]") & pl.col(name).cast(pl.Float64, strict=False).is_null()
        for name in columns
    }
    count = sum(frame.select(**{name: test.sum() for name, test in formula.items()}).row(0))
    shown = [pl.when(test).then("'" + pl.col(name)).otherwise(name).alias(name) for name, test in formula.items()]
    return frame.with_columns(shown), int(count)


def _write_table(out: Path, frame: pl.DataFrame) -> None:
    with atomic_path(out) as temporary:
        match out.suffix:
            case ".jsonl":
                frame.write_ndjson(temporary)
            case ".csv":
                frame.write_csv(temporary)
            case _:
                frame.write_parquet(temporary)
