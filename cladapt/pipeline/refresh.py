"""New versions of a stream's semantic IDs, and the way back to the version before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cladapt.data.schema import Stream
from cladapt.pipeline.streams import writing
from cladapt.tokens.build import SIDS, read_sids
from cladapt.tokens.refresh import go_back, refresh_sids
from cladapt.tokens.versions import folder_of


def refresh_tokens(
    folder: Path, asked: Mapping[str, Any], through: int | None = None, align: bool = True
) -> dict[str, Any]:
    """Give all items of a stream IDs that were fitted on the blocks up to `through`; how many moved, and what it cost.

    See `refresh_sids`. The version before stays, for the bases, runs and adapters that were made with it.
    """
    with writing(folder):
        done = refresh_sids(folder, Stream.load(folder), asked, through, align)
    made = done.version
    return {
        "sids": str(folder_of(folder, made.version) / SIDS),
        "version": made.version,
        "parent": made.parent,
        "fingerprint": done.table.fingerprint,
        "result": "refreshed" if done.new else "nothing to do: the IDs are of these blocks and settings already",
        "through": made.through,
        "aligned": made.aligned,
        **made.report,
        "later_items": done.waiting,
        "next": f"cladapt train --continue RUN --ids {made.version}, or back: cladapt tokens refresh {folder} --back",
    }


def take_back(folder: Path) -> dict[str, Any]:
    """Make the version current that the present one was refreshed from; nothing is removed."""
    with writing(folder):
        before = read_sids(folder)
        versions = go_back(folder)
        table = read_sids(folder)
    return {
        "sids": str(folder_of(folder, versions.current) / SIDS),
        "version": versions.current,
        "before": before.version,
        "fingerprint": table.fingerprint,
        "next": f"what has learned by version {before.version} goes on with it: it is kept",
    }
