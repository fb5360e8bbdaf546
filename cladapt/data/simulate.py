"""A simulated stream of drifting preferences whose true next-item distribution is known at every event.

Users move between topics and, inside a topic, pick popular items. The distribution of the next item depends only on
what a model can observe, the user's history and the block, so the score of ranking by it is the best reachable one:

    pi(k) = (1 - persistence) T_b[topic of the last item, k] + persistence h(k),    first event: pi = prior
    p(i)  = pi(topic of i) popularity_b(i), 0 for consumed and unborn items, normalised over all items

T_b: transitions of block b, of which each later block draws a share `drift` of the rows anew; h: decayed histogram of
the user's topics so far; popularity_b: Zipf over the items of a topic that are born by block b.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from cladapt.artifacts import hash_file, read_json, read_parquet, write_parquet
from cladapt.config import SimulateConfig
from cladapt.data.blocks import check_stream
from cladapt.data.histories import split_block
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import ConfigError, DataError

TRUTH = {
    "user": pl.String(),
    "position": pl.Int64(),
    "log_p": pl.Float64(),  # true log-probability of the event, given the user's history and the block
    "top_p": pl.List(pl.Float64()),  # the KEPT largest next-item probabilities there, descending
}
KEPT = 50
MIN_EVENTS = 5  # per active user and block

DECAY = 0.8  # of a topic's weight in the user's histogram, per event
SUCCESSORS = 3  # topics that follow a topic often …
UNIFORM = 0.1  # … and the share of its transitions that go anywhere
LATECOMERS = 0.15  # share of the users who enter after block 1
NEWCOMER_RANK = 0.2  # new items enter among this top share of their topic
FIRST_SECOND = 1_577_836_800  # 2020-01-01
SECONDS_PER_EVENT = 600
USERS_AT_ONCE = 1024  # bounds memory: the distributions of these users are held together

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
TOPIC_WORDS, COMMON_WORDS = 8, 12  # sizes of a topic's vocabulary and of the shared one


@dataclass(frozen=True)
class World:
    """What the users' choices follow; block b has index b - 1."""

    topic: np.ndarray  # int64 [items]
    first_block: np.ndarray  # int32 [items]
    prior: np.ndarray  # float64 [topics]
    transition: np.ndarray  # float64 [blocks, topics, topics], rows sum to 1
    popularity: np.ndarray  # float64 [blocks, items], sums to 1 over a topic; 0 before the item's birth
    persistence: float

    def next_item(self, block: int, last: np.ndarray, interest: np.ndarray, consumed: np.ndarray) -> np.ndarray:
        """True distribution of the next item, float64 [n, items]; a row is NaN where nothing is left to choose.

        last: int64 [n], topic of the last item, -1 before the first; interest: float64 [n, topics], decayed counts;
        consumed: bool [n, items].
        """
        habit = interest / np.maximum(interest.sum(axis=1, keepdims=True), np.finfo(float).tiny)
        pi = (1 - self.persistence) * self.transition[block - 1, last] + self.persistence * habit
        pi[last < 0] = self.prior  # -1 has looked up the last topic's row
        weight = np.where(consumed, 0.0, pi[:, self.topic] * self.popularity[block - 1])
        with np.errstate(invalid="ignore"):
            return weight / weight.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Simulation:
    """A simulated stream, the true probabilities behind it (schema TRUTH, rows as in the stream), and its world."""

    stream: Stream
    truth: pl.DataFrame
    world: World

    def save(self, folder: Path) -> None:
        """Write the stream directory and `truth.parquet`, whose hash stands in the manifest under `truth`."""
        write_parquet(folder / "truth.parquet", self.truth)
        manifest = {**self.stream.manifest, "truth": hash_file(folder / "truth.parquet")}
        replace(self.stream, manifest=manifest).save(folder)


def load_truth(folder: Path) -> pl.DataFrame:
    """Read the truth beside a simulated stream; `DataError` when there is none or it is not the manifest's."""
    manifest = read_json(folder / "manifest.json")
    expected = manifest.get("truth") if isinstance(manifest, dict) else None
    if expected is None:
        raise DataError(
            f"{folder} has no truth: its stream was not simulated", "make one with `cladapt data simulate --out DIR`"
        )
    truth = read_parquet(folder / "truth.parquet", TRUTH)
    if hash_file(folder / "truth.parquet") != expected:
        raise DataError(f"{folder / 'truth.parquet'} is not the file its manifest was written for", "simulate again")
    return truth


def simulate(config: SimulateConfig) -> Simulation:
    """Generate a stream and its truth; the same config gives identical frames."""
    world_rng, user_rng, event_rng, text_rng = np.random.default_rng(config.seed).spawn(4)
    world = _make_world(config, world_rng)
    counts = _event_counts(config, user_rng)
    item, log_p, top_p = _walk(world, counts, event_rng)
    user = np.repeat(np.arange(config.users), counts.sum(axis=1))
    block = np.repeat(np.tile(np.arange(1, config.blocks + 1), config.users), counts.ravel())
    names = np.array(_names("i", config.items))
    interactions = pl.DataFrame(
        {
            "user": np.array(_names("u", config.users))[user],
            "item": names[item],
            "timestamp": _timestamps(user, block, event_rng),
            "position": np.arange(len(user)) - np.searchsorted(user, user),
            "block": block,
        },
        schema=INTERACTIONS,
    )
    items = pl.DataFrame(
        {"item": names, "text": _texts(world.topic, text_rng), "first_block": world.first_block}, schema=ITEMS
    )
    truth = pl.DataFrame(
        {"user": interactions["user"], "position": interactions["position"], "log_p": log_p, "top_p": top_p},
        schema_overrides={"top_p": TRUTH["top_p"]},
    )
    stream = Stream(interactions, items)
    manifest = {"source": "simulate", "config": config.model_dump(mode="json"), **check_stream(stream)}
    return Simulation(replace(stream, manifest=manifest), truth, world)


def ceiling(truth: pl.DataFrame, stream: Stream, block: int, top_k: Sequence[int]) -> dict[str, float]:
    """Expected score of ranking by the true distribution, over the test events of `block`.

    HR@k = sum_{j<k} p_j,  NDCG@k = sum_{j<k} p_j / log2(j + 2) for p sorted descending; log_likelihood = mean log p.
    """
    if not top_k or min(top_k) < 1 or max(top_k) > KEPT:
        raise ConfigError(f"top_k={list(top_k)} is outside what the truth holds", f"use cut-offs from 1 to {KEPT}")
    split = split_block(stream, block)
    tests = pl.DataFrame(
        {
            "user": [stream.users[u] for u in split.user[split.held_out]],
            "position": np.diff(split.offsets)[split.held_out] - 1,
        },
        schema={name: TRUTH[name] for name in ("user", "position")},
    )
    rows = tests.join(truth, on=["user", "position"], how="inner", maintain_order="left")
    if tests.is_empty() or rows.height != tests.height:
        raise DataError(
            f"the truth covers {rows.height} of the {tests.height} test events of block {block}",
            "give the truth that was saved with this stream",
        )
    top_p = rows["top_p"].list.to_array(len(rows["top_p"][0])).to_numpy()
    discounted = top_p / np.log2(np.arange(top_p.shape[1]) + 2)
    scores: dict[str, float] = {}
    for k in top_k:
        scores[f"HR@{k}"] = float(top_p[:, :k].sum(axis=1).mean())
        scores[f"NDCG@{k}"] = float(discounted[:, :k].sum(axis=1).mean())
    return {**scores, "log_likelihood": float(rows["log_p"].to_numpy().mean())}


def _make_world(config: SimulateConfig, rng: np.random.Generator) -> World:
    born = round(config.births * config.items)
    initial = config.items - born
    if config.topics > initial:
        raise ConfigError(
            f"topics={config.topics} exceeds the {initial} items of block 1 (items={config.items}, "
            f"births={config.births:g})",
            "every topic needs an item from the start: raise items, or lower topics or births",
        )
    topic = np.arange(config.items) % config.topics
    later = 2 + np.arange(born) * (config.blocks - 1) // max(born, 1)
    first_block = np.concatenate([np.ones(initial), later]).astype(np.int32)
    place = rng.random(config.items) * np.where(first_block > 1, NEWCOMER_RANK, 1.0)
    transition = [_transition_rows(config.topics, config.topics, rng)]
    for _ in range(1, config.blocks):
        redrawn = rng.choice(config.topics, round(config.drift * config.topics), replace=False)
        transition.append(transition[-1].copy())
        transition[-1][redrawn] = _transition_rows(len(redrawn), config.topics, rng)
    return World(
        topic=topic,
        first_block=first_block,
        prior=rng.dirichlet(np.ones(config.topics)),
        transition=np.stack(transition),
        popularity=np.stack(
            [_popularity(topic, place, first_block <= b + 1, config.skew) for b in range(config.blocks)]
        ),
        persistence=config.persistence,
    )


def _transition_rows(count: int, topics: int, rng: np.random.Generator) -> np.ndarray:
    """Rows with a few likely successors and a uniform rest, float64 [count, topics]."""
    successors = rng.permuted(np.tile(np.arange(topics), (count, 1)), axis=1)[:, :SUCCESSORS]
    rows = np.full((count, topics), UNIFORM / topics)
    likely = (1 - UNIFORM) * rng.dirichlet(np.ones(successors.shape[1]), size=count)
    rows[np.arange(count)[:, None], successors] += likely
    return rows


def _popularity(topic: np.ndarray, place: np.ndarray, alive: np.ndarray, skew: float) -> np.ndarray:
    """Zipf weight of each living item inside its topic, ranked by `place`, float64 [items]."""
    order = np.flatnonzero(alive)
    order = order[np.lexsort((place[order], topic[order]))]
    owner = topic[order]
    weight = (np.arange(len(order)) - np.searchsorted(owner, owner) + 1.0) ** -skew
    popularity = np.zeros(len(topic))
    popularity[order] = weight / np.bincount(owner, weight)[owner]
    return popularity


def _event_counts(config: SimulateConfig, rng: np.random.Generator) -> np.ndarray:
    """Events of each user in each block, int64 [users, blocks]."""
    late = round(LATECOMERS * config.users)
    entry = np.concatenate(
        [np.zeros(config.users - late, int), 1 + np.arange(late) * (config.blocks - 1) // max(late, 1)]
    )
    block = np.arange(config.blocks)
    comes_back = rng.random((config.users, config.blocks)) < config.activity
    active = (block == entry[:, None]) | ((block > entry[:, None]) & comes_back)
    if not (occupied := active.any(axis=0)).all():
        raise ConfigError(
            f"no user is active in block {int(occupied.argmin()) + 1} of {config.blocks} "
            f"(users={config.users}, activity={config.activity:g})",
            "raise users or activity, or lower blocks",
        )
    return active * (MIN_EVENTS + rng.poisson(config.events - MIN_EVENTS, active.shape))


def _walk(world: World, counts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw every event: item int64 [n], its log-probability float64 [n], largest ones float64 [n, kept]."""
    n_users, n_items = len(counts), len(world.topic)
    stops = counts.sum(axis=1).cumsum()
    n_events, kept = int(stops[-1]), min(KEPT, n_items)
    uniform = rng.random(n_events)
    item, log_p, top_p = np.empty(n_events, np.int64), np.empty(n_events), np.empty((n_events, kept))
    for begin in range(0, n_users, USERS_AT_ONCE):
        count = counts[begin : begin + USERS_AT_ONCE]
        row = stops[begin : begin + USERS_AT_ONCE] - count.sum(axis=1)  # of each user's next event
        last = np.full(len(count), -1)
        interest = np.zeros((len(count), len(world.prior)))
        consumed = np.zeros((len(count), n_items), bool)
        for block in range(1, counts.shape[1] + 1):
            for step in range(count[:, block - 1].max()):  # users do not interact: their steps are taken together
                who = np.flatnonzero(count[:, block - 1] > step)
                p = world.next_item(block, last[who], interest[who], consumed[who])
                if np.isnan(p[:, 0]).any():
                    raise ConfigError(
                        f"in block {block} a user has consumed every item that it could choose next "
                        f"({n_items} items in all)",
                        "raise items, or lower events, blocks, activity, persistence or skew",
                    )
                cumulative = p.cumsum(axis=1)
                # scaled by the actual total, and strict, so that an item of probability 0 is never chosen
                chosen = (cumulative <= uniform[row[who], None] * cumulative[:, -1:]).sum(axis=1)
                item[row[who]] = chosen
                log_p[row[who]] = np.log(p[np.arange(len(who)), chosen])
                top_p[row[who]] = -np.sort(np.partition(-p, kept - 1, axis=1)[:, :kept], axis=1)
                last[who] = world.topic[chosen]
                interest[who] *= DECAY
                interest[who, last[who]] += 1.0
                consumed[who, chosen] = True
                row[who] += 1
    return item, log_p, top_p


def _timestamps(user: np.ndarray, block: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distinct times, block after block, the users of a block interleaved at random, int64 [n]."""
    rank = np.empty(len(user), np.int64)
    rank[np.lexsort((rng.random(len(user)), block))] = np.arange(len(user))
    rank = rank[np.lexsort((rank, user))]
    return FIRST_SECOND + SECONDS_PER_EVENT * rank


def _texts(topic: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Per item a word of its own, three of its topic's and two that all items share."""
    n_items, n_topics = len(topic), int(topic.max()) + 1
    words = _words(n_items + n_topics * TOPIC_WORDS + COMMON_WORDS, rng)
    own, shared, common = np.split(words, [n_items, n_items + n_topics * TOPIC_WORDS])
    vocabulary = shared.reshape(n_topics, TOPIC_WORDS)
    from_topic = rng.permuted(vocabulary[topic], axis=1)[:, :3]
    from_common = rng.permuted(np.tile(common, (n_items, 1)), axis=1)[:, :2]
    return [" ".join(row) for row in np.column_stack([own, from_topic, from_common]).tolist()]


def _words(count: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct made-up words of four syllables, str [count]."""
    base = len(SYLLABLES)
    number = rng.choice(base**4, count, replace=False)
    syllables = np.array(SYLLABLES)[number[:, None] // base ** np.arange(4) % base]
    return np.array(["".join(row) for row in syllables.tolist()])


def _names(prefix: str, count: int) -> list[str]:
    """Ids padded to one width, so that their order as text is their order as numbers."""
    width = len(str(count - 1))
    return [f"{prefix}{n:0{width}d}" for n in range(count)]
