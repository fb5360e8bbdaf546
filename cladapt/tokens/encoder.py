"""The frozen way from texts to codes: embedding and codebooks fitted on block 1, kept in the stream directory.

`tokens.json` has the settings, the figures of block 1 that drift is measured against, and the hashes of the files.
"""

import os
import warnings
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import BaseModel

from cladapt.artifacts import hash_file, read_record, write_json
from cladapt.config import TokensConfig, resolve
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.tokens.embed import NO_TEXT, Embedding, embed, fit_embedding, load_embedding
from cladapt.tokens.quantize import ResidualKMeans

ENCODER = "tokens.json"
CODEBOOKS = "codebooks.safetensors"
SCHEMA_VERSION = 1
_RESTORE = "restore the stream directory; new IDs need a new base: remove sids.parquet and run `cladapt tokens build`"


class Fit(BaseModel, frozen=True):
    """How well codebooks fit some items.

    `quantisation_error`: mean squared residual / mean squared norm of the items with a text, None where there is none;
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
    """Embedding and codebooks of a stream, and how well they fit the items of block 1."""

    config: TokensConfig
    embedding: Embedding
    quantizer: ResidualKMeans
    block_1: Fit

    @classmethod
    def fit(cls, stream: Stream, config: TokensConfig) -> "Encoder":
        """Fit on the items known at block 1."""
        texts = stream.items.filter(pl.col("first_block") == 1)["text"].to_list()
        if not any(text.strip() for text in texts):
            raise DataError(
                f"IDs cannot be built from text: all {len(texts)} items known at block 1 have an empty text", NO_TEXT
            )
        embedding = fit_embedding(texts, config.embedding, config.dimensions, config.seed)
        vectors = embed(embedding, texts)
        quantizer = ResidualKMeans.fit(vectors, config.levels, config.codes, config.seed)
        codes = quantizer.encode(vectors)
        block_1 = Fit(quantisation_error=quantizer.error(vectors, codes), collisions=collisions(codes))
        return cls(config, embedding, quantizer, block_1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level of the IDs; they depend on block 1 and the settings alone."""
        last = (self.config.capacity,) if self.config.deduplicate else ()
        return (*(len(centres) for centres in self.quantizer.codebooks), *last)

    def vectors(self, items: pl.DataFrame) -> np.ndarray:
        """Unit vectors of items of a stream, float32 [n, d].

        Block by block: what a model computes for a text may depend on the texts that are given with it.
        """
        groups = groupby(items.select("first_block", "text").iter_rows(), key=lambda row: row[0])
        return np.concatenate([embed(self.embedding, [text for _, text in rows]) for _, rows in groups])

    def ids(self, codes: np.ndarray, before: np.ndarray) -> np.ndarray:
        """The IDs of items with these `codes` [n, levels] that come after those with the IDs `before`: int32."""
        if not self.config.deduplicate:
            return codes
        earlier = before[:, : codes.shape[1]].reshape(-1, codes.shape[1])
        number = number_in_group(np.concatenate([earlier, codes]), self.config.capacity)
        return np.column_stack([codes, number[len(before) :]])

    def save(self, folder: Path) -> None:
        """Write embedding, codebooks and `tokens.json`."""
        self.quantizer.save(folder / CODEBOOKS)
        self.embedding.save(folder)
        record = {
            "schema_version": SCHEMA_VERSION,
            "config": self.config.model_dump(mode="json"),
            "block_1": self.block_1.model_dump(),
            "files": {name: hash_file(folder / name) for name in (CODEBOOKS, *self.embedding.files)},
        }
        write_json(folder / ENCODER, record)

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Read what `save` wrote; `DataError` when a file is missing, malformed or another one."""
        record = _record(folder)
        config = _settings(folder, record)
        quantizer, embedding = ResidualKMeans.load(folder / CODEBOOKS), load_embedding(folder, config.embedding)
        for name in (CODEBOOKS, *embedding.files):
            if hash_file(folder / name) != record.files.get(name):
                raise DataError(f"{folder / name} is not the file that {ENCODER} was written for", _RESTORE)
        return cls(config, embedding, quantizer, record.block_1)


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


def warn_of_empty(vectors: np.ndarray) -> None:
    """Count the items whose vector is zero."""
    if empty := int((~vectors.any(axis=1)).sum()):
        warnings.warn(
            f"{empty} of {len(vectors)} items have no text, or none that shares a word with block 1: they get a zero "
            "vector",
            stacklevel=3,
        )
