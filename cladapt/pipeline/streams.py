"""Logs to stream directories, and semantic IDs for their items."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cladapt.artifacts import atomic_dir, atomic_path, check_writable, put_back, recover
from cladapt.config import BlocksConfig, SimulateConfig, TokensConfig
from cladapt.data.append import waiting_rows
from cladapt.data.blocks import build_stream, check_stream
from cladapt.data.readers import READERS, NoRows, RawLog, ReadOptions, read, reader_for
from cladapt.data.schema import MANIFEST, PARTS, Stream, read_manifest
from cladapt.data.simulate import simulate
from cladapt.errors import ConfigError, DataError
from cladapt.lock import locked
from cladapt.tokens.build import SIDS, index_sids, load_sids, read_sids, save_index, save_sids, shared_texts
from cladapt.tokens.diagnostics import by_popularity, churn, kept_neighbours
from cladapt.tokens.encoder import encoder_settings
from cladapt.tokens.extend import extend_sids, extend_with_index
from cladapt.tokens.sids import SidTable, read_index
from cladapt.tokens.versions import FOLDER, VERSIONS, folder_of, version_folder


def import_data(source: str, out: Path, format: str, options: ReadOptions, config: BlocksConfig) -> dict[str, Any]:
    """Read a log, cut it into blocks, write the stream directory (with the IDs that came along, if any)."""
    refuse_stream(out)
    log = read(source, format, options)
    stream, table = _cut(log, config)
    if options.items is not None and os.path.exists(source) and options.items.samefile(source):
        stream = replace(stream, manifest={**stream.manifest, "items_in_log": True})
    with atomic_dir(out) as folder:
        stream.save(folder)
        if table is not None:
            table.save(folder / SIDS)
    return {
        "stream": str(out),
        "source": log.source,
        "semantic_ids": "from the source" if table is not None else _next_step(stream, out),
        **_report(stream),
    }


def _cut(log: RawLog, config: BlocksConfig) -> tuple[Stream, SidTable | None]:
    """The stream of a log, and the IDs that came along for its items; the log's warnings go into an error's hint."""
    try:
        stream = build_stream(log, config)
    except DataError as error:
        raise DataError(error.message, "; ".join([*log.warnings, error.hint])) from error
    table = None if log.index is None else index_sids(stream, SidTable.from_index(log.index), TokensConfig())
    return stream, table


def _report(stream: Stream) -> dict[str, Any]:
    """What an import keeps and loses, as import and check both say it."""
    counts = check_stream(stream)
    return {
        **{name: counts.pop(name) for name in ("users", "items", "interactions")},
        "items_with_text": _items_with_text(stream),
        "dropped": dict(stream.manifest["dropped"]),
        "notes": {name: count for name, count in stream.manifest["notes"].items() if count},
        "warnings": stream.manifest["warnings"],
        "losses": stream.manifest["losses"],
        **counts,
    }


def _items_with_text(stream: Stream) -> int:
    return int((stream.items["text"].str.strip_chars() != "").sum())


def _next_step(stream: Stream, out: Path) -> str:
    """How the items of a stream without semantic IDs can get them."""
    # codebooks are fitted on the items of block 1
    if stream.items.filter(pl.col("first_block") == 1)["text"].str.contains(r"\w").any():
        return f"none yet: cladapt tokens build {out}"
    return (
        "none, and no item of block 1 has a text to build them from: import again with --text COL (a column of the "
        "log) or --items TABLE, or make them of what users have together: cladapt tokens build "
        f"{out} --embedding cooccurrence, or take those of an index: cladapt tokens build {out} --index FILE"
    )


def simulate_data(out: Path, config: SimulateConfig) -> dict[str, Any]:
    """Generate a stream directory of drifting preferences."""
    refuse_stream(out)
    simulation = simulate(config)
    with atomic_dir(out) as folder:
        simulation.save(folder)
    stream = simulation.stream
    sizes = {"users": len(stream.users), "items": stream.n_items, "interactions": stream.interactions.height}
    return {"stream": str(out), **sizes, **check_stream(stream)}


def check_data(folder: Path) -> dict[str, Any]:
    """Verify a stream directory; the per-block report, and how many rows wait to become a block."""
    stream = Stream.load(folder)
    report = check_stream(stream)
    if os.path.lexists(folder / SIDS):
        report["semantic_ids"] = load_sids(folder, stream).collisions()["distinct"]
    pending = waiting_rows(folder, stream.n_blocks).height
    waiting = {"pending": pending} if pending else {}
    return {"stream": str(folder), "fingerprint": stream.fingerprint, **waiting, **report}


def is_source(path: Path, format: str) -> bool:
    """Whether this is a raw log rather than a stream directory: a format is named, or recognised."""
    if format != "auto":
        return True
    written = (path / MANIFEST).is_file() or any((path / part).is_dir() for part in PARTS)
    return not written and any(reader.detects(path) for reader in READERS.values())


def check_source(
    source: str, format: str, options: ReadOptions, config: BlocksConfig, rejects: Path | None
) -> dict[str, Any]:
    """Read a log without writing a stream: what its format expects, every rejected row, and what an import would keep.

    `rejects` names a csv file to make of the rejected rows. Where an import would fail this fails alike, and shows some
    of the rejected rows.
    """
    check_rejects(rejects)
    reader = reader_for(source, format)
    try:
        log = read(source, reader.name, options)
    except NoRows as error:
        write_rejects(error.rejects, rejects)
        raise NoRows(error.message + _first_of(error.rejects), error.hint, error.rejects) from error
    write_rejects(log.rejects, rejects)
    try:
        outcome = _report(_cut(log, config)[0])
    except DataError as error:
        raise DataError(error.message + _first_of(log.rejects), error.hint) from error
    times = log.events["timestamp"]
    return {
        "source": source,
        "format": log.source,
        "items_described": log.items.height,
        "first": times.min(),
        "last": times.max(),
        "out_of_order": log.out_of_order,
        "repeated_user_item_pairs": _repeats(log.events),
        "weighted": "weight" in log.events.columns,
        "semantic_ids": 0 if log.index is None else len(log.index),
        "rejected": log.rejects.height,
        **outcome,
        "schema": [{"part": part, "holds": holds} for part, holds in reader.schema(options).items()],
        "rejects": log.rejects.to_dicts(),
    }


def _first_of(rejects: pl.DataFrame) -> str:
    shown = [f"{where_of(row)}: {row['reason']} {row['value']!r}" for row in rejects.head(3).to_dicts()]
    return f"; rejected rows: {rejects.height}, the first: {', '.join(shown)}" if shown else ""


def check_rejects(path: Path | None) -> None:
    """`ConfigError` where the file for rejected rows exists, `EnvironmentProblem` where it cannot be written."""
    if path is not None:
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists", "choose another --rejects, or remove it")
        check_writable(path)


def write_rejects(frame: pl.DataFrame, path: Path | None) -> None:
    """Write rejected rows to a csv file, where one is named."""
    if path is not None:
        with atomic_path(path) as temporary:
            frame.write_csv(temporary)


def where_of(row: Mapping[str, Any]) -> str:
    """File and line of a rejected row, as compilers write them."""
    return row["file"] if row["line"] is None else f"{row['file']}:{row['line']}"


def data_stats(folder: Path) -> dict[str, Any]:
    """Totals of a stream directory."""
    stream = Stream.load(folder)
    lengths = stream.interactions.group_by("user").len()["len"]
    popularity = np.sort(np.bincount(stream.item_index, minlength=stream.n_items))[::-1]
    head = max(1, stream.n_items // 5)
    return {
        "stream": str(folder),
        "users": len(stream.users),
        "items": stream.n_items,
        "interactions": stream.interactions.height,
        "density": stream.interactions.height / (len(stream.users) * stream.n_items),
        "events_per_user": {"mean": lengths.mean(), "median": lengths.median(), "max": lengths.max()},
        "share_of_head_items": float(popularity[:head].sum() / popularity.sum()),
        "repeated_user_item_pairs": _repeats(stream.interactions),
        "items_with_text": _items_with_text(stream),
        "manifest": dict(stream.manifest.get("config", {})),
    }


def _repeats(events: pl.DataFrame) -> int:
    """Events whose user has another event with the same item."""
    return int(events.select("user", "item").is_duplicated().sum())


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold a stream directory against other commands, with what killed ones have left mended."""
    put_back(folder)
    read_manifest(folder)  # no lock where there is no stream
    with locked(folder):
        recover(folder)
        yield


def build_tokens(folder: Path, config: TokensConfig, index: Path | None) -> dict[str, Any]:
    """Write `sids.parquet`, and what extending it needs, into a stream directory."""
    with writing(folder):
        stream = Stream.load(folder)
        if (folder / SIDS).exists():
            raise ConfigError(
                f"{folder / SIDS} exists: bases were made for it",
                f"give new items IDs with `cladapt tokens extend {folder}`, all of them new codes in the same tokens "
                f"with `cladapt tokens refresh {folder}`, or remove it to give all items new IDs",
            )
        if (folder / VERSIONS).exists():
            raise ConfigError(
                f"{folder / VERSIONS} has later versions of the IDs, which begin with a {SIDS} that is not there",
                f"restore it, or remove {VERSIONS} and {FOLDER}/ too: what was made with them is lost then",
            )
        if index is not None:
            table = save_index(folder, stream, read_index(index), config)
        else:
            config.refuse_unread()
            table = save_sids(folder, stream, config)
    return _about_tokens(folder, stream, table)


def extend_tokens(folder: Path, index: Path | None = None) -> dict[str, Any]:
    """Give IDs to the items of a stream that have none, from the frozen codebooks or from the rows of `index`."""
    with writing(folder):
        stream = Stream.load(folder)
        done = extend_sids(folder, stream) if index is None else extend_with_index(folder, stream, read_index(index))
    return {
        "sids": str(folder_of(folder, done.table.version) / SIDS),
        "version": done.table.version,
        "fingerprint": done.table.fingerprint,
        "items": len(done.table.items),
        "new_items": done.new,
        "result": "extended" if done.new else "nothing to do: every item has a semantic ID",
        "items_sharing_an_id": done.sharing,
        **{f"items_without_{what}": count for what, count in done.without.items()},
        **_room(folder, done.table),
        "drift": [{"items": items, **fit.model_dump()} for items, fit in done.drift.items()],
    }


def inspect_tokens(folder: Path, neighbours: int = 0, against: Path | None = None) -> dict[str, Any]:
    """What a stream directory's IDs keep and lose: collisions, also by popularity, and the use of each level.

    With `neighbours` above 0, how many of an item's nearest ones the IDs keep near. `against`: a version
    of the stream's IDs, another stream directory, or a file of IDs, from which on it is counted what moved.
    """
    stream = Stream.load(folder)
    table = load_sids(folder, stream)
    report = {
        **_about_tokens(folder, stream, table),
        "popularity": by_popularity(version_folder(folder), stream, table),
    }
    if neighbours:
        report["neighbours"] = kept_neighbours(version_folder(folder), stream, table, neighbours)
    if against is not None:
        numbered = str(against).isdecimal() and not against.exists()
        other = read_sids(folder, int(str(against))) if numbered else _table_at(against)
        report["churn"] = churn(table, other, str(against))
    return report


def _table_at(path: Path) -> SidTable:
    return read_sids(path) if path.is_dir() else SidTable.load(path)


def _about_tokens(folder: Path, stream: Stream, table: SidTable) -> dict[str, Any]:
    texts = shared_texts(stream.items["text"].to_list())
    report = {
        "sids": str(folder_of(folder, table.version) / SIDS),
        "version": table.version,
        "fingerprint": table.fingerprint,
        **texts,
        **_room(folder, table),
    }
    return {**report, **collision_report(table)}


def _room(folder: Path, table: SidTable) -> dict[str, int]:
    """Codes of the last level, and items in the fullest group of equal codes before it; none without such a level."""
    settings = encoder_settings(version_folder(folder))
    if settings is not None and not settings.deduplicate:
        return {}
    groups = np.unique(table.codes[:, :-1], axis=0, return_counts=True)[1] if table.levels > 1 else [len(table.items)]
    return {"capacity": table.sizes[-1], "fullest_group": int(max(groups))}


def collision_report(table: SidTable) -> Mapping[str, Any]:
    """Collisions with an example of the largest group."""
    return {
        **table.collisions(),
        "example": dict(zip(table.items[:3], map(list, table.codes[:3].tolist()), strict=False)),
    }


def refuse_stream(out: Path) -> None:
    """A stream directory is never overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty", "choose another --out, or remove it")
    check_writable(out)
