"""Atomic writes, and what the readers say about files that cannot be used."""

import contextlib
import errno
import hashlib
import os
import re
import resource
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from pydantic import BaseModel, PositiveInt
from safetensors.torch import save_file

from cladapt.artifacts import (
    atomic_dir,
    atomic_path,
    hash_file,
    hash_value,
    is_leftover,
    read_json,
    read_parquet,
    read_record,
    read_tensors,
    recover,
    write_json,
    write_parquet,
    write_tensors,
)
from cladapt.errors import DataError, EnvironmentProblem

Atomic = Callable[[Path], AbstractContextManager[Path]]


def put(path: Path, text: str, writer: Atomic) -> None:
    (path if writer is atomic_path else path / "inside").write_text(text)


def get(path: Path, writer: Atomic) -> str:
    return (path if writer is atomic_path else path / "inside").read_text()


both = pytest.mark.parametrize("writer", [atomic_path, atomic_dir])


@both
def test_a_write_replaces_what_was_there_and_leaves_nothing_else(tmp_path: Path, writer: Atomic) -> None:
    target = tmp_path / "new" / "target"
    for text in ("old", "new"):
        with writer(target) as temporary:
            assert temporary.parent == target.parent  # a rename must not cross file systems
            put(temporary, text, writer)
        assert get(target, writer) == text
    assert os.listdir(target.parent) == ["target"]


@both
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, DataError("a", "b")])
def test_a_failure_inside_keeps_the_old_and_leaves_nothing_else(
    tmp_path: Path, writer: Atomic, error: type[BaseException] | BaseException
) -> None:
    target = tmp_path / "target"
    with writer(target) as temporary:
        put(temporary, "old", writer)
    with pytest.raises(error if isinstance(error, type) else type(error)), writer(target) as temporary:  # noqa: PT012
        put(temporary, "half", writer)
        assert get(target, writer) == "old"
        raise error
    assert get(target, writer) == "old"
    assert os.listdir(tmp_path) == ["target"]


@both
def test_a_failure_inside_a_first_write_leaves_nothing(tmp_path: Path, writer: Atomic) -> None:
    with pytest.raises(ZeroDivisionError), writer(tmp_path / "target") as temporary:  # noqa: PT012
        put(temporary, "half", writer)
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@both
def test_a_failed_rename_brings_the_old_back(tmp_path: Path, writer: Atomic, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "target", Path.rename
    with writer(target) as temporary:
        put(temporary, "old", writer)

    def fail(self: Path, onto: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return rename(self, onto)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*target: No space left on device"):  # noqa: SIM117
        with writer(target) as temporary:
            put(temporary, "new", writer)
    assert get(target, writer) == "old"
    assert os.listdir(tmp_path) == ["target"]


@both
def test_a_parent_that_is_a_file_is_an_environment_problem(tmp_path: Path, writer: Atomic) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EnvironmentProblem, match="cannot write") as caught, writer(tmp_path / "file" / "x" / "y"):
        pass
    assert caught.value.hint == "check the permissions and the free space there"
    assert (tmp_path / "file").read_text() == "mine"


@both
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_forbidden_folder_is_an_environment_problem(tmp_path: Path, writer: Atomic) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentProblem, match="Permission denied"), writer(tmp_path / "target") as temporary:
        put(temporary, "new", writer)


def test_a_folder_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(EnvironmentProblem, match="target: it is a file"), atomic_dir(tmp_path / "target"):
        pass
    assert (tmp_path / "target").read_text() == "mine"
    assert os.listdir(tmp_path) == ["target"]


class Killed(BaseException):
    """What no handler may survive: from here on the process does nothing more to the disk."""


CALLS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")


def killing(patch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Let `at` changes of the disk happen, and none after them; returns the list of those that came."""
    seen: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if len(seen) >= at:
                raise Killed
            seen.append(name)
            return real(*arguments, **options)

        patch.setattr(os, name, call)

    for name in CALLS:
        wrap(name)
    return seen


@both
def test_a_process_killed_at_any_call_leaves_the_old_or_the_new(tmp_path: Path, writer: Atomic) -> None:
    found = []
    for at in range(100):
        target = tmp_path / str(at) / "target"
        with writer(target) as temporary:
            put(temporary, "old", writer)
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, at)
            try:
                with writer(target) as temporary:
                    put(temporary, "new", writer)
                killed = False
            except Killed:
                killed = True
        recover(target.parent)
        found.append(get(target, writer))
        assert os.listdir(target.parent) == ["target"]
        if not killed:
            break
    assert not killed
    assert found == sorted(found, reverse=True)  # old up to the rename, new from there on
    assert {"old", "new"} == set(found)


@both
@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir"])
def test_a_refused_call_keeps_the_old_and_leaves_nothing_else(
    tmp_path: Path, writer: Atomic, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with writer(target) as temporary:
        put(temporary, "old", writer)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with contextlib.suppress(EnvironmentProblem), writer(target) as temporary:
        put(temporary, "new", writer)
    assert get(target, writer) in ("old", "new")
    assert os.listdir(tmp_path) == ["target"]


def test_a_disk_that_is_full_inside_safetensors_is_an_environment_problem(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    write_tensors(target, {"t": torch.zeros(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(EnvironmentProblem, match=r"cannot write .*a\.safetensors: .*File too large"):
            write_tensors(target, {"t": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(read_tensors(target)["t"], torch.zeros(3))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def dead() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def test_recover_mends_what_dead_processes_left_and_says_so(tmp_path: Path) -> None:
    gone, alive = dead(), os.getppid()
    for name in (f"a/.lost.{gone}.old", f"a/.done.{gone}.old", "a/done", f".half.{gone}.tmp", f".half.{alive}.tmp"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "a" / f".file.json.{gone}.tmp").write_text("{")
    (tmp_path / f".half.{gone}.tmp" / f".x.{gone}.tmp").write_text("goes with its folder")
    for name in (".hidden", f"plain.{gone}.tmp", f".other.{gone}.bak"):
        (tmp_path / name).write_text("not ours")
    said = recover(tmp_path)
    assert sorted(text.split(":")[0] for text in said) == sorted(
        [
            f"{tmp_path}/a/lost is back",
            f"{tmp_path}/a/.done.{gone}.old is removed",
            f"{tmp_path}/a/.file.json.{gone}.tmp is removed",
            f"{tmp_path}/.half.{gone}.tmp is removed",
        ]
    )
    assert sorted(os.listdir(tmp_path / "a")) == ["done", "lost"]
    assert (tmp_path / "a" / "lost" / "inner").is_dir()
    assert sorted(os.listdir(tmp_path)) == sorted(
        [f".half.{alive}.tmp", ".hidden", f".other.{gone}.bak", "a", f"plain.{gone}.tmp"]
    )
    assert recover(tmp_path) == recover(tmp_path / "absent") == []


def test_the_next_writer_brings_back_what_had_stepped_aside_and_fails_onto_it(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_dir(target) as temporary:
        put(temporary, "old", atomic_dir)
    target.rename(tmp_path / f".target.{dead()}.old")
    with pytest.raises(ZeroDivisionError), atomic_dir(target):
        raise ZeroDivisionError
    assert get(target, atomic_dir) == "old"
    assert os.listdir(tmp_path) == ["target"]


def test_a_leftover_is_a_temporary_of_a_dead_process() -> None:
    names = {f".a.{dead()}.tmp": True, f".a.{os.getpid()}.old": True, f".a.{os.getppid()}.tmp": False, ".a.tmp": False}
    assert {name: is_leftover(Path("x") / name) for name in names} == names


def test_json_keeps_order_and_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": 1, "a": ["ü", None, 0.1]})
    assert (tmp_path / "a.json").read_text("utf-8").startswith('{\n  "z": 1')
    assert "ü" in (tmp_path / "a.json").read_text("utf-8")
    assert read_json(tmp_path / "a.json") == {"z": 1, "a": ["ü", None, 0.1]}


def test_parquet_and_tensors_read_back_what_was_written(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1, 2], "b": ["x", None]})
    write_parquet(tmp_path / "a.parquet", frame)
    assert read_parquet(tmp_path / "a.parquet", {"a": pl.Int64(), "b": pl.String()}).equals(frame)
    base = torch.arange(6.0).view(2, 3)
    tensors = {"t": base.t(), "half": base.bfloat16(), "bytes": torch.tensor([255], dtype=torch.uint8)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"k": "v"})
    read = read_tensors(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())


def test_no_tensor_at_all_is_a_file_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {})
    assert read_tensors(tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize("read", [read_json, read_tensors, lambda path: read_parquet(path, {})])
def test_an_absent_file_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(DataError, match=f"no such file: {tmp_path / 'absent'}"):
        read(tmp_path / "absent")


def test_broken_json_is_located(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n  "a": 1,\n  oops\n}')
    with pytest.raises(DataError, match=r"a\.json:3:3: not valid JSON: Expecting property name"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'"\xff"')
    with pytest.raises(DataError, match=r"cannot read .*a\.json") as caught:
        read_json(tmp_path / "a.json")
    assert caught.value.hint == "expected a UTF-8 JSON file"
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path)


class Form(BaseModel):
    """A record of the tests."""

    rank: PositiveInt
    names: list[str]
    parts: dict[str, int] = {}


def test_a_record_is_returned_as_it_is_in_the_file(tmp_path: Path) -> None:
    record = {"names": ["a"], "rank": 3, "unknown": None}
    write_json(tmp_path / "r.json", record)
    assert read_record(tmp_path / "r.json", Form, "mend it") == record


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([], r": expected a JSON object, found \[\]$"),
        (None, ": expected a JSON object, found None$"),
        ({}, " lacks rank, names$"),
        ({"rank": -5, "names": ["a", 1]}, " has rank=-5: .*greater than 0; has names.1=1: .*valid string$"),
        ({"rank": "3"}, " lacks names; has rank='3': Input should be a valid integer$"),
        ({"rank": True, "names": []}, " has rank=True: Input should be a valid integer$"),
        ({"rank": 1, "names": "x" * 200}, r" has names='x{78}…: "),
        ({"rank": 1, "names": [1] * 9}, " has names.4=1: Input should be a valid string; and 4 more$"),
    ],
)
def test_what_a_record_lacks_or_has_wrong_is_named_with_its_value(value: object, text: str, tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", value)
    with pytest.raises(DataError) as caught:
        read_record(tmp_path / "r.json", Form, "mend it")
    assert caught.value.message.startswith(str(tmp_path / "r.json"))
    assert re.search(text, caught.value.message), caught.value.message
    assert caught.value.hint == "mend it"


def test_truncated_binary_files_are_data_errors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"t": torch.zeros(100)})
    write_parquet(tmp_path / "a.parquet", pl.DataFrame({"a": [1]}))
    for name in ("a.safetensors", "a.parquet"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.safetensors: not a readable safetensors file"):
        read_tensors(tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
        read_parquet(tmp_path / "a.parquet", {"a": pl.Int64()})


def test_wrong_columns_are_all_named_with_what_was_expected(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pl.DataFrame({"a": [1], "b": ["x"]}))
    with pytest.raises(DataError, match=r"wrong columns \(b: String; c: missing\)") as caught:
        read_parquet(tmp_path / "a.parquet", {"a": pl.Int64(), "b": pl.Int32(), "c": pl.String()})
    assert caught.value.hint == "expected a: Int64, b: Int32, c: String"


def test_hashes_are_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()[:16]
    assert hash_value({"b": 1, "a": [0.5]}) == hash_value({"a": [0.5], "b": 1})
    assert hash_value({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()[:16]
    assert hash_value([1, 2]) != hash_value([2, 1])


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_every_file_has_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(2)})
        write_json(tmp_path / "j.json", {})
        with atomic_dir(tmp_path / "folder") as folder:
            (folder / "below").mkdir(mode=0o700)
            save_file({"a": torch.zeros(2)}, folder / "below" / "t.safetensors")  # private, as safetensors writes it
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    file, folder_mode = oct(0o666 & ~umask), oct(0o777 & ~umask)
    assert modes == {
        "t.safetensors": file,
        "j.json": file,
        "folder": folder_mode,
        "folder/below": folder_mode,
        "folder/below/t.safetensors": file,
    }
