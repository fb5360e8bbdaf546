"""Users are forgotten: their events leave every block of a stream, and what has learned them is named."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from cladapt.artifacts import atomic_dir, hash_file, is_leftover, read_json, write_parquet
from cladapt.data.append import WAITING, waiting_rows
from cladapt.data.blocks import check_stream, count_late, late_blocks
from cladapt.data.ids import read_ids
from cladapt.data.schema import MANIFEST, PARTS, Stream, block_file, read_manifest
from cladapt.data.simulate import load_truth
from cladapt.errors import ConfigError, DataError
from cladapt.lock import LOCK
from cladapt.pipeline.growth import named
from cladapt.pipeline.streams import writing
from cladapt.run import RUNS

RECORD = "cladapt.json"
TRUTH_FILE = "truth.parquet"
COME_BACK = (
    "a later log that still has rows of these users brings them as late rejects, and with --late keep back into the "
    "stream: remove them there too"
)


def forget_users(folder: Path, file: Path, runs: Sequence[Path] = ()) -> dict[str, Any]:
    """Remove the events of the users that a file lists from all blocks and from the rows that wait.

    What was made on the stream before stays at home on it: its manifest keeps the fingerprints of that time. Returns
    the runs, bases and exports below `runs/`, `runs` and the stream's own folder that have learned from these users, or
    from others who were forgotten before. Users whom the stream does not have
    are counted. `DataError` where a block would come out empty, `ConfigError` where there is no such folder of runs.
    """
    for root in runs:
        if not os.path.isdir(root):
            raise ConfigError(f"--runs {root} is no folder", "name a folder that holds runs, bases or exports")
    users = list(dict.fromkeys(read_ids(file, "user")))
    with writing(folder):
        stream = Stream.load(folder)
        pending = waiting_rows(folder, stream.n_blocks)
        theirs = pl.col("user").is_in(users)
        removed = stream.interactions.filter(theirs)
        waiting = pending.filter(~theirs)
        absent = sorted({*users} - {*removed["user"]} - {*pending.filter(theirs)["user"]})
        seen: dict[str, list[dict[str, Any]]] = {"runs": [], "bases": [], "exports": []}
        before = stream.manifest
        if removed.height or waiting.height < pending.height:
            shorter = _without(stream, theirs) if removed.height else stream
            _replace(folder, shorter, waiting, theirs)
        if first := _first(before, removed):  # also asked again, when the users are gone
            seen = learned_from(first, read_manifest(folder).get("earlier", []), [RUNS, *_neighbours(folder), *runs])
    return {
        "stream": str(folder),
        "users_forgotten": len(users) - len(absent),
        "users_not_in_the_stream": len(absent),
        "events_removed": removed.height,
        "pending_removed": pending.height - waiting.height,
        "blocks_changed": removed["block"].unique().sort().to_list(),
        "warnings": _warnings(absent, seen, bool(removed.height)),
        **seen,
    }


def _first(manifest: Mapping[str, Any], removed: pl.DataFrame) -> int | None:
    """The first block that had an event of a user who is forgotten now or was before."""
    blocks = [] if removed.is_empty() else [int(removed["block"].min())]  # type: ignore[arg-type]
    return min([*blocks, *([manifest["forgotten_from"]] if "forgotten_from" in manifest else [])], default=None)


def _neighbours(folder: Path) -> list[Path]:
    """Runs, bases and exports that lie where the stream lies."""
    places = sorted(folder.resolve().parent.iterdir())
    return [place for place in places if any((place / name).is_file() for name in ("config.json", RECORD))]


def _warnings(absent: Sequence[str], seen: Mapping[str, Sequence[Any]], removed: bool) -> list[str]:
    found = [f"{len(absent)} users are not in the stream: {named(absent)}"] if absent else []
    if any(seen.values()):
        found.append(
            "what is listed has learned from these users, and runs keep rows per user of what they were tested on: "
            "remove it, or train it again"
        )
    if removed:
        found.append(COME_BACK)
    return found


def _without(stream: Stream, users: pl.Expr) -> Stream:
    """The stream without the events of some users, and with the fingerprints that it had before."""
    interactions = stream.interactions.filter(~users)
    kept = set(interactions["block"].unique())
    if empty := [block for block in range(1, stream.n_blocks + 1) if block not in kept]:
        raise DataError(
            f"block {empty[0]} of {stream.n_blocks} would have no event left",
            "forget fewer users at once, or import the log again without them and with larger blocks",
        )
    first = _first(stream.manifest, stream.interactions.filter(users))
    earlier = [*stream.manifest.get("earlier", []), list(stream.fingerprints)]
    manifest = {**stream.manifest, "earlier": earlier, "forgotten_from": first}
    shorter = Stream(interactions, stream.items, manifest)
    late = late_blocks(stream)
    if late:
        cuts = [
            {**cut, "late": count_late(shorter, block) if block in late else 0}
            for block, cut in enumerate(manifest["cuts"], start=1)
        ]
        shorter = replace(shorter, manifest={**manifest, "cuts": cuts})
    notes = manifest.get("notes", {})
    if stream.weighted:
        notes = {**notes, "weights_kept_but_unused_in_training": interactions.height}
    return replace(shorter, manifest={**shorter.manifest, "notes": notes, **check_stream(shorter)})


def _replace(folder: Path, stream: Stream, pending: pl.DataFrame, users: pl.Expr) -> None:
    """Write the directory anew, with everything else that lies in it, and put it in the old one's place."""
    folder = folder.resolve()  # what a link leads to must not keep the users
    written = {*PARTS, WAITING, MANIFEST, LOCK}
    with atomic_dir(folder) as fresh:
        for path in folder.iterdir():
            if path.name in written or is_leftover(path):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, fresh / path.name, symlinks=True)
            else:
                shutil.copy2(path, fresh / path.name, follow_symlinks=False)
        if "truth" in stream.manifest or os.path.lexists(folder / TRUTH_FILE):
            write_parquet(fresh / TRUTH_FILE, load_truth(folder).filter(~users))
            stream = replace(stream, manifest={**stream.manifest, "truth": hash_file(fresh / TRUTH_FILE)})
        if pending.height:
            write_parquet(fresh / block_file(WAITING, stream.n_blocks + 1), pending)
        stream.save(fresh)


def learned_from(first: int, chains: Sequence[Sequence[str]], roots: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """What has learned block `first` or a later one of a stream that had one of these chains of fingerprints: runs with
    their adapters' blocks, bases, exports.

    Looked for below `roots`, and where the runs there say that their base is.
    """
    places = {path.resolve(): path for root in roots for path in sorted(root.rglob(RECORD))}
    for root in roots:
        for path in sorted(root.rglob("config.json")):
            base = _record(path).get("config")
            if isinstance(base, dict) and isinstance(base.get("base"), str):
                made = Path(base["base"]) / RECORD
                if made.is_file():
                    places.setdefault(made.resolve(), made)
    adapters: dict[Path, list[int]] = {}
    bases, exports = [], []
    for path in places.values():
        record = _record(path)
        made_of = record.get("stream")
        home = next((list(chain).index(str(made_of)) + 1 for chain in chains if made_of in chain), None)
        learned = record.get("fitted_block", record.get("block", home))
        if home is None or not isinstance(learned, int) or min(home, learned) < first:
            continue
        place = path.parent
        if "fitted_block" in record:
            bases.append({"folder": str(place), "block": min(home, learned)})
        elif place.parent.name == "adapters" and (place.parent.parent / "config.json").is_file():
            adapters.setdefault(place.parent.parent, []).append(min(home, learned))
        else:
            exports.append({"folder": str(place), "block": min(home, learned)})
    runs = [{"folder": str(run), "blocks": sorted(blocks)} for run, blocks in sorted(adapters.items())]
    return {"runs": runs, "bases": bases, "exports": exports}


def _record(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file holds none, for it is then no record of ours."""
    try:
        value = read_json(path)
    except DataError:
        return {}
    return value if isinstance(value, dict) else {}
