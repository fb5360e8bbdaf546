"""Where an export may be written."""

from pathlib import Path

from cladapt.artifacts import check_writable
from cladapt.errors import ConfigError
from cladapt.export.card import CARD
from cladapt.export.catalogue import CATALOGUE
from cladapt.model.load import PROVENANCE


def refuse_existing(out: Path, replace: bool = False) -> None:
    """An export replaces no folder that holds something, but with `replace` one that an earlier export has written.

    Such a folder has a record, a card and a catalogue; bases, and the adapters of a run, have not all of them. What
    cannot be written is an error now, not at the end.
    """
    earlier = replace and all((out / name).is_file() for name in (PROVENANCE, CARD, CATALOGUE))
    if out.exists() and not earlier and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty", "choose another --out, or remove it")
    check_writable(out)
