"""What sequential models learn from: batches, whose loss each place is, and bases with their figures."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cladapt.artifacts import read_json
from cladapt.config import SimulateConfig
from cladapt.data.histories import split_block
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.model.geometry import Graphs
from cladapt.model.sequence import SequenceLoss
from cladapt.model.sequence_base import load_sequence_base
from cladapt.sequential import SequentialBaseConfig, SequentialTrainConfig
from cladapt.tokens.sequences import PAD, SequenceForm
from cladapt.train import sequence_bases
from cladapt.train.sequence_bases import DIAGNOSTICS, figures, make_sequence_base
from cladapt.train.sequences import SequenceTargets, first_row, make_sequence_feed
from cladapt.train.sinks import MemorySink

FORMS = (SequenceForm(6), SequenceForm(6, 0.25))


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    folder = tmp_path_factory.mktemp("data") / "stream"
    simulate(SimulateConfig(users=40, items=40, topics=4, blocks=3)).save(folder)
    return Stream.load(folder)


@pytest.mark.parametrize("form", FORMS, ids=["causal", "hiding"])
def test_an_epoch_has_every_training_event_once(stream: Stream, form: SequenceForm) -> None:
    feed = make_sequence_feed(stream, [2], form, SequentialTrainConfig(batch_sequences=4))
    split = split_block(stream, 2)
    wanted = Counter(int(i) for u in range(len(split.user)) for i in split.training(u)[0][split.training(u)[1] :])
    for found in (feed, feed.apart()):
        batches = found.epoch([0, 1])
        told = Counter(int(i) for _, target, counted in batches for i in target[counted])
        assert told == wanted
        assert sum(map(found.targets, batches)) == wanted.total()
        assert all(len(batch[0]) <= 4 and batch[0].shape == batch[1].shape == batch[2].shape for batch in batches)
    assert all((batch[2].sum(1) == 1).all() for batch in feed.apart().epoch([0]))
    held_out = [int(i) for _, target, counted in feed.validation() for i in target[counted]]
    assert held_out == split.targets("valid").tolist()
    assert feed.validation_targets == len(held_out)


def test_order_depends_on_the_seed_alone(stream: Stream) -> None:
    feed = make_sequence_feed(stream, [1], FORMS[1], SequentialTrainConfig())
    one, same, other = (feed.epoch([seed]) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for x, y in zip(one, same, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(one[0][1], other[0][1])
    assert [len(batch[0]) for batch in feed.singles(1.0, 1)] == [1] * len(feed)
    assert sum(len(batch[0]) for batch in feed.sample(0.5)) == round(0.5 * len(feed))


def test_held_out_events_of_the_block_before_are_learned_where_asked(stream: Stream) -> None:
    plain, more = (
        make_sequence_feed(stream, [2], FORMS[0], SequentialTrainConfig(held_out=held_out))
        for held_out in ("never", "next")
    )
    added = sum(map(more.targets, more.epoch([0]))) - sum(map(plain.targets, plain.epoch([0])))
    assert added == 2 * split_block(stream, 1).n_test


def test_a_place_works_for_the_next_target_of_its_row() -> None:
    targets = SequenceTargets(np.array([3, 1]))
    target = torch.tensor([[0, 7, 0, 9, 0], [5, 0, 0, 0, 0]])
    counted = torch.tensor([[False, True, False, True, False], [True, False, False, False, False]])
    batch = (target, target, counted)
    assert targets.owner(batch).tolist() == [[7, 7, 9, 9, 9], [5, 5, 5, 5, 5]]
    assert targets.sample(batch).tolist() == [[0] * 5, [1] * 5]
    assert targets.of_losses(batch, targets.owner(batch)).tolist() == [7, 9, 5]
    assert targets.frequency.tolist() == [3, 1]


def test_rows_learn_of_the_items_that_came_with_the_blocks(stream: Stream) -> None:
    known = [len(stream.known(block)) for block in range(4)]
    assert first_row(stream, [2], "new") == known[1]
    assert first_row(stream, [1, 2], "new") == 0
    assert first_row(stream, [2], "all") == 0
    assert first_row(stream, [2], "none") == known[2]


def test_a_base_keeps_its_losses_and_figures_and_knows_block_1_alone(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_bases, "TRAINING", 10**6)
    config = SequentialBaseConfig(hidden=8, epochs=2, dropout=0.0)
    make_sequence_base(tmp_path / "one", stream, config, MemorySink())
    make_sequence_base(tmp_path / "other", stream.prefix(1), config, MemorySink())
    record = read_json(tmp_path / "one" / "cladapt.json")
    assert record == read_json(tmp_path / "other" / "cladapt.json")
    assert len(record["training_loss"]) == 2
    base = load_sequence_base(tmp_path / "one")
    assert len(base.sequence.items) == len(stream.known(1))
    feed = make_sequence_feed(stream.prefix(1), [1], SequenceForm(config.window), SequentialTrainConfig())
    loss = SequenceLoss(base.sequence, len(base.sequence.items))
    with torch.no_grad():
        whole = torch.cat([loss(*batch) for batch in feed.epoch([0])])
    found = record[DIAGNOSTICS]
    assert found["training_loss"] == pytest.approx(whole.mean().item(), rel=1e-5)
    assert found == figures(loss, feed, Graphs.of(stream, 1, None, config.table, 0))
    table = base.sequence.items(len(base.sequence.items)).detach().double()
    assert found["norm_dispersion"] == pytest.approx(
        (table.norm(dim=1).std(correction=0) / table.norm(dim=1).mean()).item()
    )
    largest = []
    for sequence, target, counted in feed.validation():
        for row, goal, place in zip(sequence, target, counted, strict=True):
            hidden = base.sequence.encode(row[None, : int((row != PAD).sum())], table.float())[0, -1].detach().double()
            label = goal[place][0]
            matrix = torch.autograd.functional.hessian(lambda h, y=label: F.cross_entropy(table @ h, y), hidden)
            largest.append(torch.linalg.eigvalsh(matrix)[-1].item())
    assert len(largest) <= sequence_bases.CURVATURE
    assert found["largest_eigenvalue"] == pytest.approx(np.mean(largest), rel=1e-4)
