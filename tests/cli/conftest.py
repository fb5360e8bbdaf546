"""A small world that commands work in, and what every refusal of a command must look like."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from PIL import Image

from cladapt.data.schema import Stream
from cladapt_cli.app import run

CODES = "-o dimensions=8 -o levels=2 -o codes=4 -o capacity=16"
MAKE = (
    "data simulate --out stream -o users=40 -o items=40 -o topics=4 -o blocks=3",
    "data simulate --out bare -o users=40 -o items=40 -o topics=4 -o blocks=3",
    "data append bare next.csv --min-tested 9",
    f"tokens build stream {CODES}",
    "base pretrain --data stream --out base -o epochs=1",
    "base pretrain --data stream --out stranger -o epochs=0 -o seed=1",
    "train --data stream --base base --method finetune --epochs 1 --rank 2 --out twin",
    "train --data stream --base base --method peso --epochs 1 --rank 2 --out run",
    "eval twin -o bootstrap=100",
    "eval run -o bootstrap=100",
    "export run --target vllm --out served",
    "data images drawings --out classes --blocks 2 --size 8",
    "base vision --data classes --out eye -o epochs=1 -o hidden=16 -o layers=1",
    "train --task classify --data classes --base eye --method finetune --epochs 1 --rank 2 --out sight",
    "eval sight -o bootstrap=100",
)
ALLOWED = (
    "new",
    "nowhere",
    "runs",
    "bare",
    "grown/sids",
    "run/metrics",
    "run/report",
    "run/users",
    "run/current",
    "run/export",
    "run/.update",
    "stream/pending",
    "twin/current",
    "half",
    "served",
    "sight/metrics",
    "sight/report",
    "sight/images",
)
LOGGED = ("half/log.jsonl", "half/environment.json", "runs/latest.json")  # that a run went on is told before it fails
TRACES = re.compile(r"\.(tmp|old|bin|pt|pkl)$")


FORKED = """
import os, sys
os.chdir(cwd)
for stream in (1, 2):
    os.dup2(os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
sys.argv = ["cladapt", *arguments]
from cladapt_cli.app import main
main()
"""


@pytest.fixture(scope="session")
def start() -> Callable[[Path, str], BaseProcess]:
    """Starts a command in a folder as a process of its own, forked from a server that has the slow imports; what it
    says is appended to `said.txt` there."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["cladapt.pipeline.forget", "cladapt.pipeline.update", "cladapt_cli.app"])

    def forked(folder: Path, line: str) -> BaseProcess:
        process = server.Process(target=exec, args=(FORKED, {"cwd": str(folder), "arguments": line.split()}))
        process.start()
        return process

    return forked


def cladapt(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def limited(seconds: float = 15.0) -> Iterator[None]:
    """Fail what does not end: a refusal is no matter of seconds."""

    def stop(*_: object) -> None:
        pytest.fail(f"not done after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streams with IDs, without (rows wait there) and with some; two bases, two evaluated runs, files to read."""
    folder = tmp_path_factory.mktemp("small")
    histories = [{"user": "u", "history": ["i01", "i02"]}, {"user": "v", "history": []}]
    (folder / "histories.jsonl").write_text("\n".join(map(json.dumps, histories)))
    log = [f"u{u},i{(u + k) % 5},{1000 * (k // 3) + k}" for u in range(4) for k in range(6)]
    (folder / "log.csv").write_text("\n".join(["user,item,timestamp", *log]))
    later = [f"u{u:02d},{item},{4_000_000_000 + k}" for u in (1, 2) for k, item in enumerate(("i01", "i02", "fresh"))]
    (folder / "next.csv").write_text("\n".join(["user,item,timestamp", *later]))
    (folder / "users.txt").write_text("u01\nu03\n")
    (folder / "items.csv").write_text("item,text\ni0,zero\ni1,one\n")
    (folder / "catalogue.txt").write_text("i01\ni02\ni03\n")
    (folder / "recipe.yaml").write_text("seed: 3\ntrain: {lr: 1e-3, epochs: 1}\n")
    (folder / "file").write_text("x")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to("loop")
    for c in range(4):
        (folder / "drawings" / f"c{c}").mkdir(parents=True)
        for i in range(5):
            Image.new("L", (8, 8), 60 * c + i).save(folder / "drawings" / f"c{c}" / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in MAKE:
            code, _, err = cladapt([*line.split(), "--quiet"])
            assert code == 0, f"{line}: {err}"
        whole = Stream.load(folder / "bare")
        whole.prefix(2).save(folder / "grown")
        assert cladapt([*f"tokens build grown {CODES}".split(), "--quiet"])[0] == 0
        manifest = Stream.load(folder / "grown").manifest
        Stream(whole.interactions, whole.items, manifest).save_after(folder / "grown", 2)
        new = whole.items.filter(whole.items["first_block"] == 3)["item"]
        rows = {item: ["<a_0>", "<b_0>", f"<c_{k % 16}>"] for k, item in enumerate(new)}
        (folder / "rows.json").write_text(json.dumps(rows))
    index = {item: [f"<a_{k}>", f"<b_{k}>"] for k, item in enumerate(f"i{n:02d}" for n in range(40))}
    (folder / "index.json").write_text(json.dumps(index))
    shutil.copytree(folder / "run", folder / "half")
    shutil.rmtree(folder / "half" / "adapters" / "block_003")
    return folder


def listing(folder: Path) -> dict[str, str]:
    """Every file by its content, every link by its target, every folder."""
    found = {}
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(above, name)
            kind = os.readlink(path) if path.is_symlink() else "" if path.is_dir() else path.read_bytes()
            found[str(path.relative_to(folder))] = (
                hashlib.blake2b(kind).hexdigest() if isinstance(kind, bytes) else kind
            )
    return found


@pytest.fixture
def hostile(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command in a copy of the small world after `damage(folder)`; returns what it wrote to stderr.

    A refusal is one `error:` and one `hint:` line with a code of `codes`, and leaves every file as it was. Success,
    where `codes` has 0, may touch what starts with `allowed` and leaves no temporary one.
    """
    folder = tmp_path / "world"
    shutil.copytree(small_world, folder, symlinks=True, copy_function=os.link)
    monkeypatch.chdir(folder)

    def check(
        arguments: list[str],
        codes: set[int],
        damage: Callable[[Path], object] = lambda _: None,
        allowed: tuple[str, ...] = ALLOWED,
    ) -> str:
        damage(folder)
        before = listing(folder)
        with limited():
            code, out, err = cladapt(arguments)
        after = listing(folder)
        assert "Traceback" not in err
        assert "internal" not in err, err
        assert code in codes, f"{code}: {err}"
        assert not [path for path in {*after} - {*before} if TRACES.search(path)]
        if code == 0:
            changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
            assert all(path.startswith(allowed) for path in changed), changed
            return err
        resumed = {*LOGGED} if {"--resume", "--continue"} & {*arguments} else set()
        assert {p: h for p, h in after.items() if p not in resumed} == {
            p: h for p, h in before.items() if p not in resumed
        }
        assert out == ""
        error, hint = err.splitlines()[-2:]
        assert re.fullmatch("error: .{8,}", error), err
        assert re.fullmatch("hint: .{4,}", hint), err
        assert len([line for line in err.splitlines() if line.startswith(("error:", "hint:"))]) == 2
        return err

    return check
