"""Files written whole or not at all, in open formats: JSON, parquet, safetensors.

A write goes to a temporary name beside its target, is flushed to the disk and renamed, so a killed process leaves
either the old file or the new one. Nothing is ever pickled.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cladapt.errors import DataError, EnvironmentProblem

if TYPE_CHECKING:
    import polars as pl
    import torch


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `target` when the block ends without an error."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write {target}: {error.strerror or error}", "check the permissions and the free space there"
        ) from error
    finally:
        with suppress(OSError):  # there is none after the rename, nor below a path that is no folder
            temporary.unlink()


@contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `target` when the block ends without an error."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    retired = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            target.rename(retired)
        temporary.rename(target)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot write {target}: {error.strerror or error}", "check the permissions and the free space there"
        ) from error
    finally:
        if retired.exists() and not target.exists():
            retired.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, keys in their given order."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; `DataError` names the file, the line and the column of a syntax error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}", "check the path") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}", "restore or regenerate this file"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", "expected a UTF-8 JSON file") from error


def write_parquet(path: Path, frame: "pl.DataFrame") -> None:
    """Write a polars frame as parquet."""
    with atomic_path(path) as temporary:
        frame.write_parquet(temporary)


def read_parquet(path: Path, columns: Mapping[str, Any]) -> "pl.DataFrame":
    """Read a parquet file and check that it has `columns` (name -> polars dtype)."""
    import polars as pl

    if not path.is_file():
        raise DataError(f"no such file: {path}", "check the path, or make it again with the command that wrote it")
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}", "restore or regenerate this file") from error
    found = dict(frame.schema)
    wrong = [f"{name}: {found.get(name, 'missing')}" for name, dtype in columns.items() if found.get(name) != dtype]
    if wrong:
        expected = ", ".join(f"{name}: {dtype}" for name, dtype in columns.items())
        raise DataError(f"{path}: wrong columns ({'; '.join(wrong)})", f"expected {expected}")
    return frame


def write_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors, contiguous and on the CPU."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        # safetensors cannot read back a file without tensors whose metadata is {}
        noted = dict(metadata) if metadata else None
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, noted)


def read_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """Read named tensors from a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError(f"no such file: {path}", "check the path, or make it again with the command that wrote it")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable safetensors file: {error}", "restore or regenerate it") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, first 16 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def hash_value(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value in canonical form, first 16 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
