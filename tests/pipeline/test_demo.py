"""The demo on a stream of toy size: both methods side by side, reports and an export."""

from pathlib import Path
from typing import Any

import pytest

from cladapt.artifacts import read_json
from cladapt.config import PretrainConfig, SimulateConfig, TokensConfig
from cladapt.data.schema import Stream
from cladapt.errors import ConfigError
from cladapt.pipeline import demo
from cladapt.run import Run
from cladapt.train.sinks import MemorySink
from cladapt.workloads import recommend


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def simulate(seed: int, **_: Any) -> SimulateConfig:
        return SimulateConfig(seed=seed, users=60, items=40, topics=4, blocks=4)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SimulateConfig", simulate)
    monkeypatch.setattr(demo, "PretrainConfig", lambda seed, epochs: PretrainConfig(seed=seed, epochs=1))
    monkeypatch.setattr(recommend, "TokensConfig", lambda: TokensConfig(dimensions=8, levels=2, codes=4, capacity=16))


def test_the_demo_compares_methods_and_ships_the_first(tmp_path: Path) -> None:
    result = demo.demo(tmp_path / "demo", 3, True, MemorySink())
    models = [line["model"] for line in result["table"]]
    assert models == ["peso", "finetune", "frozen", "block popularity", "markov", "ceiling"]
    assert [line["difference"] for line in result["differences"]] == [f"peso - {name}" for name in models[1:-1]]
    assert list(result["reports"]) == list(demo.METHODS)
    assert all(Path(report).is_file() for report in result["reports"].values())
    for name in demo.METHODS:
        run = Run.open(tmp_path / "demo" / name)
        learned = [2, 3, 4] if name == "peso" else [2, 3]
        assert (run.config.method.name, run.config.seed, list(run.adapters)) == (name, 3, learned)
    night = result["night"]
    assert night["learned"] == [4]
    assert night["new_rows"] == len((tmp_path / "demo" / "block_4.csv").read_text().splitlines()) - 1
    assert night["outcome"] in ("promoted", "refused")
    assert Stream.load(tmp_path / "demo" / "stream").n_blocks == 4
    if night["current"] is None:
        assert night["adapter"] is None
    else:
        exported = read_json(tmp_path / "demo" / "export" / "cladapt.json")
        assert (night["adapter"], exported["block"]) == (str(tmp_path / "demo" / "export"), night["current"])


def test_a_place_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(ConfigError, match="exists and is not empty"):
            demo.demo(out, 0, True, MemorySink())
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]
