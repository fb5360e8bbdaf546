"""The frozen way from items to codes: their vectors and codebooks fitted on block 1, kept in the stream directory.

`tokens.json` has the settings, the figures of block 1 that drift is measured against, and the hashes of the files.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import BaseModel

from cladapt.artifacts import hash_file, read_record, write_json
from cladapt.config import TokensConfig, resolve
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.tokens.quantize import ResidualKMeans
from cladapt.tokens.sources import Vectors, fit_vectors, load_vectors

ENCODER = "tokens.json"
CODEBOOKS = "codebooks.safetensors"
SCHEMA_VERSION = 1
_RESTORE = "restore the stream directory; new IDs need a new base: remove sids.parquet and run `cladapt tokens build`"


class Fit(BaseModel, frozen=True):
    """How well codebooks fit some items.

    `quantisation_error`: mean squared residual / mean squared norm of the items with a vector, None without any;
    `collisions`: share of the items whose codes another item has.
    """

    quantisation_error: float | None
    collisions: float


class EncoderRecord(BaseModel):
    """What tokens.json must hold."""

    schema_version: Literal[1]
    config: dict[str, Any]
    block_1: Fit
    files: dict[str, str]


@dataclass(frozen=True, eq=False)
class Encoder:
    """Vectors and codebooks of a stream, and how well they fit the items of block 1."""

    config: TokensConfig
    source: Vectors
    quantizer: ResidualKMeans
    block_1: Fit

    @classmethod
    def fit(cls, stream: Stream, config: TokensConfig) -> "Encoder":
        """Fit on the items known at block 1."""
        source = fit_vectors(stream, config)
        vectors = source.vectors(stream, stream.items.filter(pl.col("first_block") == 1))
        quantizer = ResidualKMeans.fit(vectors, config.levels, config.codes, config.seed)
        codes = quantizer.encode(vectors)
        block_1 = Fit(quantisation_error=quantizer.error(vectors, codes), collisions=collisions(codes))
        return cls(config, source, quantizer, block_1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level of the IDs; they depend on block 1 and the settings alone."""
        last = (self.config.capacity,) if self.config.deduplicate else ()
        return (*(len(centres) for centres in self.quantizer.codebooks), *last)

    def vectors(self, stream: Stream, items: pl.DataFrame) -> np.ndarray:
        """Unit vectors of items of a stream, float32 [n, d]; a warning counts those of which nothing is known."""
        vectors = self.source.vectors(stream, items)
        if empty := int((~vectors.any(axis=1)).sum()):
            warnings.warn(
                f"{empty} of {len(vectors)} items have {self.source.lack}: they get a zero vector", stacklevel=3
            )
        return vectors

    def ids(self, codes: np.ndarray, before: np.ndarray) -> np.ndarray:
        """The IDs of items with these `codes` [n, levels] that come after those with the IDs `before`: int32."""
        if not self.config.deduplicate:
            return codes
        earlier = before[:, : codes.shape[1]].reshape(-1, codes.shape[1])
        number = number_in_group(np.concatenate([earlier, codes]), self.config.capacity)
        return np.column_stack([codes, number[len(before) :]])

    def save(self, folder: Path) -> None:
        """Write vectors, codebooks and `tokens.json`."""
        self.quantizer.save(folder / CODEBOOKS)
        self.source.save(folder)
        record = {
            "schema_version": SCHEMA_VERSION,
            "config": self.config.model_dump(mode="json"),
            "block_1": self.block_1.model_dump(),
            "files": {name: hash_file(folder / name) for name in (CODEBOOKS, *self.source.files)},
        }
        write_json(folder / ENCODER, record)

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Read what `save` wrote; `DataError` when a file is missing, malformed or another one."""
        record = _record(folder)
        config = _settings(folder, record)
        quantizer, source = ResidualKMeans.load(folder / CODEBOOKS), load_vectors(folder, config)
        for name in (CODEBOOKS, *source.files):
            if hash_file(folder / name) != record.files.get(name):
                raise DataError(f"{folder / name} is not the file that {ENCODER} was written for", _RESTORE)
        return cls(config, source, quantizer, record.block_1)


def encoder_settings(folder: Path) -> TokensConfig | None:
    """The settings that a stream's IDs were built with; None where they came from an index."""
    return _settings(folder, _record(folder)) if os.path.lexists(folder / ENCODER) else None


def _record(folder: Path) -> EncoderRecord:
    return EncoderRecord.model_validate(read_record(folder / ENCODER, EncoderRecord, _RESTORE))


def _settings(folder: Path, record: EncoderRecord) -> TokensConfig:
    return resolve(TokensConfig, record.config, str(folder / ENCODER))


def number_in_group(codes: np.ndarray, capacity: int) -> np.ndarray:
    """0, 1, 2, … within each group of equal rows of `codes` in row order, modulo `capacity`: int32 [n]."""
    group = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(group, kind="stable")
    size = np.bincount(group)
    number = np.empty(len(codes), dtype=np.int32)
    number[order] = np.arange(len(codes)) - np.repeat(np.cumsum(size) - size, size)
    return number % capacity


def collisions(codes: np.ndarray, of_last: int | None = None) -> float:
    """Share of the rows of `codes` that equal another row; among the last `of_last` rows where that is given."""
    return float(shared(codes)[-of_last if of_last else None :].mean())


def shared(codes: np.ndarray) -> np.ndarray:
    """Whether each row of `codes` equals another row: bool [n]."""
    _, group, count = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return count[group.reshape(-1)] > 1
