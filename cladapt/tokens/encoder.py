"""The frozen way from items to codes: their vectors and codebooks, kept in the stream directory.

They are fitted on block 1, those of a refreshed table on the blocks up to a later one. `tokens.json` has the settings,
the figures of the items they were fitted on, which drift is measured against, and the hashes of the files.
"""

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import BaseModel, PositiveInt

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
    through: PositiveInt = 1
    files: dict[str, str]


@dataclass(frozen=True, eq=False)
class Encoder:
    """Vectors and codebooks of a stream, and how well they fit the items that they were fitted on.

    Those are the items of block 1, or of the blocks up to `through` where the IDs were refreshed.
    """

    config: TokensConfig
    source: Vectors
    quantizer: ResidualKMeans
    block_1: Fit
    through: int = 1

    @classmethod
    def fit(
        cls,
        stream: Stream,
        config: TokensConfig,
        through: int = 1,
        most: Sequence[int] | None = None,
        before: np.ndarray | None = None,
    ) -> "Encoder":
        """Fit on the items known at block `through`, with at most `config.codes` codes a level, or `most` of each.

        `before`: codes [n, levels] that these items have had, from which the quantiser starts.
        """
        source = fit_vectors(stream, config, through)
        vectors = source.vectors(stream, stream.items.filter(pl.col("first_block") <= through))
        codes_per_level = config.codes if most is None else most
        quantizer = ResidualKMeans.fit(vectors, config.levels, codes_per_level, config.seed, before)
        codes = quantizer.encode(vectors)
        fitted = Fit(quantisation_error=quantizer.error(vectors, codes), collisions=collisions(codes))
        return cls(config, source, quantizer, fitted, through)

    @property
    def fitted_on(self) -> str:
        """The blocks whose items it was fitted on, in words."""
        return "block 1" if self.through == 1 else f"blocks 1 to {self.through}"

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
        earlier = before.reshape(-1, codes.shape[1] + 1)
        return np.column_stack([codes, number_in_group(codes, self.config.capacity, earlier)])

    def save(self, folder: Path) -> None:
        """Write vectors, codebooks and `tokens.json`."""
        self.quantizer.save(folder / CODEBOOKS)
        self.source.save(folder)
        record = {
            "schema_version": SCHEMA_VERSION,
            "config": self.config.model_dump(mode="json"),
            "block_1": self.block_1.model_dump(),
            "through": self.through,
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
        return cls(config, source, quantizer, record.block_1, record.through)


def encoder_settings(folder: Path) -> TokensConfig | None:
    """The settings that a stream's IDs were built with; None where they came from an index."""
    return _settings(folder, _record(folder)) if os.path.lexists(folder / ENCODER) else None


def _record(folder: Path) -> EncoderRecord:
    return EncoderRecord.model_validate(read_record(folder / ENCODER, EncoderRecord, _RESTORE))


def _settings(folder: Path, record: EncoderRecord) -> TokensConfig:
    return resolve(TokensConfig, record.config, str(folder / ENCODER))


def number_in_group(codes: np.ndarray, capacity: int, before: np.ndarray | None = None) -> np.ndarray:
    """A number below `capacity` for each row of `codes` [n, levels], in row order: int32 [n].

    It is the lowest that no equal row has, of this array or of `before` [m, levels + 1], whose last column is its
    numbers; where equal rows have all of them, how many there are so far, modulo `capacity`.
    """
    before = np.empty((0, codes.shape[1] + 1), dtype=np.int32) if before is None else before
    _, group = np.unique(np.concatenate([before[:, :-1], codes]), axis=0, return_inverse=True)
    earlier, later = np.split(group.reshape(-1), [len(before)])
    size, free = Counter(earlier.tolist()), Counter[int]()
    taken = defaultdict(set)
    for equal, number in zip(earlier.tolist(), before[:, -1].tolist(), strict=True):
        taken[equal].add(number)
    numbers = np.empty(len(codes), dtype=np.int32)
    for row, equal in enumerate(later.tolist()):
        while free[equal] in taken[equal]:
            free[equal] += 1
        full = free[equal] >= capacity
        numbers[row] = size[equal] % capacity if full else free[equal]
        free[equal] += not full
        size[equal] += 1
    return numbers


def collisions(codes: np.ndarray, of_last: int | None = None) -> float:
    """Share of the rows of `codes` that equal another row; among the last `of_last` rows where that is given."""
    return float(shared(codes)[-of_last if of_last else None :].mean())


def shared(codes: np.ndarray) -> np.ndarray:
    """Whether each row of `codes` equals another row: bool [n]."""
    _, group, count = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return count[group.reshape(-1)] > 1
