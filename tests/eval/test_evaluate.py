"""Per-user rows against a small stream worked out by hand and a ranking by plain forward passes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cladapt.config import EvalConfig
from cladapt.data.schema import INTERACTIONS, ITEMS, Stream
from cladapt.errors import DataError, EnvironmentProblem
from cladapt.eval.decode import Beams, Decoder
from cladapt.eval.evaluate import Evaluator
from cladapt.eval.metrics import ROWS
from cladapt.model.load import Base, new_model
from cladapt.tokens.prompts import PackedForm
from cladapt.tokens.sids import SidTable

CODES = {
    "a": (0, 0),
    "b": (0, 0),
    "c": (0, 1),
    "d": (1, 0),
    "g": (2, 0),
    "e": (1, 0),  # shares its ID with d from block 2 on
    "f": (2, 1),
}
BORN = {"a": 1, "b": 1, "c": 1, "d": 1, "g": 1, "e": 2, "f": 3}
LOG = {
    "ada": ("acdb", "aec", ""),
    "bob": ("cda", "", "bfd"),
    "cy": ("", "dgc", "abf"),
    "di": ("", "ab", ""),  # too few events in block 2 for a target
}
WINDOW = 3


@pytest.fixture(scope="module")
def stream() -> Stream:
    events = [
        (user, item, None, position, block)
        for user, blocks in LOG.items()
        for position, (block, item) in enumerate((b, i) for b, items in enumerate(blocks, 1) for i in items)
    ]
    items = [(item, f"item {item}", BORN[item]) for item in CODES]
    return Stream(
        pl.DataFrame(events, schema=INTERACTIONS, orient="row"), pl.DataFrame(items, schema=ITEMS, orient="row")
    )


@pytest.fixture(scope="module")
def base() -> Base:
    sids = SidTable(tuple(CODES), np.array(list(CODES.values())), (3, 2))
    model, tokenizer = new_model("tiny", sids, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)  # logits far enough apart for an order that rounding cannot change
    return Base(model.eval(), tokenizer, sids, {"fitted_block": 1})


def make_evaluator(stream: Stream, base: Base, seed: int = 0, **config: Any) -> Evaluator:
    form = PackedForm(base.item_tokens().numpy(), base.bos(), WINDOW, 64)
    return Evaluator(stream, base, form, EvalConfig(**{"top_k": (2,), "beams": 4, **config}), seed=seed)


@torch.no_grad()
def id_scores(base: Base, history: str, alive: Sequence[str]) -> dict[tuple[int, ...], float]:
    """Log-probability of every living semantic ID among its siblings, by plain forward passes."""
    tokens = dict(zip(CODES, base.item_tokens().tolist(), strict=True))
    prompt = [base.bos(), *(t for item in history[-WINDOW:] for t in tokens[item])]
    living = {tuple(tokens[item]): CODES[item] for item in alive}

    def log_p(prefix: tuple[int, ...], token: int) -> float:
        siblings = sorted({path[len(prefix)] for path in living if path[: len(prefix)] == prefix})
        logits = base.model(input_ids=torch.tensor([[*prompt, *prefix]])).logits[0, -1, siblings]
        return float(logits.log_softmax(0)[siblings.index(token)])

    return {code: log_p((), path[0]) + log_p(path[:1], path[1]) for path, code in living.items()}


Place = tuple[int, int, int] | None


def expected_place(base: Base, history: str, target: str, alive: str, exclude_seen: bool) -> tuple[Place, float]:
    """(rank, ties, id_rank) of the target in the list of items, None where it is not; and its log-probability."""
    scores = id_scores(base, history, alive)
    given = [item for item in alive if not (exclude_seen and item in history)]
    own = scores[CODES[target]]
    log_p = own - np.log(sum(CODES[item] == CODES[target] for item in alive))
    if target not in given:
        return None, log_p
    rank = sum(scores[CODES[item]] > own for item in given)
    ties = sum(CODES[item] == CODES[target] for item in given)
    ids = sorted({CODES[item] for item in given}, key=lambda code: -scores[code])
    return (rank, ties, ids.index(CODES[target])), log_p


def check_places(rows: pl.DataFrame, expected: list[tuple[Place, float]]) -> None:
    places = [row if row != (None, None, None) else None for row in rows.select("rank", "ties", "id_rank").rows()]
    assert places == [place for place, _ in expected]
    np.testing.assert_allclose(rows["log_likelihood"], [score for _, score in expected], atol=1e-4)


COUNTED = ["model_block", "block", "user", "item", "allowed", "share", "frequency", "user_kind", "new_item", "one_hop"]


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_rows_of_block_2_by_hand(stream: Stream, base: Base, exclude_seen: bool) -> None:
    rows = make_evaluator(stream, base, exclude_seen=exclude_seen).rows(base.model, 1, 2)
    assert rows.schema == ROWS
    assert rows.select(COUNTED).rows() == [
        # ada has had c before; e follows a nowhere, a c is a step of ada's block 1 but e c is none
        (1, 2, "ada", "c", not exclude_seen, 1, 2, "returning", False, False),
        (1, 2, "cy", "c", True, 1, 2, "new", False, False),
    ]
    # f is born in block 3: no row of block 2 ranks it
    check_places(rows, [expected_place(base, history, "c", "abcdeg", exclude_seen) for history in ("acdbae", "dg")])


def test_rows_of_block_3_by_hand(stream: Stream, base: Base) -> None:
    rows = make_evaluator(stream, base).rows(base.model, 2, 3)
    assert rows.select(COUNTED).rows() == [
        # bob has had d, so it may not be given to him, although e of the same ID may
        (2, 3, "bob", "d", False, 2, 1, "dormant", False, False),
        (2, 3, "cy", "f", True, 1, 0, "returning", True, False),
    ]
    histories = (("cdabf", "d"), ("dgcab", "f"))
    check_places(rows, [expected_place(base, history, item, "abcdefg", True) for history, item in histories])


def test_a_shared_id_ties_the_items_that_may_be_given_alone(stream: Stream, base: Base) -> None:
    rows = make_evaluator(stream, base, exclude_seen=False).rows(base.model, 2, 3)
    assert rows.select("user", "ties", "share").rows() == [("bob", 2, 2), ("cy", 1, 1)]
    check_places(rows[:1], [expected_place(base, "cdabf", "d", "abcdefg", False)])


def test_first_events_meet_the_catalogue_and_the_histories_of_the_block_before(stream: Stream, base: Base) -> None:
    rows = make_evaluator(stream, base).rows(base.model, 2, 3, first=True)
    # bob's first event of block 3 is b after c d a, cy's is a after d g c; everyone active is tested
    assert rows.select(COUNTED).rows() == [
        (2, 3, "bob", "b", True, 2, 1, "dormant", False, True),  # di: a b in block 2
        (2, 3, "cy", "a", True, 2, 3, "returning", False, True),  # ada: a c, then a in block 2
    ]
    check_places(
        rows, [expected_place(base, "cda", "b", "abcdeg", True), expected_place(base, "dgc", "a", "abcdeg", True)]
    )
    second = make_evaluator(stream, base).rows(base.model, 1, 2, first=True)
    assert second.select("user", "item", "allowed", "user_kind").rows() == [
        ("ada", "a", False, "returning"),
        ("cy", "d", True, "new"),
        ("di", "a", True, "new"),
    ]
    place, log_p = expected_place(base, "", "d", "abcdg", True)  # e is not born yet: d is alone with its ID
    assert second.select("rank", "ties", "id_rank").rows()[1] == place
    assert second["log_likelihood"][1] == pytest.approx(log_p, abs=1e-4)


def test_an_item_born_in_the_block_is_outside_the_list_of_the_model_before_it(base: Base, stream: Stream) -> None:
    events = stream.interactions.with_columns(
        item=pl.when((pl.col("user") == "cy") & (pl.col("position") == 3)).then(pl.lit("f")).otherwise("item")
    )
    rows = make_evaluator(Stream(events, stream.items), base).rows(base.model, 2, 3, first=True)
    line = rows.filter(pl.col("user") == "cy").row(0, named=True)
    assert (line["item"], line["allowed"], line["new_item"], line["share"]) == ("f", False, True, 0)
    assert (line["rank"], line["ties"], line["id_rank"], line["log_likelihood"]) == (None, None, None, None)


def test_validation_targets_are_the_events_before_the_test_s(stream: Stream, base: Base) -> None:
    rows = make_evaluator(stream, base, targets="valid").rows(base.model, 1, 2)
    assert rows.select("user", "item", "share", "frequency", "user_kind", "new_item").rows() == [
        ("ada", "e", 2, 0, "returning", True),
        ("cy", "g", 1, 0, "new", False),
    ]
    histories = (("acdba", "e"), ("d", "g"))
    check_places(rows, [expected_place(base, history, item, "abcdeg", True) for history, item in histories])


def test_frequency_counts_the_training_parts_of_all_blocks_so_far(stream: Stream, base: Base) -> None:
    # training events: ada a c, bob c; ada a, cy d, di a b; bob b, cy a
    rows = make_evaluator(stream, base).rows(base.model, 1, 1)
    assert dict(rows.select("user", "frequency").rows()) == {"ada": 0, "bob": 1}


def test_a_sample_of_users_is_seeded_and_part_of_the_whole(stream: Stream, base: Base) -> None:
    whole = make_evaluator(stream, base).rows(base.model, 1, 2)
    chosen = [make_evaluator(stream, base, seed, max_users=1).rows(base.model, 1, 2) for seed in (0, 0, *range(1, 9))]
    assert chosen[0].equals(chosen[1])
    assert {rows.height for rows in chosen} == {1}
    assert {rows["user"][0] for rows in chosen} == {"ada", "cy"}
    for rows in chosen:
        same = whole.filter(pl.col("user") == rows["user"][0])
        assert rows.drop("log_likelihood").equals(same.drop("log_likelihood"))
        assert rows["log_likelihood"][0] == pytest.approx(same["log_likelihood"][0], abs=1e-5)
    assert make_evaluator(stream, base, max_users=5).rows(base.model, 1, 2).equals(whole)


def test_out_of_memory_halves_the_batch_and_changes_no_row(
    stream: Stream, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_evaluator(stream, base).rows(base.model, 1, 2)
    decode, tried = Decoder.decode, []

    def tight(self: Decoder, prompts: Sequence[np.ndarray], *rest: object) -> Beams:
        tried.append((len(prompts), self.beams))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError
        return decode(self, prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "decode", tight)
    rows = make_evaluator(stream, base, batch_users=5).rows(base.model, 1, 2)
    # both users at once fail; one by one they pass, with beams as wide as ever
    assert tried == [(2, 4), (1, 4), (1, 4)]
    assert rows.drop("log_likelihood").equals(whole.drop("log_likelihood"))
    np.testing.assert_allclose(rows["log_likelihood"], whole["log_likelihood"], atol=1e-5)


def test_one_user_who_does_not_fit_is_an_error_that_says_so(
    stream: Stream, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Beams:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Decoder, "decode", never)
    with pytest.raises(EnvironmentProblem, match=r"one user with beams=4 does not fit \(lower the beams"):
        make_evaluator(stream, base).rows(base.model, 1, 2)


def test_what_cannot_be_measured_is_refused(stream: Stream, base: Base) -> None:
    with pytest.raises(DataError, match=r"no block 4 \(choose one of 1\.\.3\)"):
        make_evaluator(stream, base).rows(base.model, 1, 4)
    short = Stream(stream.interactions.filter(pl.col("user") == "di"), stream.items)
    with pytest.raises(DataError, match="block 2 has no test user"):
        make_evaluator(short, base).rows(base.model, 1, 2)
    renamed = stream.items.with_columns(pl.col("item").replace({"a": "z"}))
    other = Stream(stream.interactions.filter(pl.col("item") != "a"), renamed)
    with pytest.raises(DataError, match="list different items"):
        make_evaluator(other, base)
