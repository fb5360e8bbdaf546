"""Where an export may be written."""

from pathlib import Path

from cladapt.artifacts import check_writable
from cladapt.errors import ConfigError


def refuse_existing(out: Path) -> None:
    """An export never replaces a folder that holds something; what cannot be written is told now, not at the end."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty", "choose another --out, or remove it")
    check_writable(out)
