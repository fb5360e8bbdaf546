"""Files written whole or not at all, in open formats: JSON, parquet, safetensors.

A write goes to a temporary name beside its target, is flushed to the disk and renamed, so a killed process leaves
either the old file or the new one. A folder that is replaced steps aside first; `recover` puts it back where the
process died in between. Every file has the mode that the umask gives a new one. Nothing is ever pickled.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from cladapt.errors import DataError, EnvironmentProblem

if TYPE_CHECKING:
    import polars as pl
    import torch
    from pydantic import BaseModel


_TOLD = 5
"""Wrong values of one file that an error names."""
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.(?P<kind>tmp|old)")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `target` when the block ends without an error."""
    temporary = _beside(target, "tmp")
    try:
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)  # what the umask gives a new file
            yield temporary
            _finish(temporary, mode)
            temporary.replace(target)
    finally:
        with suppress(OSError):  # there is none after the rename, nor below a path that is no folder
            temporary.unlink()


@contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `target` when the block ends without an error."""
    temporary, retired = _beside(target, "tmp"), _beside(target, "old")
    try:
        with _writing(target):
            if target.exists() and not target.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is a file")
            target.parent.mkdir(parents=True, exist_ok=True)
            put_back(target)
            for path in (temporary, retired):
                shutil.rmtree(path, ignore_errors=True)
            temporary.mkdir()
            mode = stat.S_IMODE(temporary.stat().st_mode)  # what the umask gives a new folder
            try:
                yield temporary
            except EnvironmentProblem as problem:
                named = problem.message.replace(str(temporary), str(target))
                raise EnvironmentProblem(named, problem.hint) from problem
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    _finish(path, mode & 0o666)
                elif path.is_dir():
                    path.chmod(mode)
            if target.exists():
                target.rename(retired)
            temporary.rename(target)
    finally:
        with suppress(OSError):
            _restore(retired)
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.isdir(target):  # else the old one is still under its other name
            shutil.rmtree(retired, ignore_errors=True)


def _finish(path: Path, mode: int) -> None:
    """Flush a file to the disk and give it `mode`: libraries write private ones, which a server could not read."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    if not path.is_symlink():
        path.chmod(mode)


def check_writable(target: Path) -> None:
    """`EnvironmentProblem` where `target` could not be written, before the work whose result it would hold."""
    with _writing(target):
        if target.is_symlink() and not target.exists():
            raise FileNotFoundError(errno.ENOENT, "it is a link that leads nowhere")
        place = next(Path(above) for above in target.absolute().parents if os.path.lexists(above))
        probe = _beside(place / target.name, "tmp")
        probe.mkdir()
        probe.rmdir()


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """What the system refuses inside is an `EnvironmentProblem` that names `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise EnvironmentProblem(
            f"cannot write {target}: {reason}", "check the permissions and the free space there"
        ) from error


def recover(folder: Path) -> list[str]:
    """Mend what dead writers left anywhere below `folder`; returns a sentence for each thing done.

    A folder that had stepped aside for a new one goes back to its empty place, everything else temporary is removed.
    Call it before writing: what this process itself could have written counts as left over too.
    """
    done = []
    for path in _leftovers(folder, recursive=True):
        if restored := _restore(path):
            done.append(f"{restored} is back: a killed process had moved it aside to replace it")
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        done.append(f"{path} is removed: a killed process had not finished it")
    return done


def put_back(target: Path) -> None:
    """Restore a folder that a killed process had moved aside to replace it, and remove what else is left of that."""
    for path in _leftovers(target.parent, target.name) if target.parent.is_dir() else ():
        if not _restore(path):
            shutil.rmtree(path, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary of a writer that is dead."""
    match = _LEFTOVER.fullmatch(path.name)
    return match is not None and not _alive(int(match["pid"]))


def _leftovers(folder: Path, name: str | None = None, recursive: bool = False) -> list[Path]:
    """Temporaries of dead writers in `folder`, or those for the target `name` alone; none inside another one."""
    found: list[Path] = []
    for path in sorted(folder.rglob(".*") if recursive else folder.glob(".*")):
        match = _LEFTOVER.fullmatch(path.name)
        inside = any(above in found for above in path.parents)
        if match and name in (None, match["name"]) and not inside and is_leftover(path):
            found.append(path)
    return found


def _restore(path: Path) -> Path | None:
    """Move a retired folder back when its place is empty; the place, or None when there was nothing to do."""
    match = _LEFTOVER.fullmatch(path.name)
    if match is None or match["kind"] != "old" or not path.is_dir():
        return None
    target = path.with_name(match["name"])
    if target.exists():
        return None
    path.rename(target)
    return target


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{kind}")


def _alive(pid: int) -> bool:
    """Whether another process has this id; this one's own does not count, it may be an earlier process's again."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # someone else's
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, keys in their given order."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; `DataError` names the file, the line and the column of a syntax error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # an escape such as \ud800 is half a character
        return value
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}", "check the path") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}", "restore or regenerate this file"
        ) from error
    except RecursionError as error:
        raise DataError(f"cannot read {path}: nested too deeply", "restore or regenerate this file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}", "expected a UTF-8 JSON file") from error


def read_record(path: Path, form: "type[BaseModel]", hint: str) -> dict[str, Any]:
    """Read a JSON object that has what `form` asks for; `DataError` names each key that is missing or wrong.

    Returned as it is in the file: keys that `form` does not know are kept, defaults are not filled in.
    """
    from pydantic import ValidationError

    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {_shown(value)}", hint)
    try:
        form.model_validate(value, strict=True)
    except ValidationError as error:
        problems = [(".".join(map(str, p["loc"])), p) for p in error.errors(include_url=False)]
        lacking = [key for key, problem in problems if problem["type"] == "missing"]
        wrong = [f"has {key}={_shown(p['input'])}: {p['msg']}" for key, p in problems if p["type"] != "missing"]
        found = ([f"lacks {', '.join(lacking)}"] if lacking else []) + wrong[:_TOLD]
        more = f"; and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise DataError(f"{path} {'; '.join(found)}{more}", hint) from error
    return value


def _shown(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def write_parquet(path: Path, frame: "pl.DataFrame") -> None:
    """Write a polars frame as parquet."""
    import polars as pl

    with atomic_path(path) as temporary:
        try:
            frame.write_parquet(temporary)
        except pl.exceptions.ComputeError as error:  # how polars reports a full disk
            raise OSError(str(error)) from error


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
