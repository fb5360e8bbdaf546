"""Hostile files, over every command that reads one: damaged in each way a disk, an editor or an enemy can think of.

Every damage of a file is met by one of the calls that read it, in turn, so that every call meets some of them; with
`CLADAPT_HOSTILE=full` in the environment, every damage by every call. Damages are drawn from a fixed seed. What a
failure must look like is checked by `hostile` (see conftest).
"""

import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cladapt.artifacts import read_tensors, write_tensors

Hostile = Callable[..., str]
Damage = Callable[[Path], object]

FULL = os.environ.get("CLADAPT_HOSTILE") == "full"
PICKLE = b"\x80\x04\x95\x19\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x06weight\x94]\x94G?\xf0\x00\x00\x00\x00\x00\x00as."
TRAIN = "train --data stream --base base --out new --epochs 1"
RECOMMEND = "recommend histories.jsonl --adapter run --out new.csv"
BLOCKS = "*/adapters/block_002"
APPEND = "data append bare next.csv"
FORGET = "data forget bare users.txt"
RETIRE = "data retire bare catalogue.txt"
STREAM = (
    "data check stream",
    "tokens inspect stream",
    f"{TRAIN} --dry-run",
    "base pretrain --data stream --out new",
    "train --continue run",
)
SIDS = (
    "data check stream",
    "tokens inspect stream",
    "base pretrain --data stream --out new",
    "base init --from base --data stream --out new",
    f"{TRAIN} --dry-run",
    "export run --out new",
    RECOMMEND,
)
BASE = (f"{TRAIN} --dry-run", "export run --out new", RECOMMEND, "merge run --out new", "eval run -o bootstrap=100")
FROM = f"{TRAIN} --from-adapter run/adapters/block_002 --rank 2 --dry-run"
ADAPTER = (
    "export run --block 2 --out new",
    "export run --block 2 --target vllm --out new",
    "merge run --block 2 --out new",
    f"{RECOMMEND} --block 2",
    "eval run -o bootstrap=100",
    FROM,
    "train --resume half",
    "train --continue half",
)
EXTEND = "tokens extend grown"
RECOMMEND_SERVED = "recommend histories.jsonl --adapter served/adapters/block_3 --base served/base --out new.csv"
SERVED = "export run --block 2 --target vllm --out served"
LATEST = ("eval -o bootstrap=100", "export --out new", "merge --out new", "recommend histories.jsonl --out new.csv")
RUN = (
    "eval run -o bootstrap=100",
    "train --resume run",
    "train --continue run",
    "export run --out new",
    "merge run --out new",
    "compare run twin",
)
SIGHT = "train --task classify --data classes --base eye --out new --dry-run"
VISION = "base vision --data classes --out new -o epochs=1 -o hidden=16 -o layers=1"
LOOK = "eval sight -o bootstrap=100"
READERS = {  # file, or the pattern of alike ones that are damaged together -> the calls that read it
    "stream/manifest.json": (*STREAM, "export run --out new"),
    "stream/interactions/block_00002.parquet": (*STREAM, "data stats stream", "data blocks stream"),
    "stream/items/block_00001.parquet": STREAM,
    "bare/manifest.json": (APPEND, FORGET, RETIRE),
    "bare/interactions/block_00003.parquet": (APPEND, FORGET, RETIRE),
    "bare/pending/block_00004.parquet": (APPEND, FORGET, "data check bare"),
    "bare/truth.parquet": (FORGET,),
    "next.csv": (APPEND,),
    "users.txt": (FORGET,),
    "stream/sids.parquet": SIDS,
    "stream/tokens.json": ("tokens inspect stream",),
    "grown/sids.parquet": (EXTEND, f"{EXTEND} --index rows.json"),
    "grown/tokens.json": (EXTEND,),
    "grown/codebooks.safetensors": (EXTEND,),
    "grown/embedding.safetensors": (EXTEND,),
    "grown/terms.parquet": (EXTEND,),
    "rows.json": (f"{EXTEND} --index rows.json",),
    "stream/truth.parquet": ("eval run -o bootstrap=100",),
    "base/cladapt.json": (*BASE, "compare run twin"),
    "base/config.json": (*BASE, "base init --from base --data stream --out new"),
    "base/model.safetensors": (*BASE, "base init --from base --data stream --out new"),
    "base/tokenizer.json": (*BASE[:2], "base init --from base --data stream --out new"),
    "base/sids.parquet": BASE,
    f"{BLOCKS}/adapter_model.safetensors": ADAPTER,
    f"{BLOCKS}/adapter_config.json": ADAPTER,
    f"{BLOCKS}/cladapt.json": ADAPTER,
    "served/base/cladapt.json": (SERVED,),
    "served/adapters/block_3/adapter_config.json": (SERVED,),
    "served/adapters/block_3/sids.parquet": (RECOMMEND_SERVED,),
    "served/adapters/block_3/catalogue.parquet": (RECOMMEND_SERVED,),
    "run/config.json": RUN,
    "*/environment.json": ("eval run -o bootstrap=100", "export run --out new", "train --resume half"),
    "run/metrics.json": ("compare run twin", "export run --out new", "export run --target merged --out new"),
    "run/users/block_002.parquet": ("compare run twin", "eval run -o bootstrap=100"),
    "half/method/block_002.safetensors": ("train --resume half", "train --continue half"),
    "runs/latest.json": LATEST,
    "log.csv": ("data import log.csv --out new --fractions 0.5,0.5 --min-events 3", "data check log.csv"),
    "items.csv": ("data import log.csv --out new --items items.csv --fractions 0.5,0.5 --min-events 3",),
    "histories.jsonl": (RECOMMEND,),
    "catalogue.txt": (f"{RECOMMEND} --catalogue catalogue.txt", RETIRE),
    "index.json": ("tokens build bare --index index.json",),
    "classes/manifest.json": (SIGHT, VISION, LOOK),
    "classes/images.safetensors": (SIGHT, VISION, LOOK),
    "classes/images.parquet": (SIGHT, VISION, LOOK),
    "classes/classes.parquet": (SIGHT, VISION, LOOK),
    "eye/cladapt.json": (SIGHT, LOOK),
    "eye/config.json": (SIGHT, LOOK),
    "eye/model.safetensors": (SIGHT, LOOK),
    "sight/config.json": (LOOK, "train --resume sight", "compare sight"),
    "sight/images/rows.parquet": ("compare sight",),
    "sight/adapters/block_002/adapter_model.safetensors": (LOOK,),
    "drawings/c1/2.png": ("data images drawings --out new --blocks 2 --size 8",),
    "recipe.yaml": ("config show recipe.yaml", "train recipe.yaml --data stream --base base --dry-run"),
}
TEXTS = {  # nearly any text is a table, a list or a recipe: those that happen to be one may be taken
    "log.csv",
    "items.csv",
    "histories.jsonl",
    "catalogue.txt",
    "next.csv",
    "users.txt",
    "recipe.yaml",
}


def replaced(path: Path, content: bytes) -> None:
    """Never in place: the file may be a hard link to the original."""
    path.unlink()
    path.write_bytes(content)


def with_json(path: Path, change: Callable[[Any], Any]) -> None:
    replaced(path, json.dumps(change(json.loads(path.read_text()))).encode())


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    replaced(path, content[: int(share * len(content))])


def bytes_damages(draw: random.Random) -> dict[str, Damage]:
    return {
        "missing": Path.unlink,
        "empty": partial(replaced, content=b""),
        "binary": partial(replaced, content=draw.randbytes(300)),
        "zeros": partial(replaced, content=bytes(64)),
        "pickle": partial(replaced, content=PICKLE),
        "cut": partial(cut, share=draw.uniform(0.05, 0.95)),
        "folder": folder_instead,
        "loop": loop_instead,
    }


JSON_TEXTS = {
    "list": b"[]",
    "object": b"{}",
    "null": b"null",
    "number": b"5",
    "text": b'"x"',
    "deep": b"[" * 100_000,
    "long number": b"1" * 5000,
    "half a character": b'{"run": "\\ud800"}',
    "invalid UTF-8": b'{"run": "\xff"}',
}


JSON_KEYS = {  # what each file is asked for
    "stream/manifest.json": ("schema_version", "hashes", "config", "withdrawn", "cuts", "earlier"),
    "grown/tokens.json": ("schema_version", "config", "block_1", "files"),
    "bare/manifest.json": ("schema_version", "hashes", "cuts", "appended", "notes"),
    "base/cladapt.json": ("fingerprint", "fitted_block", "sids", "ids", "stream"),
    f"{BLOCKS}/cladapt.json": ("base", "block", "form", "window", "softmax", "history_rank", "stream", "ids"),
    f"{BLOCKS}/adapter_config.json": ("r", "lora_alpha", "target_modules", "peft_type"),
    "run/config.json": ("schema_version", "config", "inputs", "paths", "held_out", "ids"),
    "*/environment.json": ("packages",),
    "run/metrics.json": ("base_block", "config", "ceiling", "table", "matrix"),
    "runs/latest.json": ("run",),
}
OTHER: dict[str, Any] = {"null": None, "number": -5, "text": "x", "list": [[]], "object": {"x": 1}}
MAY_BE_TAKEN = {  # how the name of a case begins -> why its damage is harmless
    "stream/sids.parquet: missing: data check stream": "a stream has no IDs before `tokens build`",
    "stream/truth.parquet: missing: eval run": "only a simulated stream has a known ceiling",
    "stream/tokens.json: missing": "IDs of an index have none",
    "stream/manifest.json: missing: export run": "a model card tells what is known of the data",
    "stream/manifest.json: schema_version missing: export run": "a card needs no more of the data than its hashes",
    **{
        f"stream/manifest.json: schema_version {other}: export run": "a card needs no more than the hashes"
        for other in OTHER
    },
    **{
        f"{stream}/manifest.json: {key} missing": "a stream without what this records"
        for stream in ("stream", "bare")
        for key in ("config", "withdrawn", "cuts", "earlier", "appended", "notes")
    },
    "stream/manifest.json: config object": "a setting that nobody asks for",
    "bare/manifest.json: notes object": "a note more",
    "bare/pending/block_00004.parquet: missing": "no row waits",
    "drawings/c1/2.png: missing": "one image fewer",
    "drawings/c1/2.png: folder": "a folder without images is no class",
    "base/cladapt.json: fingerprint text": "a name; whoever has recorded another one refuses",
    "base/cladapt.json: stream missing": "compared where a stream is given",
    "base/cladapt.json: stream text": "compared where a stream is given",
    "base/cladapt.json: missing: compare": "where the base is gone, the run knows its name",
    "base/cladapt.json: folder: compare": "where the base is gone, the run knows its name",
    "base/cladapt.json: loop: compare": "where the base is gone, the run knows its name",
    "base/cladapt.json: sids text: compare": "a comparison reads no IDs",
    **{
        f"{BLOCKS}/cladapt.json: {key} missing": "not recorded: needed by `recommend` alone, which refuses"
        for key in ("form", "window", "softmax")
    },
    **{
        f"{BLOCKS}/cladapt.json: block missing: {call}": "it is but a name here"
        for call in ADAPTER
        if not call.startswith("merge") and call != FROM
    },
    f"{BLOCKS}/cladapt.json: history_rank missing": "an adapter without a history has none",
    f"{BLOCKS}/cladapt.json: ids missing": "older adapters do not say: theirs is version 1",
    f"{BLOCKS}/cladapt.json: ids null": "older adapters do not say: theirs is version 1",
    f"{BLOCKS}/cladapt.json: stream missing": "compared where a stream is given",
    f"{BLOCKS}/cladapt.json: stream text": "compared where a stream is given",
    **{
        f"run/users/block_002.parquet: {damage}: eval": "measured anew, which a note says"
        for damage in bytes_damages(random.Random(0))
    },
    "run/config.json: paths missing": "older runs do not have them: the places as they were given hold",
    "run/config.json: held_out missing": "it never changed",
    "run/config.json: ids missing": "they never changed",
    "base/cladapt.json: ids missing": "older bases do not say: theirs is version 1",
    "run/config.json: inputs missing": "older runs do not have them; --resume says that they are not compared",
    "*/environment.json: missing: export run": "a model card tells what is known of the machine",
    "*/environment.json: missing: train --resume": "killed before it: recorded when the run goes on",
    "run/metrics.json: missing: export run": "not evaluated: the model card says so",
    **{
        f"run/metrics.json: {key} {other}: export run": "a model card does not tell of it"
        for key in ("base_block", "ceiling")
        for other in ("missing", *OTHER)
    },
    **{f"run/metrics.json: table {other}: compare": "computed anew" for other in ("missing", *OTHER)},
    "run/metrics.json: matrix missing: export run": "the model card lacks a table",
}
MISTAKES = {  # how the name of a case begins -> why it ends with 2
    "served/base/cladapt.json: missing": "no serving folder, so an export would go where something else is",
    "served/base/cladapt.json: folder": "no serving folder",
    "served/base/cladapt.json: loop": "no serving folder",
    "run/config.json: config object": "settings of a user, wherever they stand",
    "grown/tokens.json: config object": "settings of a user, wherever they stand",
    "grown/tokens.json: missing": "IDs of an index have none, and need one",
}


def file_cases() -> list[Any]:
    """(file, call, damage) of every file and every damage that fits its kind; see above for the calls."""
    cases = []
    for file, calls in READERS.items():
        damages = bytes_damages(random.Random(file))
        if file.endswith(".json"):
            damages |= {name: partial(replaced, content=content) for name, content in JSON_TEXTS.items()}
        for key in JSON_KEYS.get(file, ()):
            damages[f"{key} missing"] = partial(with_json, change=partial(without, key=key))
            for name, value in OTHER.items():
                damages[f"{key} {name}"] = partial(with_json, change=partial(with_key, key=key, value=value))
        for turn, (name, damage) in enumerate(damages.items()):
            chosen = calls if FULL else [calls[(turn + turn // len(calls)) % len(calls)]]
            cases += [pytest.param(file, call, damage, id=f"{file}: {name}: {call}") for call in chosen]
    return cases


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def with_key(record: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {**record, key: value}


def test_every_call_meets_a_damage_of_every_file_that_it_reads() -> None:
    met = {tuple(case.values[:2]) for case in file_cases()}
    assert met == {(file, call) for file, calls in READERS.items() for call in calls}


@pytest.mark.parametrize(("file", "call", "damage"), file_cases())
def test_a_damaged_file(file: str, call: str, damage: Damage, hostile: Hostile, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    codes = {0, 2, 3, 4} if file in TEXTS else {3, 4}
    if name.startswith(tuple(MAY_BE_TAKEN)):
        codes |= {0}
    if name.startswith(tuple(MISTAKES)):
        codes |= {2}

    def damage_all(folder: Path) -> None:
        found = sorted(folder.glob(file))
        assert found
        for path in found:
            damage(path)

    hostile(call.split(), codes, damage_all)


def put(file: Path, name: str, value: float) -> None:
    tensors = read_tensors(file)
    key = next(n for n in tensors if name in n)
    tensors[key][0, 0] = value
    file.unlink()  # it may be a hard link to the original
    write_tensors(file, tensors, {"format": "pt"})


CHECKED = (
    "eval run -o bootstrap=100",
    RECOMMEND,
    "merge run --out new",
    "export run --out new",
    "export run --target vllm --out new",
)


@pytest.mark.parametrize("line", CHECKED)
@pytest.mark.parametrize(
    ("place", "name", "value", "text"),
    [
        ("base/model.safetensors", "lm_head", float("nan"), "values of lm_head.weight are not finite"),
        ("base/model.safetensors", "lm_head", 1e38, "its weights have the fingerprint"),
        ("run/adapters/block_003/adapter_model.safetensors", "lora_B", float("nan"), "are not finite"),
        ("run/adapters/block_003/adapter_model.safetensors", "lora_B", 0.5, "cladapt.json has recorded"),
    ],
)
def test_weights_that_were_changed_are_refused_by_every_command(
    place: str, name: str, value: float, text: str, line: str, hostile: Callable[..., str]
) -> None:
    assert text in hostile(line.split(), {3}, lambda folder: put(folder / place, name, value))
