"""One driver of studies for every task: cells, seeds, references, pairs, `--only`, and mistakes told first."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from cladapt.artifacts import read_json
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError
from cladapt.tokens.build import load_sids

BENCH = Path(__file__).parents[2] / "bench"
INTERACTIONS: dict[str, Any] = {
    "simulate": {"users": 30, "items": 30, "topics": 4, "blocks": 3},
    "tokens": {"dimensions": 8, "levels": 2, "codes": 4},
    "base": {"epochs": 1},
    "run": {"train": {"epochs": 1}, "adapter": {"rank": 2}, "eval": {"bootstrap": 100, "scope": "current"}},
    "cells": {"finetune": {"method": {"name": "finetune"}}, "peso": {}, "frozen": {"method": {"name": "frozen"}}},
    "references": ["peso"],
    "pairs": [["finetune", "frozen"]],
    "seeds": [0, 1],
}
IMAGES: dict[str, Any] = {
    "task": "classify",
    "source": "own",
    "pretrain": "other",
    "images": {"blocks": 2, "size": 8},
    "vision": {"hidden": 16, "layers": 1, "epochs": 1},
    "run": {"train": {"epochs": 1}, "adapter": {"rank": 2}, "eval": {"bootstrap": 100}},
    "cells": {"finetune": {"method": {"name": "finetune"}}, "peso": {}, "olora": {"method": {"name": "olora"}}},
    "references": ["finetune", "peso"],
    "pairs": [["olora", "peso"]],
    "seeds": [0, 1],
}


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """bench/study.py as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.chdir(tmp_path)
    for name in ("inputs", "study"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("study")


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, classes in (("own", 4), ("other", 2)):
        for c in range(classes):
            (tmp_path / "data" / name / f"{name}{c}").mkdir(parents=True)
            for i in range(5):
                pixels = rng.integers(0, 60, (8, 8)) + 40 * c
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / name / f"{name}{c}" / f"{i}.png")
    return tmp_path / "data"


def made(
    study: Any, recipe: dict[str, Any], data: Path, only: list[str] | None = None, seeds: list[int] | None = None
) -> tuple[Any, dict[str, Any]]:
    one = study.Study("mini", study.recipe_of(recipe, "mini.yaml"), Path("work"), data)
    done = [(cell, one.run(cell)) for cell in one.cells(only, seeds)]
    return done, study.tables(one.recipe, done)


def test_a_study_of_refreshed_ids(study: Any, tmp_path: Path) -> None:
    recipe = {
        **INTERACTIONS,
        "simulate": {**INTERACTIONS["simulate"], "users": 90},
        "refreshes": [{"through": 2}, {"through": 2, "align": False}],
        "after": 2,
        "run": {**INTERACTIONS["run"], "method": {"name": "finetune"}, "eval": {"bootstrap": 100}},
        "cells": {"frozen IDs": {"ids": 1}, "aligned": {"ids": 2}, "not aligned": {"ids": 3}},
        "references": [],
        "pairs": [["aligned", "not aligned"]],
        "seeds": [0],
    }
    done, tables = made(study, recipe, tmp_path)
    starts = {cell.config.from_adapter for cell, _ in done}
    assert len(starts) == 1
    assert starts.pop().endswith("block_002")
    ids = {line["cell"]: line for line in tables["ids"].to_dicts()}
    assert [ids[name]["ids"] for name in recipe["cells"]] == [1, 2, 3]
    assert ids["frozen IDs"]["moved"] is None
    assert ids["aligned"]["moved"] < ids["not aligned"]["moved"]
    versions = [read_json(folder / "adapters" / "block_003" / "cladapt.json")["ids"]["version"] for _, folder in done]
    assert versions == [1, 2, 3]
    assert tables["cells"]["backward transfer"].null_count() == 0
    assert "difference" in tables["differences"].columns


def test_a_study_of_recommendations(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, tables = made(study, INTERACTIONS, tmp_path)
    assert [(cell.name, cell.seed) for cell, _ in done] == [(n, s) for s in (0, 1) for n in INTERACTIONS["cells"]]
    assert len({cell.config.data for cell, _ in done}) == 1
    assert len({cell.config.base for cell, _ in done}) == 2
    cells, summary, differences = (tables[name] for name in ("cells", "summary", "differences"))
    for cell, folder in done:
        row = cells.row(by_predicate=(pl.col("cell") == cell.name) & (pl.col("seed") == cell.seed), named=True)
        line = read_json(folder / "metrics.json")["table"][0]
        assert {key: row[key] for key in ("HR@10", "log_likelihood")} == {
            key: pytest.approx(line[key]) for key in ("HR@10", "log_likelihood")
        }
        changes = read_json(folder / "metrics.json")["interference"]
        for figure in ("change", "alignment"):
            each = [block[figure] for block in changes]
            assert row[figure] == (pytest.approx(sum(each) / len(each)) if each else None)
        assert bool(changes) == (cell.name != "frozen")
    mean = cells.filter(pl.col("cell") == "peso")["log_likelihood"].mean()
    assert summary.row(by_predicate=pl.col("model") == "peso", named=True)["log_likelihood"] == pytest.approx(mean)
    names = differences["difference"].to_list()
    assert names[:2] == ["finetune - peso", "frozen - peso"]
    assert names[-1] == "finetune - frozen"
    assert {"peso - markov", "peso - block popularity"} <= {*names}
    assert {"next_block_summary", "next_block_differences"} <= tables.keys()
    tails, gains = tables["tails"], tables["tails_differences"]
    assert {*tails["model"]} == {*summary["model"]} - {"ceiling"}
    by_cell = {(row["model"], row["group"]): row for row in tails.to_dicts()}
    assert {*gains["difference"]} == {"finetune - frozen"}
    for row in gains.to_dicts():
        one, two = (by_cell[name, row["group"]] for name in ("finetune", "frozen"))
        assert one["tests"] == two["tests"]
        for metric in ("HR@10", "NDCG@10", "log_likelihood"):
            assert row[metric] == pytest.approx(one[metric] - two[metric])
            assert row[f"{metric} low"] <= row[metric] <= row[f"{metric} high"]
    capsys.readouterr()
    again, same = made(study, INTERACTIONS, tmp_path)
    assert capsys.readouterr().err == ""  # everything was there
    assert [path for _, path in again] == [path for _, path in done]
    assert all(frame.equals(same[name]) for name, frame in tables.items())
    _, some = made(study, INTERACTIONS, tmp_path, ["finetune", "frozen"])  # without the reference
    assert [*some["cells"]["cell"].unique(maintain_order=True)] == ["finetune", "frozen"]
    assert some["differences"]["difference"].to_list()[0] == "frozen - finetune"
    monkeypatch.setattr(study, "regulariser_log", lambda _: [{"peso/term, last": None}, {"peso/term, last": 3.0}])
    logged = study.tables(study.recipe_of(INTERACTIONS, "mini.yaml"), again)["cells"]["peso term, last"]
    assert {*logged} == {3.0}  # a value that was not finite is no part of a mean


def test_cells_may_have_ids_of_their_own(study: Any, tmp_path: Path) -> None:
    cells = {"four": {}, "three": {"tokens": {"codes": 3}}, "frozen": {"method": {"name": "frozen"}}}
    done, tables = made(study, {**INTERACTIONS, "cells": cells, "references": [], "pairs": []}, tmp_path, seeds=[0])
    four, three, frozen = (cell.config for cell, _ in done)
    assert (four.data, four.base) == (frozen.data, frozen.base)
    for folder, codes in ((four.data, 4), (three.data, 3)):
        assert load_sids(Path(folder), Stream.load(Path(folder))).sizes[0] == codes
    assert three.base != four.base
    rows = {row["model"] for row in tables["summary"].to_dicts()}
    assert {"four", "three"} <= rows


def test_a_study_of_classes(study: Any, drawings: Path) -> None:
    done, tables = made(study, IMAGES, drawings)
    assert not [name for name in tables if name.startswith("tails")]
    assert len({cell.config.data for cell, _ in done}) == len({cell.config.base for cell, _ in done}) == 2
    cells, summary = tables["cells"], tables["summary"]
    wanted = {
        "ACC",
        "MAA",
        "learning",
        "BWT",
        "forgetting",
        "FWT",
        "norm",
        "imbalance",
        "change",
        "alignment",
        "seconds",
    }
    assert wanted <= {*cells.columns}
    for name in IMAGES["cells"]:
        mean = cells.filter(pl.col("cell") == name)["ACC"].mean()
        assert summary.row(by_predicate=pl.col("model") == name, named=True)["ACC"] == pytest.approx(mean)
        for classifier in ("biased", "prototype"):
            mean = cells.filter(pl.col("cell") == name)[f"{classifier} ACC"].mean()
            line = tables[f"{classifier}_summary"].row(by_predicate=pl.col("model") == name, named=True)
            assert line["ACC"] == pytest.approx(mean)
    assert tables["prototype_differences"]["difference"].to_list() == tables["differences"]["difference"].to_list()
    names = tables["differences"]["difference"].to_list()
    assert names == ["peso - finetune", "olora - finetune", "finetune - peso", "olora - peso", "olora - peso"]
    one, two = (summary.row(by_predicate=pl.col("model") == name, named=True)["ACC"] for name in ("olora", "peso"))
    assert tables["differences"].row(-1, named=True)["ACC"] == pytest.approx(one - two)
    _, some = made(study, IMAGES, drawings, ["olora"])
    assert some["summary"]["model"].to_list() == ["olora"]
    assert some["differences"].is_empty()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"task": "rank"}, "task='rank' has no studies"),
        ({"cells": {}}, "at least 1 item"),
        ({"references": ["pesto"]}, "references or pairs name pesto"),
        ({"pairs": [["peso", "sgd"]]}, "references or pairs name sgd"),
        ({"cells": {"peso": {}, "bad": {"train": {"lrr": 1}}}}, "cell bad: 1 mistake: unknown key 'train.lrr'"),
        ({"cells": {"peso": {}, "bad": {"method": {"name": "pesto"}}}}, "no method 'pesto'"),
        ({"cells": {"peso": {}, "bad": {"base": {"epoch": 1}}}}, "unknown key 'epoch'"),
    ],
)
def test_mistakes_show_before_anything_is_made(change: dict[str, Any], text: str, study: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        study.recipe_of({**INTERACTIONS, "pairs": [], **change}, "mini.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_study_of_sequential_models(study: Any, tmp_path: Path) -> None:
    recipe = {
        **{key: INTERACTIONS[key] for key in ("simulate", "run")},
        "task": "sequential",
        "base": {"hidden": 8, "layers": 1, "epochs": 1, "table": {"dimensions": 12}},
        "cells": {
            "drawn": {},
            "drawn, again": {"train": {"lr": 1e-2}},
            "rec-pca, norm": {"base": {"normalise": "both", "table": {"source": "llm", "reduction": "rec-pca"}}},
        },
        "seeds": [0],
    }
    done, tables = made(study, recipe, tmp_path)
    assert len({cell.config.base for cell, _ in done}) == 2
    assert not list((tmp_path / "work" / "streams").rglob("sids.parquet"))
    for (_, folder), row in zip(done, tables["cells"].to_dicts(), strict=True):
        first, *_, last = read_json(folder / "metrics.json")["diagnostics"]
        for figure in ("training_loss", "condition_log10", "norm_dispersion", "collaborative_overlap"):
            assert row[f"base {figure}"] == pytest.approx(first[figure])
            assert row[f"last {figure}"] == pytest.approx(last[figure])
    assert {*tables["summary"]["model"]} >= {"drawn", "rec-pca, norm", "block popularity", "markov"}


def test_a_cell_that_is_not_there_is_refused(study: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--only pesto: no such cell \(cells: finetune, peso, frozen\)"):
        made(study, INTERACTIONS, tmp_path, ["peso", "pesto"])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("path", sorted(BENCH.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_resolves(path: Path, study: Any) -> None:
    recipe = study.recipe_of(study.load_recipe(path), str(path))
    named = "sequential" if path.stem.startswith(("sequential", "backbones")) else "recommend"
    assert recipe.task == ("classify" if "omniglot" in path.stem else named)


def test_a_pretrained_base_is_tuned_once_for_its_cells(study: Any, checkpoint: Any, tmp_path: Path) -> None:
    checkpoint(tmp_path / "data" / "llm")
    recipe = {
        **INTERACTIONS,
        "base": {"source": "llm", "epochs": 0, "tune": {"epochs": 1}},
        "cells": {
            "tuned": {"method": {"name": "finetune"}},
            "again": {"method": {"name": "finetune"}, "train": {"lr": 1e-3}},
            "drawn": {"method": {"name": "finetune"}, "base": {"weights": "random"}},
            "by LoRA": {"method": {"name": "finetune"}, "base": {"tune": {"rank": 2}}},
            "scratch": {"method": {"name": "finetune"}, "base": {"source": "", "tune": None, "epochs": 1}},
        },
        "references": ["tuned"],
        "pairs": [],
    }
    done, tables = made(study, recipe, tmp_path / "data", seeds=[1])
    bases = {cell.name: Path(cell.config.base) for cell, _ in done}
    assert [cell.seed for cell, _ in done] == [1] * 5
    assert bases["tuned"] == bases["again"]
    assert len({*bases.values()}) == 4
    assert {read_json(base / "cladapt.json")["fitted_block"] for base in bases.values()} == {1}
    assert {cell.base for cell, _ in done if cell.name in ("tuned", "again")} == {done[0][0].base}
    assert tables["differences"]["difference"].to_list()[0] == "again - tuned"
    titled = {row["model"] for row in tables["tails"].to_dicts() if row["group"].startswith("title")}
    assert {"tuned", "drawn", "by LoRA"} <= titled
    assert "scratch" not in titled  # its tokenizer has no words
    with pytest.raises(ConfigError, match="--seeds 7: no such seed"):
        made(study, recipe, tmp_path / "data", seeds=[7])
