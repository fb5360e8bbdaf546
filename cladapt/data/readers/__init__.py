"""Readers: one module per source format, all giving a `RawLog`. A new format is one file and one line below."""

import difflib
from dataclasses import replace
from pathlib import Path

from cladapt.data.readers._base import DEFAULTS, REJECTS, NoRows, RawLog, Reader, ReadOptions, files_of
from cladapt.data.readers._clean import frequent_texts, rejects_of
from cladapt.data.readers._parse import UNITS, to_seconds
from cladapt.data.readers.amazon import AMAZON2018, AMAZON2023
from cladapt.data.readers.lcrec import LcRecReader
from cladapt.data.readers.mind import MindReader
from cladapt.data.readers.minionerec import MiniOneRecReader
from cladapt.data.readers.movielens import MovieLensReader
from cladapt.data.readers.peso import PesoReader
from cladapt.data.readers.recbole import RecBoleReader
from cladapt.data.readers.steam import SteamReader
from cladapt.data.readers.tables import ARROW, CSV, JSONL, PARQUET
from cladapt.errors import ConfigError, DataError

__all__ = [
    "READERS",
    "REJECTS",
    "UNITS",
    "NoRows",
    "RawLog",
    "ReadOptions",
    "Reader",
    "frequent_texts",
    "read",
    "reader_for",
    "rejects_of",
    "to_seconds",
]

_ALL: tuple[Reader, ...] = (
    PesoReader(),
    MovieLensReader(),
    RecBoleReader(),
    LcRecReader(),
    MiniOneRecReader(),
    AMAZON2018,
    AMAZON2023,
    MindReader(),
    SteamReader(),
    CSV,
    JSONL,
    PARQUET,
    ARROW,
)
READERS: dict[str, Reader] = {reader.name: reader for reader in _ALL}


def read(src: Path | str, format: str = "auto", options: ReadOptions = DEFAULTS) -> RawLog:
    """Read a file, folder or glob; `auto` takes the one format that fits. `DataError` says what did not fit."""
    reader = reader_for(src, format)
    return replace(reader.read(Path(src), options), settings={"format": reader.name, **options.settings})


def reader_for(src: Path | str, format: str = "auto") -> Reader:
    """The reader of a source; `DataError` when there is no source or `auto` finds no format, or several."""
    src = Path(src)
    if format != "auto" and format not in READERS:
        near = difflib.get_close_matches(format, READERS, n=1)
        raise ConfigError(
            f"unknown format {format!r}" + (f", did you mean {near[0]!r}?" if near else ""),
            f"known: auto, {', '.join(READERS)}",
        )
    if not src.is_dir() and not files_of(src):
        raise DataError(f"no such file or folder: {src}", "check the path; quote a glob so that the shell leaves it")
    return _detect(src) if format == "auto" else READERS[format]


def _detect(src: Path) -> Reader:
    fitting = [reader for reader in READERS.values() if reader.detects(src)]
    # a known layout is more than its file type says
    claims = [reader for reader in fitting if not reader.generic] or fitting
    if not claims:
        raise DataError(
            f"{src} has none of the formats that can be read",
            f"known: {', '.join(READERS)}; with --format NAME the error says what that one expects",
        )
    if len(claims) > 1:
        raise DataError(
            f"{src} fits several formats: {', '.join(reader.name for reader in claims)}",
            f"choose one: {' or '.join(f'--format {reader.name}' for reader in claims)}, or name a single file",
        )
    return claims[0]
