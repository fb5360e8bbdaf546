"""Places of targets among all items, against the whole matrix of scores."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cladapt.config import EvalConfig, SimulateConfig
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import DataError
from cladapt.eval.metrics import check_rows
from cladapt.eval.sequences import SequenceEvaluator
from cladapt.model.sequence import ItemTable, SequenceModel
from cladapt.sequential import BackboneConfig
from cladapt.tokens.sequences import form_of_backbone


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    folder = tmp_path_factory.mktemp("data") / "stream"
    simulate(SimulateConfig(users=40, items=40, topics=4, blocks=3)).save(folder)
    return Stream.load(folder)


def model(stream: Stream, backbone: str) -> SequenceModel:
    torch.manual_seed(0)
    config = BackboneConfig.model_validate({"backbone": backbone, "hidden": 8, "window": 5, "normalise": "both"})
    return SequenceModel(config, ItemTable(None, torch.randn(stream.n_items, 8)))


@pytest.mark.parametrize("backbone", ["sasrec", "bert4rec"])
@pytest.mark.parametrize("first", [False, True], ids=["held out", "first events"])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_rows_are_what_the_whole_matrix_says(stream: Stream, backbone: str, first: bool, exclude_seen: bool) -> None:
    found = model(stream, backbone)
    config = EvalConfig(exclude_seen=exclude_seen, batch_users=7, beams=12)
    form = form_of_backbone(found.settings, 0.2)
    evaluator = SequenceEvaluator(stream, form, config)
    rows, cases = evaluator.rows(found, 1, 2, first), evaluator.cases(2, first)
    check_rows(rows)
    table = found.items(stream.n_items).detach()
    unit, catalogue = F.normalize(table.double(), dim=1), cases.catalogue.tolist()
    with torch.no_grad():
        for row, history, target in zip(
            rows.iter_rows(named=True), cases.histories, cases.target.tolist(), strict=True
        ):
            sequence = torch.from_numpy(form.read(history))[None]
            hidden = found.query(found.encode(sequence, table))[0, -1].double()
            logits = {item: (unit[item] @ hidden).item() for item in catalogue}
            if target not in logits:
                assert row["log_likelihood"] is None
                assert row["rank"] is None
                continue
            total = np.logaddexp.reduce(list(logits.values()))
            assert row["log_likelihood"] == pytest.approx(logits[target] - total, abs=1e-5)
            others = {i: s for i, s in logits.items() if not exclude_seen or i not in history}
            rank = sum(score > logits[target] + 1e-6 for score in others.values())
            assert row["rank"] == (rank if row["allowed"] and rank < config.beams else None)
            assert row["ties"] == (None if row["rank"] is None else 1)
            assert row["share"] is row["id_rank"] is None


def test_figures_of_a_block_do_not_depend_on_later_ones(stream: Stream) -> None:
    found = model(stream, "sasrec")
    config, form = EvalConfig(), form_of_backbone(found.settings, 0.2)
    whole, prefix = (SequenceEvaluator(s, form, config).rows(found, 1, 2) for s in (stream, stream.prefix(2)))
    assert whole.equals(prefix)


def test_scores_that_are_not_finite_are_named(stream: Stream) -> None:
    found = model(stream, "sasrec")
    with torch.no_grad():
        found.encoder.norm.weight.fill_(torch.nan)
    evaluator = SequenceEvaluator(stream, form_of_backbone(found.settings, 0.2), EvalConfig())
    with pytest.raises(DataError, match=r"block 2, model of block 1: the scores of user '.*' are not finite"):
        evaluator.rows(found, 1, 2)
