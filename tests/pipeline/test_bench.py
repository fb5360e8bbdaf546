"""The comparisons compare like with like: equal losses, equal rankings, and no figure when they differ."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cladapt.config import SimulateConfig, TokensConfig
from cladapt.data.histories import split_block
from cladapt.errors import CheckFailed, ConfigError
from cladapt.methods import available
from cladapt.model.packed import PackedLoss
from cladapt.pipeline import bench, bench_llm
from cladapt.pipeline.bench import Case, check_equal, decoding, generation, padded_batches, padded_documents
from cladapt.tokens.prompts import PackedForm, pack
from cladapt.train.feeds import batches_of
from cladapt.train.sinks import MemorySink
from cladapt.train.stream import catalogue_softmax, training_documents
from cladapt_kernels.timing import COLUMNS, WHERE

SMALL = {"VOCABULARY": 3000, "LAYERS": 1, "HIDDEN": 36, "INTERMEDIATE": 48}  # of the base with a large vocabulary


@pytest.fixture(scope="module")
def case() -> Case:
    return bench.make_case(
        SimulateConfig(users=40, items=60, topics=4, blocks=3),
        TokensConfig(dimensions=8, levels=2, codes=8, capacity=16),
    )


def losses(case: Case, batches: list[tuple[torch.Tensor, ...]]) -> np.ndarray:
    """Sorted losses of all marked tokens, computed without an adapter."""
    softmax = catalogue_softmax(case.base, case.stream, case.split.block, case.train.softmax)
    module = PackedLoss(case.base.model, softmax).eval()
    with torch.no_grad():
        return np.sort(torch.cat([module(*batch) for batch in batches]).numpy())


def test_padded_examples_have_the_losses_of_the_packed_targets(case: Case) -> None:
    # in block 1, under a window that no history fills, both forms show every target the same history
    case = replace(case, split=split_block(case.stream, 1))
    form = PackedForm(case.base.item_tokens().numpy(), case.base.bos(), window=60, row_tokens=512)
    packed = list(batches_of(pack(training_documents(case.split, form), 512, None), 4))
    examples = padded_documents(case.split, form, case.base.sids.levels)
    padded = list(padded_batches(examples, 2048, np.random.default_rng(0)))
    targets = case.split.train_stop - case.split.start
    assert len(examples) == targets.sum()
    np.testing.assert_allclose(losses(case, padded), losses(case, packed), atol=1e-4)


def test_padded_batches_hold_every_example_once_within_the_budget(case: Case) -> None:
    examples = padded_documents(case.split, case.form, case.base.sids.levels)
    batches = list(padded_batches(examples, 600, np.random.default_rng(1)))
    assert all(tokens.numel() <= 600 for tokens, *_ in batches)
    found = [
        tuple(t[d > 0].tolist()) for tokens, document, *_ in batches for t, d in zip(tokens, document, strict=True)
    ]
    assert sorted(found) == sorted(tuple(e.tokens.tolist()) for e in examples)
    assert sum(int(loss.sum()) for *_, loss in batches) == case.base.sids.levels * len(examples)


@pytest.mark.parametrize("at_once", [6, 4])
@pytest.mark.parametrize("softmax", ["trie", "vocabulary"])
def test_generate_and_our_decoder_find_the_same(case: Case, softmax: str, at_once: int) -> None:
    case = replace(case, train=case.train.model_copy(update={"softmax": softmax}))
    prompts = [case.form.prompt(case.split.history(int(i), before="test")) for i in case.split.test_users[:6]]
    ours, theirs = decoding(case, prompts)(), generation(case, prompts, at_once)()
    check_equal(ours, theirs)
    assert np.array_equal(np.sort(ours[0][:, :9], axis=1), np.sort(theirs[0][:, :9], axis=1))
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-4)


ITEMS = np.array([[[1, 5], [2, 6], [3, 7]]])
SCORES = np.array([[-1.0, -2.0, -3.0]])


@pytest.mark.parametrize(
    ("items", "scores", "message"),
    [
        (
            ITEMS,
            SCORES + np.array([[0, 0.5, 0]]),
            r"user 0, place 2: our log-likelihood is -2.000000, that of generate -1.500000",
        ),
        (ITEMS[:, [1, 0, 2]], SCORES, r"user 0, place 1: we rank \[1, 5\], generate ranks \[2, 6\]"),
        (ITEMS, SCORES * np.nan, "user 0, place 1"),
    ],
    ids=["score", "order", "nan"],
)
def test_no_time_is_recorded_where_results_differ(items: np.ndarray, scores: np.ndarray, message: str) -> None:
    with pytest.raises(CheckFailed, match=message + ".*no time is recorded"):
        check_equal((ITEMS, SCORES), (items, scores))


def test_scores_closer_than_rounding_may_swap_places() -> None:
    scores = np.array([[-1.0, -1.0 - 1e-5, -3.0]])
    check_equal((ITEMS, scores), (ITEMS[:, [1, 0, 2]], scores))


def test_the_csv_has_one_row_per_provider_and_the_one_schema(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "make_case", lambda *_: case)
    monkeypatch.setattr(bench, "STEPS", 1)
    for name, value in SMALL.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench_llm, "field", lambda *_: [])
    sink = MemorySink()
    result = bench.methods(3, tmp_path / "methods.csv", sink)
    with (tmp_path / "methods.csv").open(newline="") as handle:
        reader = csv.DictReader(handle)
        assert tuple(reader.fieldnames or ()) == (*COLUMNS, *WHERE)
        rows = [row for row in reader if row["unit"] == "ratio"]
    peaks = [row for row in rows if row["name"].startswith("vocabulary: memory")]
    assert all(0.9 < float(row["q50"]) < 1.1 for row in peaks)
    assert all(0.0 < float(row["q50"]) < 1.0 for row in rows if row["name"] == "sharpness form: direction")
    training = {name for name, kind in available().items() if kind.trains}
    assert {row["provider"] for row in rows if row["name"] == "step"} == training
    by_provider = {(row["name"], row["provider"]): row for row in rows}
    assert len(by_provider) == len(rows) == 5 + len(training) + 8 + 19
    assert by_provider["step", "finetune"]["q50"] == "1.0"
    assert by_provider["training", "packed"]["metric"].startswith("interactions per second over")
    (ours,) = (row for row in rows if row["provider"].startswith("cladapt"))
    assert ours["metric"].startswith("users per second over")
    shown = {
        (row["name"], row["provider"].partition(",")[0]): row["target"] for row in result["measured"] if row["target"]
    }
    assert shown == {key: target for key, target in bench.TARGETS.items() if not key[0].startswith("field")}
    assert [event["kind"] for event in sink.events] == ["note"] * 6


def test_too_few_runs_and_other_files_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--runs 2 is too few for quantiles.*use 3 or more"):
        bench.methods(2, None, MemorySink())
    with pytest.raises(ConfigError, match=r"--out .*rows.txt: unknown kind of file '.txt'.*ends in .csv"):
        bench.methods(3, tmp_path / "rows.txt", MemorySink())


def test_both_vocabularies_have_the_same_losses_and_lists(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(bench, name, value)
    tokens = len(case.base.tokenizer)
    alone, large = (replace(case, base=bench.wide_base(case, rows)) for rows in (tokens, 3000))
    embedding, longer = (some.base.model.get_input_embeddings().weight for some in (alone, large))
    assert (len(embedding), len(longer)) == (tokens, 3000)
    assert torch.equal(embedding, longer[:tokens])
    losses = bench.validation_losses(alone)
    assert len(losses) > 10
    bench.check_losses(losses, bench.validation_losses(large))
    for other in (losses + 0.01, losses[1:], losses * torch.nan):
        with pytest.raises(CheckFailed, match=r"differ by .*no time is recorded"):
            bench.check_losses(losses, other)
