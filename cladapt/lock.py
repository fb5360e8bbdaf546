"""One writer at a time: a lock file in the directory that a command writes into."""

import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cladapt import ranks
from cladapt.errors import EnvironmentProblem

LOCK = ".lock"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a run or stream directory, made where it is missing, against other commands that would write into it.

    `EnvironmentProblem` names the process that has it. The lock of a process that dies is released by the system. Of
    several processes the first locks for all; on Windows nothing is locked.
    """
    if sys.platform == "win32" or not ranks.is_main():
        yield
        return
    file, made = path / LOCK, not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = _lock(file)
    except OSError as error:
        hint = "check the path, its permissions and the free space there"
        raise EnvironmentProblem(f"cannot write {file}: {error.strerror}", hint) from error
    try:
        yield
    finally:
        if _is_named(handle, file):  # a folder that was replaced meanwhile may have another one's
            file.unlink()
        os.close(handle)
        if made:
            with suppress(OSError):  # only where nothing was begun is it empty
                path.rmdir()


def _lock(file: Path) -> int:
    """An open file that this process alone has locked, and which still has its name."""
    import fcntl

    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise EnvironmentProblem(
                f"{file.parent} is in use: {holder} writes into it", "wait until it ends, or stop it; then try again"
            ) from error
        except OSError as error:  # some network file systems
            warnings.warn(f"{file.parent} cannot be locked ({error.strerror}): use it in one command", stacklevel=1)
        if _is_named(handle, file):
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
            return handle
        os.close(handle)  # who held it has removed it meanwhile


def _is_named(handle: int, file: Path) -> bool:
    return file.exists() and os.path.samestat(os.fstat(handle), file.stat())
