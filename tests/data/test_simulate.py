"""The simulated truth against a brute-force reading of the process, its draws, and its files."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from cladapt.config import SimulateConfig
from cladapt.data.histories import split_block
from cladapt.data.schema import Stream
from cladapt.data.simulate import DECAY, KEPT, NEWCOMER_RANK, Simulation, ceiling, load_truth, simulate
from cladapt.errors import ConfigError, DataError

SMALL = SimulateConfig(seed=3, users=40, items=60, topics=5, blocks=3, births=0.2, activity=0.5)


@pytest.fixture(scope="module")
def default() -> Simulation:
    return simulate(SimulateConfig())


@pytest.fixture(scope="module")
def small() -> Simulation:
    return simulate(SMALL)


def brute_force(simulation: Simulation, persistence: float) -> list[np.ndarray]:
    """Next-item distribution at every event, from the history alone, as the module's formula reads."""
    world, stream = simulation.world, simulation.stream
    distributions = []
    for user in range(len(stream.users)):
        mine = np.flatnonzero(stream.user_index == user)
        for row in mine:
            history = [int(item) for item in stream.item_index[mine[mine < row]]]
            block = int(stream.block[row])
            if history:
                ages = range(len(history) - 1, -1, -1)
                habit = [0.0] * len(world.prior)
                for item, age in zip(history, ages, strict=True):
                    habit[world.topic[item]] += DECAY**age
                transition = world.transition[block - 1][world.topic[history[-1]]]
                pi = [
                    (1 - persistence) * t + persistence * h / sum(habit) for t, h in zip(transition, habit, strict=True)
                ]
            else:
                pi = list(world.prior)
            weight = [
                0.0 if item in history or world.first_block[item] > block else pi[k] * world.popularity[block - 1][item]
                for item, k in enumerate(world.topic)
            ]
            distributions.append(np.array(weight) / sum(weight))
    return distributions


def test_truth_is_the_brute_force_distribution_at_every_event(small: Simulation) -> None:
    for p, item, row in zip(
        brute_force(small, SMALL.persistence), small.stream.item_index, small.truth.iter_rows(named=True), strict=True
    ):
        assert row["log_p"] == pytest.approx(math.log(p[item]), rel=1e-9)
        np.testing.assert_allclose(row["top_p"], np.sort(p)[::-1][:KEPT], rtol=1e-9, atol=1e-15)


def test_draws_follow_the_truth(default: Simulation) -> None:
    """Realised hits and log-likelihood of the true ranking lie within 4 standard errors of their expectation."""
    p = np.concatenate(brute_force(default, 0.3)).reshape(-1, 300)
    drawn = p[np.arange(len(p)), default.stream.item_index]
    for k in (1, 5, 20):
        expected = np.sort(p, axis=1)[:, -k:].sum(axis=1)
        hits = (p > drawn[:, None]).sum(axis=1) < k
        assert abs(hits.sum() - expected.sum()) < 4 * math.sqrt((expected * (1 - expected)).sum())
    log = np.log(np.where(p > 0, p, 1.0))
    mean = (p * log).sum(axis=1)
    variance = (p * log**2).sum(axis=1) - mean**2
    assert abs(np.log(drawn).sum() - mean.sum()) < 4 * math.sqrt(variance.sum())
    # items by their number: new items have the largest
    number = np.arange(300)
    variance = p @ number**2 - (p @ number) ** 2
    assert abs(default.stream.item_index.sum() - (p @ number).sum()) < 4 * math.sqrt(variance.sum())
    # topic by topic: the expected and the drawn number of events
    member = np.eye(12)[default.world.topic]
    per_topic = p @ member
    spread = np.sqrt((per_topic * (1 - per_topic)).sum(axis=0))
    assert (np.abs(member[default.stream.item_index].sum(axis=0) - per_topic.sum(axis=0)) < 4 * spread).all()


def test_ceiling_is_the_expected_score_of_the_true_ranking(small: Simulation) -> None:
    distributions = brute_force(small, SMALL.persistence)
    stream = small.stream
    tests = [
        np.flatnonzero((stream.user_index == user) & (stream.block == 2))[-1] for user in split_block(stream, 2).user
    ]
    best = [np.sort(distributions[row])[::-1] for row in tests]
    scores = ceiling(small.truth, stream, 2, (1, 5))
    assert list(scores) == ["HR@1", "NDCG@1", "HR@5", "NDCG@5", "log_likelihood"]
    assert scores["HR@1"] == scores["NDCG@1"] == pytest.approx(np.mean([p[0] for p in best]))
    assert scores["HR@5"] == pytest.approx(np.mean([sum(p[:5]) for p in best]))
    assert scores["NDCG@5"] == pytest.approx(np.mean([sum(p[j] / math.log2(j + 2) for j in range(5)) for p in best]))
    log_p = [math.log(distributions[row][stream.item_index[row]]) for row in tests]
    assert scores["log_likelihood"] == pytest.approx(np.mean(log_p))


@pytest.mark.parametrize(("drift", "redrawn"), [(0.0, 0), (0.25, 3), (1.0, 12)])
def test_each_later_block_redraws_the_drifting_share_of_rows(drift: float, redrawn: int) -> None:
    transition = simulate(SimulateConfig(users=50, drift=drift)).world.transition
    np.testing.assert_allclose(transition.sum(axis=2), 1.0)
    for before, after in pairwise(transition):
        assert (before != after).any(axis=1).sum() == redrawn


def test_items_appear_from_their_birth_on_and_births_are_spread_evenly(default: Simulation) -> None:
    first_block = default.stream.items["first_block"].to_numpy()
    assert (default.stream.block >= first_block[default.stream.item_index]).all()
    assert np.bincount(first_block, minlength=6)[1:].tolist() == [255, 12, 11, 11, 11]
    assert (default.world.popularity > 0).tolist() == (first_block <= np.arange(1, 6)[:, None]).tolist()


def test_new_items_enter_near_the_top_of_their_topic(default: Simulation) -> None:
    world = default.world
    for item in np.flatnonzero(world.first_block > 1):
        at_birth = world.popularity[world.first_block[item] - 1]
        peers = at_birth[(world.topic == world.topic[item]) & (at_birth > 0)]
        assert (peers > at_birth[item]).mean() < 2 * NEWCOMER_RANK


def test_popularity_inside_a_topic_is_zipf(small: Simulation) -> None:
    world = small.world
    for block in range(3):
        for topic in range(5):
            weights = np.sort(world.popularity[block][world.topic == topic])[::-1]
            weights = weights[weights > 0]
            zipf = 1 / np.arange(1, len(weights) + 1)
            np.testing.assert_allclose(weights, zipf / zipf.sum())


def test_no_user_meets_an_item_twice_and_every_active_block_has_five_events(default: Simulation) -> None:
    interactions = default.stream.interactions
    assert interactions.select("user", "item").is_unique().all()
    assert interactions.group_by("user", "block").len()["len"].min() == 5


def test_time_order_agrees_with_positions_and_blocks(default: Simulation) -> None:
    interactions = default.stream.interactions
    assert interactions.equals(interactions.sort("user", "position"))
    assert interactions.equals(interactions.sort("user", "timestamp"))
    assert interactions["timestamp"].is_unique().all()
    assert interactions.sort("timestamp")["block"].is_sorted()
    positions = interactions.select(expected=pl.int_range(pl.len()).over("user"))["expected"]
    assert interactions["position"].to_list() == positions.to_list()


def test_users_enter_and_come_back_as_configured(default: Simulation) -> None:
    first = default.stream.interactions.group_by("user").agg(pl.col("block").min())["block"]
    assert len(first) == 600
    assert (first == 1).sum() == 510
    later = [block["users"] for block in default.stream.manifest["blocks"][1:]]
    late = np.array([23, 22, 23, 22])  # who enters in blocks 2..5
    present = 510 + late.cumsum() - late
    assert (np.abs(later - late - 0.4 * present) < 4 * np.sqrt(0.24 * present)).all()


def test_manifest_tells_the_source_and_counts_of_every_block(small: Simulation) -> None:
    manifest, interactions = small.stream.manifest, small.stream.interactions
    assert manifest["source"] == "simulate"
    assert SimulateConfig(**manifest["config"]) == SMALL
    assert [row["block"] for row in manifest["blocks"]] == [1, 2, 3]
    for row in manifest["blocks"]:
        part = interactions.filter(pl.col("block") == row["block"])
        assert (row["interactions"], row["users"]) == (part.height, part["user"].n_unique())


def test_texts_are_distinct_and_tf_idf_recovers_the_topic(default: Simulation) -> None:
    texts = default.stream.items["text"]
    assert texts.is_unique().all()
    assert texts.str.split(" ").list.len().unique().to_list() == [6]
    matrix = TfidfVectorizer().fit_transform(texts.to_list())
    likeness = (matrix @ matrix.T).toarray()
    np.fill_diagonal(likeness, -1)
    nearest = likeness.argmax(axis=1)
    assert (default.world.topic[nearest] == default.world.topic).mean() > 0.95


def test_one_seed_gives_identical_frames_and_another_gives_others(small: Simulation) -> None:
    again, other = simulate(SMALL), simulate(SMALL.model_copy(update={"seed": 4}))
    for part in ("interactions", "items"):
        assert getattr(small.stream, part).equals(getattr(again.stream, part))
        assert not getattr(small.stream, part).equals(getattr(other.stream, part))
    assert small.truth.equals(again.truth)
    assert not small.truth.equals(other.truth)


def test_save_and_load_keep_stream_and_truth(small: Simulation, tmp_path: Path) -> None:
    small.save(tmp_path / "sim")
    stream, truth = Stream.load(tmp_path / "sim"), load_truth(tmp_path / "sim")
    assert stream.interactions.equals(small.stream.interactions)
    assert stream.items.equals(small.stream.items)
    assert truth.equals(small.truth)
    assert ceiling(truth, stream, 3, (5,)) == ceiling(small.truth, small.stream, 3, (5,))


def test_a_truth_that_is_not_the_manifests_is_refused(small: Simulation, tmp_path: Path) -> None:
    small.save(tmp_path)
    small.truth.with_columns(pl.col("log_p") + 1).write_parquet(tmp_path / "truth.parquet")
    with pytest.raises(DataError, match=r"truth\.parquet is not the file its manifest was written for"):
        load_truth(tmp_path)


def test_a_stream_that_was_not_simulated_has_no_truth(small: Simulation, tmp_path: Path) -> None:
    small.stream.save(tmp_path)
    with pytest.raises(DataError, match=r"has no truth: its stream was not simulated"):
        load_truth(tmp_path)


@pytest.mark.parametrize("top_k", [(), (0, 5), (5, 51)])
def test_cut_offs_beyond_the_kept_probabilities_are_refused(small: Simulation, top_k: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"top_k=.* is outside what the truth holds \(use cut-offs from 1 to 50\)"):
        ceiling(small.truth, small.stream, 1, top_k)


def test_a_truth_of_another_stream_is_refused(small: Simulation) -> None:
    with pytest.raises(DataError, match=r"the truth covers 0 of the \d+ test events of block 2"):
        ceiling(small.truth.clear(), small.stream, 2, (5,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"births": 1.0}, r"topics=5 exceeds the 0 items of block 1 \(items=60, births=1\)"),
        ({"topics": 60}, r"topics=60 exceeds the 48 items of block 1"),
        ({"users": 1, "activity": 1e-9}, r"no user is active in block 2 of 3 \(users=1, activity=1e-09\)"),
        ({"events": 30}, r"a user has consumed every item that it could choose next \(60 items in all\)"),
        ({"events": 15, "persistence": 1.0}, r"in block \d a user has consumed every item"),
    ],
)
def test_a_world_too_small_for_its_users_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(SimulateConfig(**{**SMALL.model_dump(), **changes}))


def test_the_smallest_world_runs() -> None:
    simulation = simulate(
        SimulateConfig(users=8, items=20, topics=2, blocks=2, events=5, births=0.0, activity=1.0, skew=0)
    )
    assert simulation.stream.n_blocks == 2
    assert simulation.truth["top_p"].list.len().unique().to_list() == [20]
    np.testing.assert_allclose(simulation.truth["top_p"].list.sum().to_numpy(), 1.0)
