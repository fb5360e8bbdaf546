"""A stream directory after its import: later logs are appended, items withdrawn, users forgotten.

One command at a time changes a stream. The manifest is written last and names the blocks that count, so that a command
that is killed leaves the stream that it found, or the one that it was to make.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from cladapt.artifacts import write_parquet
from cladapt.data.append import WAITING, Growth, append, waiting_rows
from cladapt.data.ids import read_ids
from cladapt.data.readers import NoRows, RawLog, ReadOptions, read
from cladapt.data.schema import PARTS, Stream, Withdrawal, block_file, write_manifest
from cladapt.errors import DataError
from cladapt.pipeline.streams import check_rejects, where_of, write_rejects, writing
from cladapt.tokens.build import SIDS
from cladapt.tokens.encoder import encoder_settings
from cladapt.tokens.extend import extend_with_index
from cladapt.tokens.sids import SidTable
from cladapt.tokens.versions import version_folder

SHOWN = 5
"""Ids or rows that a message names."""


def append_data(
    folder: Path,
    source: str,
    *,
    dates: Sequence[str] = (),
    late: str = "reject",
    rejects: Path | None = None,
    least: int = 0,
    items: Path | None = None,
) -> dict[str, Any]:
    """Append what is new in a log to a stream directory, as one block or several that begin at `dates`.

    The log is read as the stream's import was; `items` names another item table. New rows that would test fewer than
    `least` users wait for those of the next log. `late` rows, not after the stream's last time, are rejects, or kept
    in the first new block. Where nothing is new nothing is written.
    """
    check_rejects(rejects)
    with writing(folder):
        stream = Stream.load(folder)
        pending = waiting_rows(folder, stream.n_blocks)
        format, options = _reading(stream.manifest, source, items)
        try:
            log = read(source, format, options)
        except NoRows as error:
            write_rejects(error.rejects, rejects)
            if not error.rejects.is_empty():
                raise
            return _report(folder, stream, Growth(stream, pending), None)
        growth = append(stream, log, pending, dates, late, least)
        write_rejects(pl.concat([log.rejects, growth.late]), rejects)
        _commit(folder, stream, pending, growth)
        report = _report(folder, stream, growth, log)
        return {**report, **_ids_of_log(folder, growth.stream, log, report["warnings"])}


def _reading(manifest: Mapping[str, Any], source: str, items: Path | None) -> tuple[str, ReadOptions]:
    """Format and options of the stream's import; of a stream that was not imported the default columns."""
    format, options = "auto", ReadOptions()
    if "import" in manifest:
        try:
            format, options = ReadOptions.from_settings(manifest["import"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"the manifest does not say how the stream's log was read: {error!r}", "import the source again"
            ) from error
    if items is not None:
        return format, replace(options, items=items)
    if manifest.get("items_in_log"):
        return format, replace(options, items=Path(source))
    return format, options


def _commit(folder: Path, before: Stream, pending: pl.DataFrame, growth: Growth) -> None:
    """Write what has changed, the manifest last; then remove what does not count any more."""
    grown = growth.stream is not before
    if not grown and growth.pending.equals(pending):
        return
    file = folder / block_file(WAITING, growth.stream.n_blocks + 1)
    if growth.pending.is_empty():
        file.unlink(missing_ok=True)
    else:
        write_parquet(file, growth.pending.rechunk())
    if grown:
        growth.stream.save_after(folder, before.n_blocks)
    _sweep(folder, growth.stream.n_blocks)


def _sweep(folder: Path, blocks: int) -> None:
    """Remove files of blocks that the manifest does not name, and of rows that have become a block."""
    named = {folder / block_file(part, block) for part in PARTS for block in range(1, blocks + 1)}
    named.add(folder / block_file(WAITING, blocks + 1))
    for part in (*PARTS, WAITING):
        for file in set((folder / part).glob("block_*.parquet")) - named:
            file.unlink()


def _report(folder: Path, before: Stream, growth: Growth, log: RawLog | None) -> dict[str, Any]:
    counts = dict(growth.counts)
    manifest = growth.stream.manifest
    grown = growth.stream is not before
    entry: Mapping[str, Any] = manifest["appended"][-1] if grown else {"blocks": []}
    warnings = list(entry.get("warnings", log.warnings if log else ()))
    dropped = dict(entry.get("dropped", log.dropped if log else {}))
    if growth.late.height:
        shown = ", ".join(where_of(row) for row in growth.late.head(SHOWN).to_dicts())
        warnings.append(
            f"{growth.late.height} rows come too late, they are not after the end of the stream: {shown}"
            f"{', …' if growth.late.height > SHOWN else ''}; --rejects FILE lists all, --late keep takes them"
        )
        dropped["late"] = growth.late.height
    new_items = counts.pop("new_items", 0)
    return {
        "stream": str(folder),
        "outcome": _outcome(entry["blocks"], growth, counts),
        "appended_blocks": list(entry["blocks"]),
        "new_rows": counts.pop("new_rows", 0),
        "known_rows": counts.pop("known_rows", 0),
        "late": counts.pop("late", 0),
        "pending": growth.pending.height,
        "waiting": not growth.pending.is_empty(),
        "new_items": new_items,
        "changed_texts": counts.pop("changed_texts", 0),
        **{name: count for name, count in counts.items() if count},
        "dropped": dropped,
        "losses": list(entry.get("losses", log.losses if log else ())),
        "warnings": warnings,
        **({"semantic_ids": _next_step(folder, new_items)} if new_items and (folder / SIDS).exists() else {}),
        "blocks": [row for row in manifest.get("blocks", []) if row["block"] in entry["blocks"]],
    }


def _ids_of_log(folder: Path, stream: Stream, log: RawLog, warnings: list[str]) -> dict[str, Any]:
    """Give new items the IDs that came with the log, where those of the stream came from an index; the report of it."""
    if not log.index or not (folder / SIDS).exists() or encoder_settings(version_folder(folder)) is not None:
        return {}
    try:
        taken = extend_with_index(folder, stream, SidTable.from_index(log.index))
    except DataError as error:
        text = f"the IDs that came with the log are not taken: {error.message}; {error.hint}"
        return {"warnings": [*warnings, text]}
    return {"semantic_ids": f"from the log, of {taken.new} new items"} if taken.new else {}


def _outcome(blocks: Sequence[int], growth: Growth, counts: Mapping[str, int]) -> str:
    """In words, what became of the log."""
    said = f"appended block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}" if blocks else ""
    if growth.pending.height:
        rows = f"{growth.pending.height} rows wait for more, they would test too few users"
        return f"{said}; {rows}" if said else f"nothing appended: {rows}"
    return said or "nothing appended: no row is new"


def _next_step(folder: Path, items: int) -> str:
    return f"{items} new items have none yet: cladapt tokens extend {folder}"


def retire_items(folder: Path, file: Path, *, undo: bool = False, ignore_unknown: bool = False) -> dict[str, Any]:
    """Withdraw the items that a file lists from the catalogues of all later blocks, or with `undo` offer them again.

    Items in the state that is asked for stay as they are. `DataError` names ids that the stream does not have, unless
    `ignore_unknown`.
    """
    wanted = list(dict.fromkeys(read_ids(file, "item")))
    with writing(folder):
        stream = Stream.load(folder)
        known = set(stream.items["item"])
        unknown = [item for item in wanted if item not in known]
        if unknown and not ignore_unknown:
            raise DataError(
                f"{len(unknown)} of the {len(wanted)} items of {file} are not in the stream: {named(unknown)}",
                "check the ids, or leave these out with --ignore-unknown",
            )
        after = stream.n_blocks + 1
        gone = {w.item for w in stream.withdrawn if w.covers(after)}
        change = {item for item in wanted if item in known and (item in gone) == undo}
        if undo:
            kept = (w._replace(last=after - 1) if w.item in change and w.covers(after) else w for w in stream.withdrawn)
            withdrawn = [w for w in kept if w.last is None or w.first <= w.last]
        else:
            withdrawn = [*stream.withdrawn, *(Withdrawal(item, after, None) for item in wanted if item in change)]
        if change:
            stream = replace(stream, manifest={**stream.manifest, "withdrawn": [list(w) for w in withdrawn]})
            write_manifest(folder, stream.manifest)
        return {
            "stream": str(folder),
            "offered_again" if undo else "withdrawn": len(change),
            "unchanged": len(wanted) - len(unknown) - len(change),
            "unknown": len(unknown),
            "from_block": after,
            "withdrawn_items": len({w.item for w in stream.withdrawn if w.covers(after)}),
            "offered_items": int(stream.offered().size),
        }


def named(ids: Sequence[str]) -> str:
    """The first of some ids, as a message shows them."""
    return ", ".join(map(repr, ids[:SHOWN])) + (f", … ({len(ids)} of them)" if len(ids) > SHOWN else "")
