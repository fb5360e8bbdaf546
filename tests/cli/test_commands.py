"""Every command in one folder, as a user runs them; then what each refuses, and that it leaves nothing behind."""

import contextlib
import io
import json
import re
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from peft.tuners.lora import LoraModel

from cladapt.artifacts import read_json
from cladapt.config import PretrainConfig, SimulateConfig, TokensConfig
from cladapt.workloads import recommend
from cladapt_cli._verb import output
from cladapt_cli.app import run
from cladapt_cli.progress import Progress

SIZE = "-o users=60 -o items=40 -o topics=4 -o blocks=3"
CODES = "-o dimensions=8 -o levels=2 -o codes=4 -o capacity=16"
INPUTS = "--data stream --base base"
FLAGS = "--epochs 3 --lr 0.01 --seed 1 --rank 4"

STEPS = {
    "simulate": f"data simulate --out stream {SIZE}",
    "check": "data check stream",
    "blocks": "data blocks stream",
    "stats": "data stats stream",
    "tokens": f"tokens build stream {CODES}",
    "inspect": "tokens inspect stream",
    "pretrain": "base pretrain --data stream --out base --preset tiny -o epochs=2",
    "init": "base init --from base --data stream --out own --form packed -o epochs=0",
    "plan": f"train {INPUTS} --dry-run",
    "train": f"train {INPUTS} --method finetune {FLAGS} -o train.batch_tokens=1024 --out run",
    "eval": "eval --top-k 3,6 --beams 8 -o bootstrap=100",
    "export": "export",
    "merge": "merge run --block 2 --out merged",
    "recommend": "recommend histories.jsonl --out recommended.csv --top-k 3",
    "import": "data import log.csv --out imported --fractions 0.5,0.5 --min-events 3",
    "config": "config show",
    "methods": "methods",
    "doctor": "doctor",
}


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def cladapt(line: str) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(line.split())
    return Answer(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class World:
    folder: Path
    answers: dict[str, Answer]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    lines = [{"user": "u", "history": ["i01", "i02"]}, {"user": "v", "history": []}]
    (folder / "histories.jsonl").write_text("\n".join(map(json.dumps, lines)))
    log = [f"u{u},i{(u + k) % 5},{1000 * (k // 3) + k}" for u in range(4) for k in range(6)]
    (folder / "log.csv").write_text("\n".join(["user,item,timestamp", *log]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        answers = {name: cladapt(f"{line} --json --quiet") for name, line in STEPS.items()}
    return World(folder, answers)


@pytest.fixture
def inside(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(world.folder)
    return world


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    } | {str(path.relative_to(folder)): (0, 0) for path in folder.rglob("*") if path.is_dir()}


@pytest.mark.parametrize("name", STEPS)
def test_a_command_prints_one_json_object_and_is_quiet_when_asked(name: str, world: World) -> None:
    answer = world.answers[name]
    assert answer.code == 0, answer.err
    assert answer.err == ""
    assert answer.out.count("\n") == 1
    assert answer.json["schema_version"] == 1
    assert len(answer.json) > 1


def test_the_answers_tell_what_was_done(world: World) -> None:
    found = {name: answer.json for name, answer in world.answers.items()}
    assert found["simulate"]["users"] == 60
    assert found["blocks"]["blocks"] == found["check"]["blocks"]
    assert found["inspect"].items() >= found["tokens"].items()
    assert [row["graph"] for row in found["inspect"]["neighbours"]] == ["semantic", "collaborative"]
    assert found["pretrain"]["base"] == "base"
    assert found["plan"]["trained_parameters"] > 0
    assert [row["block"] for row in found["train"]["blocks"]] == [2, 3]
    assert (world.folder / found["eval"]["run"]).resolve() == world.folder / "run"
    assert [row["model"] for row in found["eval"]["table"]][:2] == ["finetune", "frozen"]
    assert "HR@6" in found["eval"]["table"][0]
    assert (world.folder / found["export"]["out"]).resolve() == world.folder / "run" / "export" / "peft"
    assert (found["merge"]["target"], found["merge"]["block"]) == ("merged", 2)
    assert 0 < found["merge"]["max_logit_difference"] <= found["merge"]["allowed"]
    assert found["recommend"]["recommendations"] == 6
    assert pl.read_csv(world.folder / "recommended.csv")["rank"].to_list() == [1, 2, 3] * 2
    assert (found["import"]["users"], len(found["import"]["blocks"])) == (4, 2)


def test_flags_become_the_run_s_configuration(world: World) -> None:
    config = read_json(world.folder / "run" / "config.json")["config"]
    assert (config["data"], config["base"], config["seed"]) == ("stream", "base", 1)
    assert (config["method"]["name"], config["adapter"]["rank"]) == ("finetune", 4)
    assert (config["train"]["epochs"], config["train"]["lr"], config["train"]["batch_tokens"]) == (3, 0.01, 1024)


def test_flags_override_the_recipe_and_overrides_both(inside: World, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 7\ndata: nowhere\nmethod: {name: frozen}\ntrain: {lr: 0.5, epochs: 9}\n")
    overrides = "-o train.epochs=1 -o adapter.rank=2"
    answer = cladapt(f"train {recipe} {INPUTS} --seed 8 --epochs 2 {overrides} --out {tmp_path / 'run'} --json")
    assert answer.code == 0, answer.err
    config = read_json(tmp_path / "run" / "config.json")["config"]
    assert (config["data"], config["seed"], config["method"]["name"]) == ("stream", 8, "frozen")
    assert (config["train"]["lr"], config["train"]["epochs"], config["adapter"]["rank"]) == (0.5, 1, 2)


def test_a_folder_whose_name_reads_as_a_number_is_a_folder(world: World, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("2024").symlink_to(world.folder / "stream")
    Path("1e3").symlink_to(world.folder / "base")
    assert cladapt("train --data 2024 --base 1e3 --dry-run --json").json["method"] == "peso"


def test_a_dry_run_writes_nothing(inside: World) -> None:
    before = tree(inside.folder)
    for more in ("", "--method frozen", "--from-adapter run/adapters/block_002 --rank 4"):
        assert cladapt(f"train {INPUTS} --dry-run {more}").code == 0
    assert tree(inside.folder) == before


def test_progress_goes_to_stderr_and_the_result_to_stdout(inside: World, tmp_path: Path) -> None:
    answer = cladapt(f"train {INPUTS} --epochs 1 --out {tmp_path / 'run'} --json")
    assert answer.json["run"] == str(tmp_path / "run")
    kinds = [line.split(":")[0] for line in answer.err.splitlines()]
    assert kinds == ["run", "epoch", "block", "epoch", "block"]
    assert answer.err.startswith(f"run: {tmp_path / 'run'}\n")


def test_the_bare_commands_work_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = SimulateConfig(users=60, items=40, topics=4, blocks=3)
    monkeypatch.setattr(recommend, "SimulateConfig", lambda: small)
    monkeypatch.setattr(recommend, "TokensConfig", partial(TokensConfig, dimensions=8, levels=2, codes=4, capacity=16))
    monkeypatch.setattr(recommend, "PretrainConfig", partial(PretrainConfig, epochs=1))
    trained, evaluated, exported = (cladapt(f"{line} --json") for line in ("train --method peso", "eval", "export"))
    assert (trained.code, evaluated.code, exported.code) == (0, 0, 0), trained.err + evaluated.err + exported.err
    path = Path(trained.json["run"])
    assert evaluated.json["table"][0]["model"] == "peso"
    assert Path(evaluated.json["run"]).resolve() == path.resolve()
    assert (path / "report.html").is_file()
    assert (path / "export" / "peft" / "adapter_model.safetensors").is_file()
    assert {p.name for p in Path().iterdir()} == {"runs"}
    assert not [p for p in Path().rglob("*") if p.suffix in (".tmp", ".old", ".bin", ".pt", ".pkl")]


def test_ctrl_c_in_a_block_is_130_and_resume_finishes_as_if_nothing_had_happened(
    inside: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emit(self: Progress, event: Mapping[str, Any]) -> None:
        if event["kind"] == "run":
            output.run = event["path"]
        if (event["kind"], event.get("block"), event.get("step")) == ("step", 3, 2):
            signal.raise_signal(signal.SIGINT)

    line = STEPS["train"].replace("--out run", f"--out {tmp_path / 'run'} -o train.checkpoint_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "emit", emit)
        stopped = cladapt(f"{line} --json")
    message = "interrupted: what was finished is kept"
    assert stopped == Answer(130, "", f"{message}; continue the run: cladapt train --resume {tmp_path / 'run'}\n")
    assert (tmp_path / "run" / "checkpoints" / "block_003_step_00000002").is_dir()
    answer = cladapt(f"train --resume {tmp_path / 'run'} --json --quiet")
    assert [row["block"] for row in answer.json["blocks"]] == [3]
    for block in ("block_002", "block_003"):
        mine, whole = (
            (folder / "adapters" / block / "adapter_model.safetensors").read_bytes()
            for folder in (tmp_path / "run", inside.folder / "run")
        )
        assert mine == whole


@pytest.fixture(scope="module")
def traps(world: World) -> World:
    """Beside the good things: what is empty, broken, half done or of another kind."""
    folder = world.folder
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "empty.csv").write_text("")
    (folder / "binary.csv").write_bytes(b"\x00\xff\xfe\x80" * 50)
    (folder / "bad.jsonl").write_text("nope\n")
    (folder / "bad.yaml").write_text("a: [1\n")
    (folder / "typos.yaml").write_text("trian: {lr: 1}\ntrain: {lr: abc, epochs: -1}\n")
    (folder / "index.json").write_text('{"i01": ["<a_1>"]}')
    (folder / "strangers.txt").write_text("nowhere\n")
    (folder / "manifest").mkdir()
    (folder / "manifest" / "manifest.json").write_text("{")
    shutil.copytree(folder / "run", folder / "half")
    shutil.rmtree(folder / "half" / "adapters" / "block_003")
    shutil.copytree(folder / "run", folder / "corrupt")
    tensors = folder / "corrupt" / "adapters" / "block_003" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-50])
    shutil.copytree(folder / "stream", folder / "bare")
    (folder / "bare" / "sids.parquet").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (
            "base pretrain --data stream --out base2 -o epochs=1 -o seed=1",
            f"data simulate --out other {SIZE} -o seed=9",
            f"tokens build other {CODES}",
            f"train {INPUTS} --method frozen --out frozen",
        ):
            answer = cladapt(f"{line} --quiet")
            assert answer.code == 0, answer.err
    return world


TRAIN = f"train {INPUTS} --out new"
RECOMMEND = "recommend histories.jsonl --out new.csv --adapter run"
BAD: list[tuple[str, int, str]] = [
    ("train --data nowhere --base base", 3, "nowhere is not a stream directory: it has no manifest.json"),
    ("train --data manifest --base base", 3, "manifest/manifest.json:1:2: not valid JSON"),
    ("train --data stream --base nowhere", 3, r"nowhere is not a base\+tokens directory"),
    ("train --data stream", 2, "data='stream' without base"),
    ("train --data other --base base", 3, "base was trained on block 1 of the stream"),
    ("train --data stream --base merged --out new -o train.lr=0", 2, "train.lr=0: Input should be greater than 0"),
    (f"{TRAIN} --method pesto", 2, "no method 'pesto'"),
    (f"{TRAIN} --method peso+peso", 2, "names a method twice"),
    (f"{TRAIN} --epochs 0", 2, "train.epochs=0"),
    (f"{TRAIN} --rank -1", 2, "adapter.rank=-1"),
    (f"{TRAIN} --seed -1", 2, "seed=-1"),
    (f"{TRAIN} -o trian.lr=1", 2, "unknown key 'trian', did you mean 'train'"),
    (f"{TRAIN} -o train.lr=fast", 2, "train.lr='fast': Input should be a valid number"),
    (f"{TRAIN} -o train", 2, "override 'train' has no `key=value` form"),
    (f"{TRAIN} -o method.options.strenght=1", 2, "unknown key 'strenght', did you mean 'strength'"),
    (f"{TRAIN} -o adapter.targets=nothing", 2, "adapter.targets='nothing'"),
    (f"{TRAIN} -o train.row_tokens=8", 2, "row_tokens=8 holds 2 items of 3 tokens"),
    (f"{TRAIN} --from-adapter empty", 3, "empty is not an adapter directory"),
    (f"{TRAIN} --from-adapter corrupt/adapters/block_003", 3, "not a readable safetensors file"),
    ("train --data stream --base base2 --out new --from-adapter run/adapters/block_003", 3, "was trained on the base"),
    (f"train {INPUTS} --out run", 2, "run exists and is not empty"),
    (f"train {INPUTS} --out file", 2, "file exists and is not empty"),
    (f"train {INPUTS} --out file/x", 4, "cannot write file/x"),
    ("train bad.yaml", 2, "bad.yaml: not valid YAML"),
    ("train typos.yaml", 2, "typos.yaml: 3 mistakes"),
    ("train nowhere.yaml", 3, "no such recipe: nowhere.yaml"),
    ("train binary.csv", 3, "cannot read the recipe binary.csv"),
    ("train --resume empty", 3, "empty is not a run directory"),
    ("train --resume run --lr 1", 2, "--resume continues a run as it was configured"),
    ("train --resume run --seed 0", 2, "--resume continues a run as it was configured"),
    ("train --resume run --dry-run", 2, "--resume continues a run as it was configured"),
    ("train --dry-run", 2, "--dry-run needs --data and --base"),
    ("eval empty", 3, "empty is not a run directory"),
    ("eval half", 3, r"half has adapters for the blocks \[2\], the stream needs \[2, 3\]"),
    ("eval run --block 9", 2, "--block 9: the stream has blocks 1 to 3"),
    ("eval run --top-k 0", 2, "top_k.0=0"),
    ("eval run --top-k=", 2, "top_k is empty"),
    ("eval run --top-k five", 2, "top_k.0='five'"),
    ("eval run --beams 0", 2, "beams=0"),
    ("eval run --beams 3", 2, "beams=3 is below the largest top_k=10"),
    ("eval run -o toppk=3", 2, "unknown key 'toppk', did you mean 'top_k'"),
    ("export frozen", 3, r"frozen has no adapter \(method frozen\)"),
    ("export run --target onnx", 2, "target 'onnx' is not known"),
    ("export run --block 9", 2, r"--block 9: run has \[2, 3\]"),
    ("export run --out base", 2, "base exists and is not empty"),
    ("export run --base base2 --out new", 3, "was trained on the base"),
    ("export corrupt --out new", 3, "not a readable safetensors file"),
    ("merge run --out file", 2, "file exists and is not empty"),
    ("merge corrupt --out new", 3, "not a readable safetensors file"),
    ("recommend histories.jsonl --out new.xlsx --adapter run", 2, "unknown kind of file '.xlsx'"),
    ("recommend bad.jsonl --out new.csv --adapter run", 3, "bad.jsonl: not readable as .jsonl"),
    ("recommend empty.csv --out new.csv --adapter run", 3, "empty.csv: not readable as .csv"),
    (f"{RECOMMEND} --top-k 0", 2, "top_k=0"),
    (f"{RECOMMEND} --beams 0", 2, "--beams 0 is below the 20 of the evaluation"),
    (f"{RECOMMEND} --beams 5", 2, "--beams 5 is below the 20 of the evaluation"),
    (f"{RECOMMEND} --item what", 2, "--item what with histories.jsonl, whose lines hold whole histories"),
    (f"{RECOMMEND} --catalogue strangers.txt", 3, "no item of the catalogue file is known to this model"),
    (f"{RECOMMEND} --base base2", 3, "was trained on the base"),
    ("recommend histories.jsonl --out file/new.csv --adapter run", 4, "cannot write file/new.csv"),
    ("data import nowhere --out new", 3, "no such file or folder: nowhere"),
    ("data import empty.csv --out new", 3, "cannot read empty.csv"),
    ("data import binary.csv --out new", 3, "binary.csv has no column 'user'"),
    ("data import log.csv --out stream", 2, "stream exists and is not empty"),
    ("data import log.csv --out new --user who", 3, "log.csv has no column 'who'"),
    ("data import log.csv --out new --format nope", 2, "unknown format 'nope'"),
    ("data import log.csv --out new --fractions 0.5,0.4", 2, "the fractions sum to 0.9"),
    ("data import log.csv --out new --fractions=", 2, "fractions.0=''"),
    ("data import log.csv --out new --fractions 1 --k-core 99", 3, "k_core=99 leaves none"),
    ("data check file", 3, "file is not a stream directory"),
    ("data simulate --out stream", 2, "stream exists and is not empty"),
    ("data simulate --out new -o usres=3", 2, "unknown key 'usres', did you mean 'users'"),
    ("data simulate --out file/new", 4, "cannot write file/new"),
    ("tokens build stream", 2, "sids.parquet exists"),
    ("tokens build bare --index index.json", 3, "39 of 40 items have no semantic ID"),
    ("tokens build bare --index binary.csv", 3, "cannot read binary.csv"),
    (
        "tokens build bare --embedding stream",
        3,
        "tokens.embedding='stream' holds no model: found codebooks",
    ),
    ("tokens build bare --embedding cooccurrence --reduce pca", 2, "reduce='pca' reduces an embedding of texts"),
    ("tokens build bare --reduce svd", 2, "reduce='svd': Input should be 'none', 'pca', 'whiten' or 'rec-pca'"),
    ("tokens inspect stream --against bare", 3, "bare has no sids.parquet"),
    ("tokens refresh bare", 3, "bare has no sids.parquet"),
    ("tokens refresh stream -o codes=500", 2, "codes=500 is more than the levels have"),
    ("tokens refresh stream --through 99", 2, "--through 99: the stream has blocks 1 to"),
    ("tokens refresh stream --back", 2, "is at version 1 of its IDs: there is nothing to go back to"),
    ("tokens refresh stream --back --no-align", 2, "--back goes to a version that is there"),
    ("tokens extend bare", 3, "bare has no sids.parquet"),
    ("tokens extend stream --index index.json", 3, "the index has the ID <a_1> for item 'i01', the stream has <a_"),
    ("tokens extend stream --index binary.csv", 3, "cannot read binary.csv"),
    ("export run --out new --data other", 3, "block_003 has learned the stream"),
    ("merge run --out new --data nowhere", 3, "nowhere is not a stream directory"),
    (f"{RECOMMEND} --data bare", 3, "bare has no sids.parquet"),
    ("tokens inspect bare", 3, "bare has no sids.parquet"),
    ("base pretrain --data bare --out new", 3, "bare has no sids.parquet"),
    ("base pretrain --data stream --out base", 2, "base exists and is not empty"),
    ("base pretrain --data stream --out new --preset huge", 2, "preset='huge'"),
    ("base init --from nowhere --data stream --out new", 3, "cannot load a causal LM from 'nowhere'"),
    ("base init --from base --data stream --out new --form words", 2, "form 'words' is not known"),
    ("config show typos.yaml", 2, "typos.yaml: 3 mistakes"),
    ("demo --out file", 2, "file exists and is not empty"),
]


@pytest.mark.parametrize(("line", "code", "text"), BAD, ids=[line for line, *_ in BAD])
def test_a_bad_call_is_two_lines_its_code_and_no_trace(
    line: str, code: int, text: str, traps: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(traps.folder)
    before = tree(traps.folder)
    answer = cladapt(line)
    error, hint = answer.err.splitlines()
    assert re.search(f"^error: .*{text}", error), error
    assert re.fullmatch("hint: .{8,}", hint)
    assert answer.code == code
    assert answer.out == ""
    assert tree(traps.folder) == before


def test_a_corrupt_adapter_stops_an_evaluation_and_leaves_no_metrics(traps: World, tmp_path: Path) -> None:
    shutil.copytree(traps.folder / "corrupt", tmp_path / "corrupt")
    (tmp_path / "corrupt" / "metrics.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(traps.folder)
        answer = cladapt(f"eval {tmp_path / 'corrupt'} --quiet")
    assert answer.code == 3
    assert "not a readable safetensors file" in answer.err
    assert len(answer.err.splitlines()) == 2
    assert not (tmp_path / "corrupt" / "metrics.json").exists()


def test_a_merge_that_fails_its_check_is_5_and_writes_nothing(inside: World, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = LoraModel.merge_and_unload

    def spoilt(self: LoraModel, *args: Any, **kwargs: Any) -> Any:
        next(p for name, p in self.named_parameters() if "lora_B" in name).data.add_(1.0)
        return merge(self, *args, **kwargs)

    monkeypatch.setattr(LoraModel, "merge_and_unload", spoilt)
    before = tree(inside.folder)
    answer = cladapt("merge run --out new")
    assert answer.code == 5
    assert re.match("error: merging .* changes the logits by .*\nhint: serve the adapter unmerged", answer.err)
    assert tree(inside.folder) == before


def test_no_run_yet_says_what_to_run_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.jsonl").write_text('{"user": "u", "history": []}')
    for line in ("eval", "export", "merge --out m", "recommend h.jsonl --out r.csv"):
        answer = cladapt(line)
        assert answer.code == 3
        assert answer.err == (
            "error: no run here: runs/latest.json does not exist\n"
            "hint: run `cladapt train` first, or name a run directory\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["h.jsonl"]
