"""Class-incremental learning end to end on small drawings: import, base, runs, measures, comparison, refusals."""

import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from cladapt.artifacts import read_parquet, read_tensors
from cladapt.config import AdapterConfig, ImagesConfig, ImageTrainConfig, MethodConfig, VitConfig, resolve
from cladapt.data.images import ImageStream
from cladapt.errors import CheckFailed, ConfigError, DataError, ExampleWarning
from cladapt.eval.classes import Outcomes
from cladapt.eval.images import BIASES, FURTHER, PROTOTYPES, ROWS, prototypes_of
from cladapt.model.cosine import CosineHead
from cladapt.model.features import block_means
from cladapt.model.saved import adapted
from cladapt.pipeline import evaluation, images, runs, ship
from cladapt.pipeline.compare import compare_runs
from cladapt.run import Run, open_run
from cladapt.train.sinks import MemorySink
from cladapt.workloads.classify import ClassifyConfig

TINY = VitConfig(hidden=16, layers=1, patch=4, epochs=8, lr=3e-3, batch_images=16, warp=0.05)
IMAGES = ImagesConfig(blocks=3, size=12)
CONFIG = ClassifyConfig(
    adapter=AdapterConfig(rank=2),
    method=MethodConfig(name="finetune"),
    train=ImageTrainConfig(epochs=3, lr=5e-3, batch_images=8),
)


def draw(folder: Path, classes: range, per_class: int = 10) -> None:
    """Bars at an angle of the class's own."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-6:6, -6:6] + 0.5
    for c in classes:
        angle = np.pi * c / 8
        bar = np.abs(x * np.sin(angle) + y * np.cos(angle)) < 1.5
        (folder / "alphabet" / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            noisy = np.where(bar, 220, 20) + rng.integers(0, 30, bar.shape)
            Image.fromarray(noisy.astype(np.uint8)).save(folder / "alphabet" / f"class{c}" / f"{i}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    draw(path / "drawings", range(6))
    draw(path / "others", range(6, 8))
    report = images.import_images(path / "drawings", path / "stream", IMAGES)
    assert [line["classes"] for line in report["blocks"]] == [2, 2, 2]
    images.make_base(path / "stream", path / "base", None, None, TINY, MemorySink())
    for name in ("finetune", "eblora"):
        train(path, path / name, name)
        evaluate(path / name)
    return path


def config_of(world: Path, name: str = "finetune", **changes: Any) -> ClassifyConfig:
    folders = {"data": str(world / "stream"), "base": str(world / "base")}
    return CONFIG.model_copy(update={**folders, "method": MethodConfig(name=name), **changes})


def train(world: Path, out: Path, name: str = "finetune", sink: Any = None, **changes: Any) -> dict[str, Any]:
    return runs.train(config_of(world, name, **changes), out, sink or MemorySink())


def evaluate(path: Path) -> dict[str, Any]:
    return evaluation.evaluate(path, {"bootstrap": 100}, None, MemorySink())


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_block_of_one_class_is_said_to_teach_nothing(tmp_path: Path) -> None:
    draw(tmp_path / "drawings", range(4))
    images.import_images(tmp_path / "drawings", tmp_path / "stream", IMAGES.model_copy(update={"blocks": 4}))
    images.make_base(tmp_path / "stream", tmp_path / "base", None, None, TINY, MemorySink())
    with pytest.warns(ExampleWarning, match=r"^block \d has the class '.*class\d' alone") as found:
        train(tmp_path, tmp_path / "run")
    own = [str(each.message)[:7] for each in found if each.category is ExampleWarning]
    assert sorted(set(own)) == ["block 2", "block 3", "block 4"]


@pytest.mark.parametrize("name", ["finetune", "eblora"])
def test_a_run_leaves_adapters_rows_measures_and_a_report(name: str, world: Path) -> None:
    run = world / name
    stream = ImageStream.load(world / "stream")
    assert sorted(open_run(run).adapters) == [2, 3]  # the base has learned block 1
    rows = read_parquet(run / "images" / "rows.parquet", ROWS)
    assert rows.height == 3 * sum(len(stream.rows(b, "test")) for b in (1, 2, 3))
    assert rows.filter(pl.col("block") > pl.col("model"))["correct"].null_count() == rows["correct"].null_count()
    metrics = json.loads((run / "metrics.json").read_text())
    accuracy, probe = Outcomes.of(rows).matrices()
    for cell in metrics["matrix"]:
        at = cell["model_block"] - 1, cell["block"] - 1
        assert cell["probe"] == pytest.approx(probe[at])
        seen = cell["block"] <= cell["model_block"]
        assert cell["accuracy"] == (pytest.approx(accuracy[at]) if seen else None)
        for classifier in FURTHER:
            own = rows.filter((pl.col("model") == cell["model_block"]) & (pl.col("block") == cell["block"]))
            assert cell[classifier] == (pytest.approx(own[classifier].mean()) if seen else None)
    assert (metrics["schema_version"], metrics["task"], metrics["method"]) == (2, "classify", name)
    assert (metrics["base_block"], metrics["stream"]) == (1, stream.fingerprint)
    assert metrics["config"]["bootstrap"] == 100
    (line,) = metrics["table"]
    own = {model: np.nanmean(accuracy[model - 1]) for model in (1, 2, 3)}  # blocks of two classes each, as many images
    assert line["model"] == name
    assert line["ACC"] == pytest.approx(own[3])
    assert line["MAA"] == pytest.approx(np.mean(list(own.values())))
    assert line["BWT"] == pytest.approx(np.mean([accuracy[2, j] - accuracy[j, j] for j in (0, 1)]))
    assert [line["classifier"] for line in metrics["classifiers"]] == ["head", *FURTHER]
    for of_classifier, column in zip(metrics["classifiers"], ("correct", *FURTHER), strict=True):
        last = rows.filter(pl.col("model") == 3).group_by("block").agg(pl.col(column).mean())[column].mean()
        assert of_classifier["ACC"] == pytest.approx(last)
        assert of_classifier.get("ACC - head", 0.0) == pytest.approx(last - line["ACC"])
        assert "FWT" not in of_classifier
    assert [line["block"] for line in metrics["spectrum"]] == [2, 3]
    page = (run / "report.html").read_text()
    assert "Spectrum of the adapters" in page
    assert page.count("it chooses epochs and does not compare methods or classifiers, which ACC does.") == 1
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    spectra = [e for e in events if e["kind"] == "spectrum"]
    assert [e["block"] for e in spectra] == [2, 3]
    assert all(len(values) >= 2 for values in spectra[0]["modules"].values())


def test_prototypes_are_of_the_model_after_each_classs_block_and_biases_of_every_model(world: Path) -> None:
    run, stream = open_run(world / "finetune"), ImageStream.load(world / "stream")
    found = prototypes_of(read_parquet(run.path / "images" / "prototypes.parquet", PROTOTYPES))
    biases = read_parquet(run.path / "images" / "biases.parquet", BIASES)
    assert biases.select("model", "block").rows() == [(m, b) for m in (1, 2, 3) for b in range(1, m + 1)]
    _, base = run.workload.open_inputs(run.config)
    for block in (1, 2, 3):
        with nullcontext(base.model) if block == 1 else adapted(base, run.adapters[block]) as model:
            means = block_means(model, stream, block, 5)
        torch.testing.assert_close(found[stream.classes_of(block)], means, rtol=0, atol=1e-5)


def test_what_was_measured_is_kept_until_a_model_before_it_changes(world: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(world / "finetune", tmp_path / "run"))
    before = {file.name: read_parquet(file, {}) for file in (path / "images").iterdir()}
    assert evaluate(path)["cells"] == {"measured": 0, "kept": 9}
    metrics = json.loads((path / "metrics.json").read_text())
    metrics["measured"]["adapters"]["2"] = "another"
    (path / "metrics.json").write_text(json.dumps(metrics))
    # the prototypes of block 2 are no longer known to be those that model 3 was judged by
    assert evaluate(path)["cells"] == {"measured": 6, "kept": 3}
    assert all(read_parquet(path / "images" / name, {}).equals(frame) for name, frame in before.items())


def test_an_evaluation_without_a_classifier_is_measured_anew_with_a_note(world: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(world / "finetune", tmp_path / "run"))
    rows = read_parquet(path / "images" / "rows.parquet", ROWS)
    rows.drop(*FURTHER).write_parquet(path / "images" / "rows.parquet")
    with pytest.raises(
        DataError, match=rf"wrong columns \(biased: missing; prototype: missing\) \(cladapt eval {path}"
    ):
        compare_runs([path])
    sink = MemorySink()
    result = evaluation.evaluate(path, {"bootstrap": 100}, None, sink)
    (note,) = [event["text"] for event in sink.events if "anew" in event.get("text", "")]
    assert "all is measured anew: the earlier evaluation cannot be used" in note
    assert "biased: missing; prototype: missing" in note
    assert result["cells"] == {"measured": 9, "kept": 0}
    assert read_parquet(path / "images" / "rows.parquet", ROWS).equals(rows)
    read_parquet(path / "images" / "prototypes.parquet", PROTOTYPES)[1:].write_parquet(
        path / "images" / "prototypes.parquet"
    )
    with pytest.raises(DataError, match=r"prototypes of the classes \[1, 2, 3, 4, 5\]"):
        compare_runs([path])


def test_validation_images_judge_no_biases(world: Path, tmp_path: Path) -> None:
    sink, paths = (
        MemorySink(),
        [Path(shutil.copytree(world / name, tmp_path / name)) for name in ("finetune", "eblora")],
    )
    for path in paths:
        result = evaluation.evaluate(path, {"bootstrap": 100, "targets": "valid"}, None, sink)
        assert [line["classifier"] for line in result["classifiers"]] == ["head", "prototype"]
    notes = [event["text"] for event in sink.events if event.get("text", "").startswith("biased")]
    expected = "biased: left out, for biases are fitted on validation images, and eval.targets=valid tests these"
    assert notes == [expected] * 2
    found = compare_runs(paths, tmp_path / "out")
    assert "prototype_summary" in found
    assert "biased_summary" not in found


def test_rows_of_classes_that_are_not_learned_stay_as_they_are(world: Path) -> None:
    stream = ImageStream.load(world / "stream")
    heads = {
        block: read_tensors(folder / "adapter_model.safetensors")["base_model.model.classifier.weight"]
        for block, folder in open_run(world / "finetune").adapters.items()
    }
    base = read_tensors(world / "base" / "model.safetensors")["classifier.weight"]
    for block, before in ((2, base), (3, heads[2])):
        own = torch.from_numpy(stream.classes_of(block))
        others = torch.tensor([c for c in range(6) if c not in own])
        assert torch.equal(heads[block][others], before[others])
        assert not torch.equal(heads[block][own], before[own])


class Stops(MemorySink):
    def emit(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "step" and (event["block"], event["step"]) == (3, 4):
            raise KeyboardInterrupt
        super().emit(event)


def test_an_interrupted_run_ends_as_if_it_had_not_been(world: Path, tmp_path: Path) -> None:
    changes = {"train": CONFIG.train.model_copy(update={"checkpoint_steps": 1})}
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "run", "eblora", Stops(), **changes)
    with pytest.raises(ConfigError, match=r"train\.lr=0\.1, the run has 0\.005"):
        runs.resume(tmp_path / "run", MemorySink(), {"train": {"lr": 0.1}})
    with pytest.raises(ConfigError, match=r"--task recommend: .*run is a run of --task classify \(leave out --task"):
        runs.resume(tmp_path / "run", MemorySink(), {}, "recommend")
    runs.resume(tmp_path / "run", MemorySink())
    for block in (2, 3):
        file = Path("adapters") / f"block_{block:03d}" / "adapter_model.safetensors"
        one, other = read_tensors(world / "eblora" / file), read_tensors(tmp_path / "run" / file)
        assert all(torch.equal(t, other[name]) for name, t in one.items()), block


def heads_of(run: Path) -> dict[int, dict[str, torch.Tensor]]:
    """The classifier of every adapter."""
    found = {}
    for block, folder in open_run(run).adapters.items():
        tensors = read_tensors(folder / "adapter_model.safetensors")
        found[block] = {name.rpartition(".")[2]: t for name, t in tensors.items() if ".classifier." in name}
    return found


@pytest.mark.parametrize("name", ["finetune", "olora"])
def test_a_cosine_head_starts_at_class_means_and_is_saved_with_rows_of_length_one(
    name: str, world: Path, tmp_path: Path
) -> None:
    still = {"head": "cosine", "train": CONFIG.train.model_copy(update={"lr": 1e-12})}
    train(world, tmp_path / "run", name, **still)
    run, stream = open_run(tmp_path / "run"), ImageStream.load(world / "stream")
    _, base = run.workload.open_inputs(run.config)
    assert isinstance(base.classifier, CosineHead)
    heads = heads_of(run.path)
    # nothing moved but rows: each block's are the means that a new adapter, B = 0, leaves them at
    expected = torch.cat([block_means(base.model, stream, block, 8) for block in (1, 2, 3)])
    torch.testing.assert_close(heads[3]["weight"], expected, rtol=0, atol=1e-5)
    assert torch.equal(base.classifier.weight[:2], expected[:2])
    assert torch.equal(heads[3]["weight"][:4], heads[2]["weight"][:4])
    assert not heads[2]["weight"][4:].any()
    assert not heads[3]["bias"].any()
    assert [*run.inputs] == ["data", "base"]  # means may differ in their last bits between machines
    made = json.loads((run.adapters[3] / "cladapt.json").read_text())
    assert (made["head"], made["head_scale"]) == ("cosine", 16.0)
    evaluate(run.path)
    rows = read_parquet(run.path / "images" / "rows.parquet", ROWS)
    assert rows["correct"].equals(rows["prototype"].alias("correct"))  # one and the same where nothing has moved


@pytest.mark.parametrize("name", ["eblora", "olora"])
def test_an_interrupted_run_with_a_cosine_head_ends_as_if_it_had_not_been(
    name: str, world: Path, tmp_path: Path
) -> None:
    changes = {"head": "cosine", "train": CONFIG.train.model_copy(update={"checkpoint_steps": 1})}
    train(world, tmp_path / "whole", name, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(world, tmp_path / "run", name, Stops(), **changes)
    runs.resume(tmp_path / "run", MemorySink())
    # and where block 3 begins anew from what block 2 has left on disk
    shutil.copytree(tmp_path / "whole", tmp_path / "later")
    shutil.rmtree(tmp_path / "later" / "adapters" / "block_003")
    runs.resume(tmp_path / "later", MemorySink())
    for block in (2, 3):
        file = Path("adapters") / f"block_{block:03d}" / "adapter_model.safetensors"
        whole = read_tensors(tmp_path / "whole" / file)
        torch.testing.assert_close(
            whole["base_model.model.classifier.weight"].norm(dim=1)[: 2 * block], torch.ones(2 * block)
        )
        for run in ("run", "later"):
            other = read_tensors(tmp_path / run / file)
            assert all(torch.equal(t, other[key]) for key, t in whole.items()), (run, block)


def test_a_head_of_another_kind_is_told(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="head_scale=8 needs head=cosine, head is linear"):
        resolve(ClassifyConfig, {"head_scale": 8.0})
    made = "adapters/block_002/cladapt.json"
    other = changed(world, "finetune", tmp_path / "a", made, lambda r: r.update(head="cosine"))
    taught = r"block_002 was taught with head=cosine, the run has head=linear: .*misread \(use head=cosine"
    with pytest.raises(ConfigError, match=taught):
        evaluate(other)
    with pytest.raises(ConfigError, match=taught):
        runs.resume(other, MemorySink())
    other = changed(world, "finetune", tmp_path / "b", made, lambda r: r.update(head="round"))
    with pytest.raises(DataError, match=r"block_002/cladapt\.json has head='round': .*'linear' or 'cosine'"):
        evaluate(other)


def test_a_run_from_before_there_were_heads_is_the_same_run(world: Path, tmp_path: Path) -> None:
    def without(record: Any) -> None:
        del record["config"]["head"], record["config"]["head_scale"]

    older = changed(world, "finetune", tmp_path / "a", "config.json", without)
    assert open_run(older).config_hash == open_run(world / "finetune").config_hash
    assert evaluate(older)["cells"] == {"measured": 0, "kept": 9}
    config, others = open_run(older).config, ({}, {"head": "cosine"}, {"head_scale": 8.0})
    hashes = {Run(older, config.model_copy(update=changes)).config_hash for changes in others}
    assert len(hashes) == 3


def test_runs_are_compared_by_image(world: Path, tmp_path: Path) -> None:
    found = compare_runs([world / "finetune", world / "eblora"], tmp_path / "out")
    assert found["stream"] == ImageStream.load(world / "stream").fingerprint
    assert [(group["name"], group["seeds"]) for group in found["groups"]] == [("finetune", [0]), ("eblora", [0])]
    assert [line["model"] for line in found["summary"]] == ["finetune", "eblora"]
    (line,) = [line for line in found["differences"] if line["metric"] == "ACC"]
    means = {line["model"]: line["ACC"] for line in found["summary"]}
    assert line["effect"] == pytest.approx(means["eblora"] - means["finetune"])
    assert line["low"] <= line["effect"] <= line["high"]
    for classifier in FURTHER:
        lines = {line["model"]: line for line in found[f"{classifier}_summary"]}
        (line,) = [line for line in found[f"{classifier}_differences"] if line["metric"] == "ACC"]
        assert line["effect"] == pytest.approx(lines["eblora"]["ACC"] - lines["finetune"]["ACC"])
        assert lines["eblora"]["ACC - head"] == pytest.approx(lines["eblora"]["ACC"] - means["eblora"])
        assert pl.read_csv(tmp_path / "out" / f"{classifier}_differences.csv").height == 5
    assert pl.read_csv(tmp_path / "out" / "differences.csv").height == 6
    assert pl.read_csv(tmp_path / "out" / "summary.csv")["ACC"].to_list() == pytest.approx([*means.values()], abs=1e-6)
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 3
    assert str(world / "eblora") in html
    assert f"{means['eblora']:.4f}" in html


def test_a_plan_counts_and_writes_nothing(world: Path, tmp_path: Path) -> None:
    plan = runs.plan(config_of(world, "eblora"))
    assert [line["block"] for line in plan["blocks"]] == [2, 3]
    stream = ImageStream.load(world / "stream")
    assert plan["blocks"][0]["steps"] == 3 * -(-len(stream.rows(2, "train")) // 8)
    assert list(tmp_path.iterdir()) == []


def test_a_base_may_learn_other_images_and_then_all_blocks_are_to_come(world: Path, tmp_path: Path) -> None:
    settings = TINY.model_copy(update={"epochs": 1})
    report = images.make_base(world / "stream", tmp_path / "base", world / "others", None, settings, MemorySink())
    assert report["fitted_block"] == 0
    config = config_of(world).model_copy(update={"base": str(tmp_path / "base")})
    assert [line["block"] for line in runs.plan(config)["blocks"]] == [1, 2, 3]


def test_a_given_checkpoint_must_take_the_streams_images(world: Path, tmp_path: Path) -> None:
    report = images.make_base(world / "stream", tmp_path / "a", None, str(world / "base"), TINY, MemorySink())
    assert report["fitted_block"] == 0
    images.import_images(world / "drawings", tmp_path / "larger", ImagesConfig(blocks=3, size=16))
    with pytest.raises(ConfigError, match="takes 1 channels of 12 pixels, the stream has 1 of 16"):
        images.make_base(tmp_path / "larger", tmp_path / "b", None, str(world / "base"), TINY, MemorySink())
    with pytest.raises(ConfigError, match="--source and --init both"):
        images.make_base(world / "stream", tmp_path / "c", world / "others", "x", TINY, MemorySink())


def test_classes_of_another_source_are_left_out(world: Path, tmp_path: Path) -> None:
    draw(tmp_path / "both", range(2, 8))
    report = images.import_images(
        tmp_path / "both", tmp_path / "s", ImagesConfig(blocks=2, size=12), [world / "others"]
    )
    assert (report["classes"], report["excluded"]) == (4, 2)
    with pytest.raises(ConfigError, match=r"--exclude names no class of .*: its classes are like 'alphabet/class0'"):
        images.import_images(world / "drawings", tmp_path / "t", IMAGES, [world / "others"])


def test_what_does_not_belong_together_is_refused(world: Path, tmp_path: Path) -> None:
    images.import_images(world / "drawings", tmp_path / "again", ImagesConfig(blocks=3, size=12, seed=1))
    config = config_of(world).model_copy(update={"data": str(tmp_path / "again")})
    with pytest.raises(DataError, match="was made for the stream"):
        runs.train(config, tmp_path / "run", MemorySink())
    with pytest.raises(ConfigError, match="without base"):
        runs.train(config.model_copy(update={"base": ""}), tmp_path / "run", MemorySink())
    with pytest.raises(ConfigError, match=r"is a run of --task classify \(this works for runs that recommend"):
        ship.find_source(world / "finetune", None, None)
    shutil.copytree(world / "finetune", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "adapters" / "block_003")
    with pytest.raises(DataError, match=r"has adapters for the blocks \[2\], the stream needs \[2, 3\]"):
        evaluate(tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "images")
    with pytest.raises(DataError, match="is not evaluated yet"):
        compare_runs([tmp_path / "half"])
    with pytest.raises(ConfigError, match="is given twice"):
        compare_runs([world / "finetune", world / "finetune"])


@pytest.mark.parametrize(
    ("settings", "block", "option"),
    [({}, 2, "--block"), ({"top_k": [5]}, None, "--top-k"), ({"beams": 5}, None, "--beams")],
)
def test_what_only_recommending_has_is_refused(settings: Any, block: int | None, option: str, world: Path) -> None:
    sink = MemorySink()
    with pytest.raises(ConfigError, match=rf"{option}: .*eblora is a run of --task classify \(leave them out\)"):
        evaluation.evaluate(world / "eblora", settings, block, sink)
    assert sink.events == []


def test_the_ranges_of_a_file_are_checked(world: Path, tmp_path: Path) -> None:
    good, bad, strange = (tmp_path / f"{name}.yaml" for name in ("good", "bad", "strange"))
    (line,) = json.loads((world / "eblora" / "metrics.json").read_text())["table"]
    good.write_text(f"eblora: {{ACC: [{line['ACC'] - 1e-6}, {line['ACC'] + 1e-6}]}}")
    bad.write_text("eblora: {ACC: [2, 3], BWT: [-1, 1]}")
    strange.write_text("eblora: {HR@10: [0, 1]}\nfrozen: {ACC: [0, 1]}")
    evaluation.evaluate(world / "eblora", {"bootstrap": 100}, None, MemorySink(), good)
    with pytest.raises(CheckFailed, match=r"1 of 2 expected values do not hold: eblora: ACC=.* is outside \[2, 3\]"):
        evaluation.evaluate(world / "eblora", {"bootstrap": 100}, None, MemorySink(), bad)
    with pytest.raises(ConfigError, match=r"no metric 'HR@10'.*no line 'frozen'"):
        evaluation.evaluate(world / "eblora", {}, None, MemorySink(), strange)


def changed(world: Path, name: str, target: Path, file: str, change: Any) -> Path:
    shutil.copytree(world / name, target)
    record = json.loads((target / file).read_text())
    change(record)
    (target / file).write_text(json.dumps(record))
    return target


def test_runs_that_do_not_answer_one_question_are_not_compared(world: Path, tmp_path: Path) -> None:
    first = world / "finetune"
    other = changed(world, "eblora", tmp_path / "a", "metrics.json", lambda m: m.update(stream="elsewhere"))
    with pytest.raises(DataError, match=r"on elsewhere \(compare runs on one stream per seed"):
        compare_runs([first, other])
    other = changed(world, "eblora", tmp_path / "b", "metrics.json", lambda m: m["config"].update(targets="valid"))
    with pytest.raises(ConfigError, match="were evaluated differently: targets test against valid"):
        compare_runs([first, other])
    other = changed(world, "eblora", tmp_path / "c", "config.json", lambda r: r["config"].update(seed=1))
    with pytest.raises(ConfigError, match=r"the groups have different seeds \(finetune: 0; eblora: 1\)"):
        compare_runs([first, other])
    rows = pl.read_parquet(world / "eblora" / "images" / "rows.parquet")
    shutil.copytree(world / "eblora", tmp_path / "d")
    rows.filter(pl.col("model") < 3).write_parquet(tmp_path / "d" / "images" / "rows.parquet")
    with pytest.raises(ConfigError, match=r"models after the blocks \[1, 2, 3\] against \[1, 2\]"):
        compare_runs([first, tmp_path / "d"])


def test_seeds_may_have_their_own_stream_and_base_but_each_seed_one(world: Path, tmp_path: Path) -> None:
    images.import_images(world / "drawings", tmp_path / "s", IMAGES.model_copy(update={"seed": 1}))
    for name in ("base", "other"):
        seed = TINY.model_copy(update={"seed": 1, "epochs": 1 if name == "base" else 2})
        images.make_base(tmp_path / "s", tmp_path / name, None, None, seed, MemorySink())
    made = json.loads((tmp_path / "other" / "cladapt.json").read_text())
    made["config"]["epochs"] = TINY.epochs  # as if made alike
    (tmp_path / "other" / "cladapt.json").write_text(json.dumps(made))
    made = json.loads((tmp_path / "base" / "cladapt.json").read_text())
    made["config"]["epochs"] = TINY.epochs
    (tmp_path / "base" / "cladapt.json").write_text(json.dumps(made))
    for run, base in (("finetune", "base"), ("eblora", "base"), ("apart", "other")):
        config = config_of(world, "eblora" if run == "apart" else run, seed=1)
        config = config.model_copy(update={"data": str(tmp_path / "s"), "base": str(tmp_path / base)})
        runs.train(config, tmp_path / run, MemorySink())
        evaluate(tmp_path / run)
    given = [world / "finetune", tmp_path / "finetune", world / "eblora", tmp_path / "eblora"]
    found = compare_runs(given)
    assert [group["seeds"] for group in found["groups"]] == [[0, 1], [0, 1]]
    assert found["stream"] == [
        ImageStream.load(folder / "s" if folder == tmp_path else folder / "stream").fingerprint
        for folder in (world, tmp_path)
    ]
    means = [json.loads((path / "metrics.json").read_text())["table"][0]["ACC"] for path in given]
    assert found["summary"][0]["ACC"] == pytest.approx(np.mean(means[:2]))
    assert found["summary"][1]["ACC"] == pytest.approx(np.mean(means[2:]))
    with pytest.raises(ConfigError, match="have seed=1 but stand on bases that differ in their own seed"):
        compare_runs([*given[:3], tmp_path / "apart"])


def test_a_method_that_does_not_train_leaves_its_base_and_nothing_else(world: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "frozen", "frozen")
    assert open_run(tmp_path / "frozen").adapters == {}
    assert evaluate(tmp_path / "frozen")["table"][0]["model"] == "frozen"
    shutil.copytree(world / "finetune" / "adapters", tmp_path / "frozen" / "adapters")
    with pytest.raises(DataError, match=r"has adapters for the blocks \[2, 3\], frozen leaves none"):
        evaluate(tmp_path / "frozen")
