"""Logs to stream directories, and semantic IDs for their items."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cladapt.artifacts import atomic_path, check_writable
from cladapt.config import BlocksConfig, SimulateConfig, TokensConfig
from cladapt.data.blocks import build_stream, check_stream
from cladapt.data.readers import READERS, Columns, NoRows, read, reader_for
from cladapt.data.schema import FILES, Stream
from cladapt.data.simulate import simulate
from cladapt.errors import ConfigError
from cladapt.tokens.build import SIDS, load_sids, save_sids
from cladapt.tokens.sids import SidTable, read_index


def import_data(source: str, out: Path, format: str, columns: Columns, config: BlocksConfig) -> dict[str, Any]:
    """Read a log, cut it into blocks, write the stream directory (with the IDs that came along, if any)."""
    refuse_stream(out)
    log = read(source, format, columns)
    stream = build_stream(log, config)
    report = check_stream(stream)
    index = None if log.index is None else SidTable.from_index(log.index).align(stream.items["item"].to_list())
    stream.save(out)
    if index is not None:
        index.save(out / SIDS)
    return {
        "stream": str(out),
        "source": log.source,
        "users": len(stream.users),
        "items": stream.n_items,
        "interactions": stream.interactions.height,
        "semantic_ids": "from the source" if index is not None else f"none yet: cladapt tokens build {out}",
        "dropped": dict(stream.manifest["dropped"]),
        "notes": dict(stream.manifest["notes"]),
        **report,
    }


def simulate_data(out: Path, config: SimulateConfig) -> dict[str, Any]:
    """Generate a stream directory of drifting preferences."""
    refuse_stream(out)
    simulation = simulate(config)
    simulation.save(out)
    stream = simulation.stream
    sizes = {"users": len(stream.users), "items": stream.n_items, "interactions": stream.interactions.height}
    return {"stream": str(out), **sizes, **check_stream(stream)}


def check_data(folder: Path) -> dict[str, Any]:
    """Verify a stream directory; the per-block report."""
    stream = Stream.load(folder)
    report = check_stream(stream)
    if os.path.lexists(folder / SIDS):
        report["semantic_ids"] = load_sids(folder, stream).collisions()["distinct"]
    return {"stream": str(folder), "fingerprint": stream.fingerprint, **report}


def is_source(path: Path, format: str) -> bool:
    """Whether this is a raw log rather than a stream directory: a format is named, or recognised."""
    if format != "auto":
        return True
    written = any((path / name).is_file() for name in ("manifest.json", *FILES))
    return not written and any(reader.detects(path) for reader in READERS.values())


def check_source(source: str, format: str, columns: Columns, rejects: Path | None) -> dict[str, Any]:
    """Read a log without writing a stream: what it holds, what its format expects, and every rejected row.

    `rejects` names a csv file to make of them. `NoRows` when no row can be used.
    """
    if rejects is not None:
        if os.path.lexists(rejects):
            raise ConfigError(f"{rejects} exists", "choose another --rejects, or remove it")
        check_writable(rejects)
    reader = reader_for(source, format)
    try:
        log = reader.read(Path(source), columns)
    except NoRows as error:
        _write_rejects(error.rejects, rejects)
        shown = [f"{_where(row)}: {row['reason']} {row['value']!r}" for row in error.rejects.head(3).to_dicts()]
        first = f"; the first: {', '.join(shown)}" if shown else ""
        raise NoRows(error.message + first, error.hint, error.rejects) from error
    _write_rejects(log.rejects, rejects)
    times = log.events["timestamp"]
    return {
        "source": source,
        "format": log.source,
        "interactions": log.events.height,
        "users": log.events["user"].n_unique(),
        "items": log.events["item"].n_unique(),
        "items_described": log.items.height,
        "first": times.min(),
        "last": times.max(),
        "out_of_order": log.out_of_order,
        "repeated_user_item_pairs": _repeats(log.events),
        "weighted": "weight" in log.events.columns,
        "semantic_ids": 0 if log.index is None else len(log.index),
        "rejected": log.rejects.height,
        "dropped": log.dropped,
        "notes": dict(log.notes),
        "schema": [{"part": part, "holds": holds} for part, holds in reader.schema(columns).items()],
        "rejects": log.rejects.to_dicts(),
    }


def _write_rejects(frame: pl.DataFrame, path: Path | None) -> None:
    if path is not None:
        with atomic_path(path) as temporary:
            frame.write_csv(temporary)


def _where(row: Mapping[str, Any]) -> str:
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
        "items_with_text": int((stream.items["text"] != "").sum()),
        "manifest": dict(stream.manifest.get("config", {})),
    }


def _repeats(events: pl.DataFrame) -> int:
    """Events whose user has another event with the same item."""
    return int(events.select("user", "item").is_duplicated().sum())


def build_tokens(folder: Path, config: TokensConfig, index: Path | None) -> dict[str, Any]:
    """Write `sids.parquet` (and the codebooks) into a stream directory."""
    stream = Stream.load(folder)
    if (folder / SIDS).exists():
        raise ConfigError(f"{folder / SIDS} exists: bases were made for it", "remove it to give the items new IDs")
    if index is not None:
        table = read_index(index).align(stream.items["item"].to_list())
        table.save(folder / SIDS)
    else:
        table = save_sids(folder, stream, config)
    return {"sids": str(folder / SIDS), "fingerprint": table.fingerprint, **collision_report(table)}


def inspect_tokens(folder: Path) -> dict[str, Any]:
    """The collision report of a stream directory's IDs."""
    table = load_sids(folder, Stream.load(folder))
    return {"sids": str(folder / SIDS), "fingerprint": table.fingerprint, **collision_report(table)}


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
