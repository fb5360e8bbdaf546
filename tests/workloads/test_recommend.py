"""Recommending as a workload: its embedded inputs, its files read back, and its truth."""

from collections.abc import Iterable
from pathlib import Path

import polars as pl
import pytest

from cladapt.artifacts import write_parquet
from cladapt.config import EvalConfig, PretrainConfig, RunConfig, SimulateConfig, TokensConfig
from cladapt.data.schema import Stream
from cladapt.errors import DataError
from cladapt.eval.metrics import ROWS
from cladapt.eval.protocol import COUNTS, Measures
from cladapt.eval.tails import PLACES
from cladapt.model.load import load_base
from cladapt.pipeline import bases, streams
from cladapt.train.sinks import MemorySink
from cladapt.workloads import recommend
from cladapt.workloads._interactions import truth_of
from cladapt.workloads.recommend import Recommend, make_world

SIMULATE = SimulateConfig(users=40, items=40, topics=4, blocks=3)
TOKENS = TokensConfig(dimensions=8, levels=2, codes=4, capacity=16)
BASE = PretrainConfig(epochs=1)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream and a base, made by the commands one after the other."""
    folder = tmp_path_factory.mktemp("by hand")
    streams.simulate_data(folder / "stream", SIMULATE)
    streams.build_tokens(folder / "stream", TOKENS, None)
    bases.pretrain_base(folder / "stream", folder / "base", BASE, MemorySink())
    return folder


def test_the_embedded_inputs_are_what_the_commands_make(
    by_hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recommend, "TokensConfig", lambda: TOKENS)
    make_world(tmp_path / "stream", tmp_path / "base", SIMULATE, BASE, MemorySink())
    one, other = (Stream.load(folder / "stream") for folder in (tmp_path, by_hand))
    assert one.fingerprint == other.fingerprint
    sids = [streams.load_sids(folder / "stream", one).fingerprint for folder in (tmp_path, by_hand)]
    assert sids[0] == sids[1]
    assert load_base(tmp_path / "base").fingerprint == load_base(by_hand / "base").fingerprint
    assert {p.name for p in (tmp_path / "stream").iterdir()} == {p.name for p in (by_hand / "stream").iterdir()}


def test_the_recipe_of_a_base_is_what_its_seeds_share(by_hand: Path, tmp_path: Path) -> None:
    bases.pretrain_base(by_hand / "stream", tmp_path / "other", BASE.model_copy(update={"seed": 1}), MemorySink())
    (one, first), (two, second) = (Recommend().base_recipe(folder) for folder in (by_hand / "base", tmp_path / "other"))
    assert one == load_base(by_hand / "base").fingerprint != two
    assert first["config"].pop("seed") == 0
    assert second["config"].pop("seed") == 1
    assert first == second


def test_a_simulated_stream_knows_its_truth_and_a_real_one_has_none(by_hand: Path, tmp_path: Path) -> None:
    truth = truth_of(by_hand / "stream")
    assert truth is not None
    assert truth.height == Stream.load(by_hand / "stream").interactions.height
    assert truth_of(tmp_path) is None


def rows(model: int, block: int, users: Iterable[str]) -> pl.DataFrame:
    row = {
        "model_block": model,
        "block": block,
        "item": "i",
        "allowed": True,
        "rank": 3,
        "ties": 1,
        "id_rank": 3,
        "share": 1,
        "log_likelihood": -1.0 * model,
        "frequency": 2,
        "user_kind": "returning",
        "new_item": False,
        "one_hop": True,
    }
    return pl.DataFrame([{**row, "user": user} for user in users]).select(*ROWS).cast(ROWS)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    work, config = Recommend(), EvalConfig(bootstrap=100)
    own = pl.concat([rows(t, s, "abc") for t in (1, 2, 3) for s in (1, 2, 3)])
    counts = {name: pl.concat([rows(b, b, "abc") for b in (2, 3)]) for name in COUNTS}
    following = pl.concat([rows(1, 3, "ab"), rows(2, 3, "ab")])
    after = Measures("peso", following, {COUNTS[0]: rows(2, 3, "ab")}, 1, config, lag=1)
    stand = {"block": 2, "item": "i", "data_quintile": 1, "prior": -1.5, "prior_quintile": 2}
    places = pl.DataFrame([stand, {**stand, "block": 3, "prior": None}], schema=PLACES)
    measures = Measures("peso", own, counts, 1, config, {2: {"HR@10": 0.5}}, next=after, places=places)
    for name, frame in work.frames(measures).items():
        write_parquet(tmp_path / f"{name}.parquet", frame)
    metrics = {"base_block": 1, "ceiling": {"2": {"HR@10": 0.5}}, "matrix": [{"block": b} for b in (1, 2, 3)]}
    found = work.read(tmp_path, metrics, "peso", config, "again")
    assert found.rows.sort("block", "model_block", "user").equals(own.sort("block", "model_block", "user"))
    assert {name: frame.rows() for name, frame in found.references.items()} == {n: f.rows() for n, f in counts.items()}
    assert found.places is not None
    assert found.places.equals(places)
    write_parquet(tmp_path / "tails.parquet", pl.concat([places, places[1:]]))
    with pytest.raises(DataError, match=r"tails\.parquet has a target of a block twice \(again\)"):
        work.read(tmp_path, metrics, "peso", config, "again")
    (tmp_path / "tails.parquet").unlink()
    assert work.read(tmp_path, metrics, "peso", config, "again").places is None  # as older evaluations are
    assert found.next is not None
    assert found.next.rows.equals(following)
    assert [*found.next.references] == [COUNTS[0]]
    assert (found.base_block, found.ceiling, found.next.lag) == (1, {2: {"HR@10": 0.5}}, 1)
    (tmp_path / "block_002.parquet").unlink()
    with pytest.raises(DataError, match=r"are of two evaluations: block_002\.parquet in one alone \(again\)"):
        work.read(tmp_path, metrics, "peso", config, "again")


def test_every_name_of_its_table_may_be_expected() -> None:
    lines, columns = Recommend().table_names("peso", RunConfig().eval)
    assert {"peso", "frozen", "markov", "block popularity", "own history", "ceiling"} == {*lines}
    assert {"users", "HR@5", "NDCG@10", "MRR", "log_likelihood", "HR@10 (ID)"} <= {*columns}
