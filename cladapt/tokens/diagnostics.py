"""What semantic IDs keep and lose: collisions by popularity, neighbours by shared prefix, churn between two tables."""

import string
from pathlib import Path
from typing import Any

import numpy as np

from cladapt.config import TokensConfig
from cladapt.data.histories import training_sequences
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.tokens.cooccurrence import Cooccurrence, item_graph
from cladapt.tokens.encoder import Encoder, encoder_settings, shared
from cladapt.tokens.neighbours import nearest, overlap, strongest_neighbours
from cladapt.tokens.sids import SidTable
from cladapt.tokens.sources import TextVectors

PARTS = 5


def telling(table: SidTable, settings: TokensConfig | None) -> np.ndarray:
    """The codes without the level that only numbers items of equal codes, where the settings have one."""
    return table.codes[:, :-1] if settings is not None and settings.deduplicate else table.codes


def by_popularity(folder: Path, stream: Stream, table: SidTable) -> list[dict[str, Any]]:
    """Collisions in fifths of the catalogue, from the items with most training events to those with fewest.

    Shares of the items whose whole ID, or whose codes before the numbering level, another item has.
    """
    events = np.bincount(training_sequences(stream, stream.n_blocks).item, minlength=stream.n_items)
    whole, codes = shared(table.codes), shared(telling(table, encoder_settings(folder)))
    return [
        {
            "fifth": part,
            "items": len(rows),
            "events": int(events[rows].sum()),
            "sharing_an_id": float(whole[rows].mean()),
            "sharing_codes": float(codes[rows].mean()),
        }
        for part, rows in enumerate(np.array_split(np.argsort(-events, kind="stable"), PARTS), start=1)
        if len(rows)
    ]


def kept_neighbours(folder: Path, stream: Stream, table: SidTable, k: int) -> list[dict[str, Any]]:
    """How many of an item's k nearest items the IDs keep near: a row for texts, and one for what users have together.

    `kept`: the expected share of them among the k items with the longest common prefix, ties broken at random;
    `by_vectors`: their share among the k nearest of the vectors that were quantised; `by_chance`: k / (items - 1). IDs
    of an index have the second row alone, without vectors.
    """
    settings = encoder_settings(folder)
    codes, found, reduced = telling(table, settings), {}, None
    if settings is not None:
        source = Encoder.load(folder).source
        reduced = source.vectors(stream, stream.items)
        if isinstance(source, TextVectors):
            found["semantic"] = nearest(source.unreduced(stream.items), k)
    counts = Cooccurrence.of(stream, stream.n_blocks, settings.window if settings is not None else 0)
    found["collaborative"] = strongest_neighbours(item_graph(counts.counts, 0), k)
    rows = []
    for graph, (items, near) in found.items():
        by_vectors = None if reduced is None else overlap(nearest(reduced, k, items)[1], near)
        rows.append(
            {
                "graph": graph,
                "k": k,
                "items": len(items),
                "kept": kept_by_prefix(codes, items, near, k),
                "by_vectors": by_vectors,
                "by_chance": min(1.0, k / max(1, len(codes) - 1)),
            }
        )
    return rows


def kept_by_prefix(codes: np.ndarray, items: np.ndarray, near: np.ndarray, k: int) -> float | None:
    """Expected share of `near` [m, k] of `items` [m] among the k others whose codes [n, levels] agree longest; None
    where no item has a neighbour.

    Of the g_p others that agree in p levels, g_{p+1} agree in one more: a neighbour that agrees in exactly p is among
    the k with the probability (k - g_{p+1}) / (g_p - g_{p+1}), cut to 0 to 1, where ties are broken at random.
    """
    there = near >= 0
    if not there.any():
        return None
    n, levels = codes.shape
    agree = np.zeros((levels + 2, n), dtype=np.int64)
    agree[0] = n - 1
    for level in range(1, levels + 1):
        _, group, count = np.unique(codes[:, :level], axis=0, return_inverse=True, return_counts=True)
        agree[level] = count[group.reshape(-1)] - 1
    depth = (codes[items][:, None] == codes[near]).cumprod(axis=2).sum(axis=2)
    longer, as_long = agree[depth + 1, items[:, None]], agree[depth, items[:, None]]
    share = np.clip((k - longer) / np.maximum(as_long - longer, 1), 0.0, 1.0)
    return float((share * there).sum() / there.sum())


def churn(table: SidTable, other: SidTable, where: str) -> list[dict[str, Any]]:
    """Share of the items of both tables whose code moved, by level; and whose codes up to the level did.

    The last row is that of the whole ID. `where`: what names the other table in an error.
    """
    row_of = {item: row for row, item in enumerate(other.items)}
    both = [(row, row_of[item]) for row, item in enumerate(table.items) if item in row_of]
    if not both:
        raise DataError(f"{where} has IDs of none of the {len(table.items)} items", "name another version of the IDs")
    mine, theirs = np.array(both).T
    levels = min(table.levels, other.levels)
    moved = table.codes[mine, :levels] != other.codes[theirs, :levels]
    whole = float(moved.any(axis=1).mean()) if table.levels == other.levels else 1.0
    return [
        {
            "level": string.ascii_lowercase[level],
            "items": len(both),
            "moved": float(moved[:, level].mean()),
            "prefix_moved": float(moved[:, : level + 1].any(axis=1).mean()),
        }
        for level in range(levels)
    ] + [{"level": "whole ID", "items": len(both), "moved": whole, "prefix_moved": whole}]
