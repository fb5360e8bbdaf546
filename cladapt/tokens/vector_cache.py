"""Vectors of texts kept below the user's cache folder, by the content of the model and of the text.

A model is known by the hash of its files, a text by its own. What one call computes is one parquet file, written whole
and named by what it holds, so that processes may work on one cache at the same time. The folder may be removed.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from cladapt.artifacts import hash_file, hash_value, read_parquet, write_parquet
from cladapt.errors import DataError, EnvironmentProblem

FORMAT = 1
"""Counts up when the way from a text to its vector changes."""
_SCHEMA = {"text": pl.String(), "vector": pl.List(pl.Float32())}
Encode = Callable[[Sequence[str]], np.ndarray]


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/cladapt/vectors`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cladapt" / "vectors"


def model_identity(folder: Path) -> str:
    """Hash of the names and contents of a model's files, hidden ones left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    relative = [path.relative_to(folder) for path in files]
    named = [name for name in relative if not any(part.startswith(".") for part in name.parts)]
    return hash_value([FORMAT, [[name.as_posix(), hash_file(folder / name)] for name in named]])


class Cached:
    """An encoder of texts, float32 [n, d], that asks the cache first; warnings count what was taken from there."""

    def __init__(self, encode: Encode, model: str, uncounted: Sequence[str] = ()) -> None:
        """`encode` is called for texts that the cache lacks; `model` is its `model_identity`."""
        self.encode = encode
        self.folder = cache_folder() / model
        self._own = {_key(text) for text in uncounted}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        keys = [_key(text) for text in texts]
        found = self._read(set(keys))
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        if taken := len(found.keys() - self._own):
            warnings.warn(
                f"{taken} of {len(set(keys))} vectors of texts are taken from {self.folder}; remove it to have them "
                "computed anew",
                stacklevel=2,
            )
        if missing:
            vectors = self.encode(list(missing.values()))
            self._write(list(missing), vectors)
            found.update(zip(missing, vectors, strict=True))
        self._own.update(keys)
        return np.stack([found[key] for key in keys])

    def _read(self, keys: set[str]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                frame = read_parquet(path, _SCHEMA).filter(pl.col("text").is_in(list(keys)))
            except DataError as error:
                warnings.warn(f"the cache of vectors is not read: {error.message}; remove the file", stacklevel=3)
                continue
            found.update(zip(frame["text"], (vector.to_numpy() for vector in frame["vector"]), strict=True))
        return found

    def _write(self, keys: list[str], vectors: np.ndarray) -> None:
        try:
            write_parquet(
                self.folder / f"{hash_value(keys)}.parquet",
                pl.DataFrame({"text": keys, "vector": vectors}, schema=_SCHEMA),
            )
        except EnvironmentProblem as error:
            warnings.warn(f"the vectors of {len(keys)} texts are not kept: {error.message}", stacklevel=3)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
