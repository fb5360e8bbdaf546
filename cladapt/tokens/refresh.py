"""New codes for all items of a stream, in the old vocabulary, so that as few items as possible change their ID.

A quantiser is fitted on what is known by a later block, from the groups that the old codes made of these items; it ends
where its own k-means does. Its codes are then named: level by level one assignment
problem gives each new code the old code with which it shares most items, counted among the items whose codes above
agree already; where that leaves a choice, among all items. Re-derived: the field's systems that refresh IDs publish no
code. An item whose codes all agree keeps its number among its equals too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cladapt.artifacts import atomic_dir
from cladapt.config import TokensConfig, resolve
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError
from cladapt.tokens.build import SIDS, load_sids
from cladapt.tokens.diagnostics import churn
from cladapt.tokens.encoder import Encoder, encoder_settings
from cladapt.tokens.sids import SidTable
from cladapt.tokens.versions import Version, Versions, folder_of, save_versions, version_folder, versions_of


@dataclass(frozen=True, eq=False)
class Refresh:
    """The table of a version, how it came about, and whether it is `new`: a refresh that would change nothing is not.

    `waiting`: items after the last block that it was fitted on, which have got their codes as new items do.
    """

    table: SidTable
    version: Version
    new: bool
    waiting: int


def refresh_sids(
    folder: Path, stream: Stream, asked: Mapping[str, Any], through: int | None = None, align: bool = True
) -> Refresh:
    """Make the next version of a stream's IDs from what is known by block `through`, by default the last one.

    `asked`: settings of the quantiser other than those of the present version. Items of later blocks are encoded by
    the new codebooks, as if they came afterwards. `align=False` fits from rows that the seed draws and leaves the new
    codes under their own numbers, in order of first appearance among equals: the control. `ConfigError` where the
    levels have too few codes.
    """
    through = stream.n_blocks if through is None else through
    if not 1 <= through <= stream.n_blocks:
        raise ConfigError(f"--through {through}: the stream has blocks 1 to {stream.n_blocks}", "choose one of them")
    versions = versions_of(folder)
    place, present = version_folder(folder), versions.get(versions.current)
    old = load_sids(folder, stream)
    built = encoder_settings(place)
    config = settings_of(old, built, asked)
    waiting = stream.n_items - len(stream.known(through))
    if present is not None and (present.through, present.aligned, built) == (through, align, config):
        return Refresh(old, present, False, waiting)
    levels = config.levels
    known = old.first(stream.n_items - waiting)
    start = known.codes[:, :levels] if align else None
    encoder = Encoder.fit(stream, config, through, [min(config.codes, size) for size in old.sizes[:levels]], start)
    vectors = encoder.vectors(stream, stream.items)
    first = vectors[: len(known.items)]
    names: Sequence[np.ndarray] = [np.arange(len(centres)) for centres in encoder.quantizer.codebooks]
    if align:
        names = aligned(known.codes[:, :levels], encoder.quantizer.encode(first), [len(each) for each in names], old)
    quantizer = encoder.quantizer.renamed(names, old.sizes[:levels])
    encoder = Encoder(config, encoder.source, quantizer, encoder.block_1, through)
    codes = encoder.quantizer.encode(vectors)
    ids = renumbered(encoder, known, codes[: len(first)], align)
    ids = np.concatenate([ids, encoder.ids(codes[len(first) :], ids)])
    table = SidTable(old.items, ids, old.sizes, versions.newest + 1)
    levels_moved = churn(known, table, "the new table")
    before = None if built is None else Encoder.load(place)
    report = {
        "items": len(known.items),
        "moved": levels_moved.pop()["moved"],
        "levels": levels_moved,
        "shared_items": {"before": _shared(known), "after": _shared(table.first(len(known.items)))},
        "quantisation_error": {"before": None, "after": encoder.quantizer.error(first, codes[: len(first)])},
        "items_without_vector": {"before": None, "after": int((~first.any(axis=1)).sum())},
    }
    if before is not None:
        then = before.source.vectors(stream, stream.items[: len(first)])
        report["quantisation_error"]["before"] = before.quantizer.error(then, known.codes[:, : before.config.levels])
        report["items_without_vector"]["before"] = int((~then.any(axis=1)).sum())
    made = Version(
        version=table.version,
        parent=versions.current,
        through=through,
        aligned=align,
        fingerprint=table.fingerprint,
        report=report,
    )
    with atomic_dir(folder_of(folder, table.version)) as fresh:
        encoder.save(fresh)
        table.save(fresh / SIDS)
    save_versions(folder, Versions(current=table.version, versions=[*versions.versions, made]))
    return Refresh(table, made, True, waiting)


def go_back(folder: Path) -> Versions:
    """Make the version current that the present one was refreshed from; the present one stays, for what it made.

    `ConfigError` where the present one is the first.
    """
    versions = versions_of(folder)
    present = versions.get(versions.current)
    if present is None:
        raise ConfigError(
            f"{folder} is at version 1 of its IDs: there is nothing to go back to",
            "refresh them first: leave --back out",
        )
    back = versions.model_copy(update={"current": present.parent})
    save_versions(folder, back)
    return back


def settings_of(table: SidTable, built: TokensConfig | None, asked: Mapping[str, Any]) -> TokensConfig:
    """The settings of a refresh: those the IDs were `built` by, and what is `asked` for on top.

    IDs of an index have none: then as many levels and codes as the table has. `ConfigError` where what is asked for
    needs other levels than those of the table, or more codes.
    """
    if built is None:
        several = table.levels > 1
        codes = max(table.sizes[:-1]) if several else table.sizes[0]
        found = {"levels": table.levels - several, "codes": codes, "deduplicate": several}
        built = resolve(TokensConfig, found, "the index of the stream")
    last = {"capacity": table.sizes[-1]} if built.deduplicate else {}
    config = resolve(TokensConfig, {**built.model_dump(mode="json"), **last, **asked}, "tokens refresh")
    stays = "the tokens of bases and adapters are fixed when IDs are built"
    if (needed := config.levels + config.deduplicate) != table.levels:
        raise ConfigError(
            f"levels={config.levels}, deduplicate={str(config.deduplicate).lower()} needs {needed} levels, the IDs of "
            f"the stream have {table.levels}: {stays}",
            f"use levels={table.levels - config.deduplicate}",
        )
    config.refuse_unread(asked)
    sizes = table.sizes[: config.levels]
    if "codes" in asked and config.codes > min(sizes):
        raise ConfigError(
            f"codes={config.codes} is more than the levels have: {list(sizes)}; {stays}",
            f"use codes={min(sizes)} or fewer, or leave it out: then each level is filled",
        )
    if config.deduplicate and config.capacity != table.sizes[-1]:
        raise ConfigError(
            f"capacity={config.capacity}, the last level has {table.sizes[-1]} codes: {stays}", "leave out capacity"
        )
    return config


def aligned(before: np.ndarray, after: np.ndarray, counts: Sequence[int], table: SidTable) -> list[np.ndarray]:
    """Old codes for the new ones, level by level: int64 [counts[l]], no two alike, each below table.sizes[l].

    `before` and `after` [n, levels] are the codes of the same items, the new ones of level l below counts[l]. A level's
    assignment keeps most of the items in place that all levels above have kept, and then most of all items.
    """
    from scipy.optimize import linear_sum_assignment

    stays, names = np.ones(len(before), dtype=bool), []
    for level, count in enumerate(counts):
        old, new = before[:, level], after[:, level]
        both = np.zeros((count, table.sizes[level]), dtype=np.int64)
        np.add.at(both, (new, old), 1)
        np.add.at(both, (new[stays], old[stays]), len(before) + 1)  # one of these outweighs all others
        names.append(linear_sum_assignment(both, maximize=True)[1])
        stays &= names[level][new] == old
    return names


def renumbered(encoder: Encoder, before: SidTable, codes: np.ndarray, align: bool) -> np.ndarray:
    """The IDs of the items of `before` with the new `codes` [n, levels]: int32 [n, levels of the table].

    With `align` an item whose codes stay keeps its number too, and the others take numbers that are left.
    """
    if not align or not encoder.config.deduplicate:
        return encoder.ids(codes, np.empty((0, before.levels), dtype=np.int32))
    stays = (codes == before.codes[:, :-1]).all(axis=1)
    ids = np.empty_like(before.codes)
    ids[stays] = before.codes[stays]
    ids[~stays] = encoder.ids(codes[~stays], before.codes[stays])
    return ids


def _shared(table: SidTable) -> int:
    """How many items share their ID with another one."""
    return int(table.collisions()["shared_items"])
