"""Sequential models: their loss against a written-out pass, which rows learn, and bases on disk."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cladapt.artifacts import read_json, write_json
from cladapt.config import SimulateConfig
from cladapt.data.schema import Stream
from cladapt.data.simulate import simulate
from cladapt.errors import DataError
from cladapt.model.sequence import ItemTable, SequenceLoss, SequenceModel
from cladapt.model.sequence_base import load_sequence_base, new_model, save_sequence_base
from cladapt.sequential import BackboneConfig, SequentialBaseConfig
from cladapt.tokens.sequences import MASK, PAD, START
from cladapt.tokens.table import TextMap

SEQUENCE = torch.tensor([[START, 3, 1, 4], [2, 0, PAD, PAD]])
TARGET = torch.tensor([[3, 1, 4, 5], [0, 6, 0, 0]])
COUNTED = torch.tensor([[False, True, True, True], [True, True, False, False]])
TABLES = {
    "drawn": {},
    "initialised": {"source": "llm", "dimensions": 12},
    "frozen": {"source": "llm", "use": "frozen", "reduction": "none", "dimensions": 12},
    "fused": {"source": "llm", "reduction": "alphafuse", "learned": 3, "dimensions": 12},
}


def model(**values: object) -> SequenceModel:
    torch.manual_seed(0)
    config = BackboneConfig.model_validate({"hidden": 8, "window": 4, "dropout": 0.0, **values})
    return SequenceModel(config, ItemTable(None, torch.randn(9, 8) * torch.linspace(0.1, 3, 9)[:, None])).eval()


@pytest.mark.parametrize("backbone", ["sasrec", "gru4rec", "bert4rec"])
@pytest.mark.parametrize(
    "normalise", [{}, {"normalise": "score"}, {"normalise": "both"}, {"normalise": "both", "temperature": 0.2}], ids=str
)
def test_the_loss_is_a_softmax_over_the_items_known(backbone: str, normalise: dict[str, object]) -> None:
    found = model(backbone=backbone, **normalise)
    table = found.items(7)
    read = F.normalize(table, dim=1) if normalise.get("normalise") == "both" else table
    scored = F.normalize(table, dim=1) if normalise else table
    vectors = torch.zeros(2, 4, 8)
    for place in (SEQUENCE >= 0).nonzero():
        vectors[tuple(place)] = read[SEQUENCE[tuple(place)]]
    vectors[SEQUENCE == START] = found.special[0]
    hidden = found.encoder(vectors, SEQUENCE != PAD)[COUNTED]
    query = F.normalize(hidden, dim=1) / 0.2 if "temperature" in normalise else hidden
    wanted = F.cross_entropy(query @ scored.T, TARGET[COUNTED], reduction="none")
    torch.testing.assert_close(SequenceLoss(found, 7)(SEQUENCE, TARGET, COUNTED), wanted)


def test_a_hidden_item_has_a_vector_of_its_own() -> None:
    found = model(backbone="bert4rec")
    hidden = found.encode(torch.tensor([[START, MASK]]), found.items(7))
    wanted = found.encoder(found.special[None], torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(hidden, wanted)


def test_a_learned_temperature_starts_where_it_is_set() -> None:
    found = model(normalise="both", temperature=0.2, learn_temperature=True)
    assert found.temperature == pytest.approx(0.2)
    fixed = model(normalise="both", temperature=0.2)
    hidden = torch.randn(3, 8)
    torch.testing.assert_close(found.query(hidden), fixed.query(hidden))
    assert found.log_temperature is not None
    found.query(hidden).sum().backward()
    assert found.log_temperature.grad is not None


def test_the_rows_before_the_first_do_not_learn_and_later_ones_take_no_part() -> None:
    found = model()
    SequenceLoss(found, 7, first=3)(SEQUENCE, TARGET, COUNTED).sum().backward()
    assert found.items.rows is not None
    assert found.items.rows.grad is not None
    assert found.items.rows.grad.any(1).tolist() == [False] * 3 + [True] * 4 + [False] * 2


def test_outputs_have_the_scores_of_earlier_items_where_they_are_asked_for() -> None:
    found = model(normalise="score")
    for earlier in (0, 5):
        loss = SequenceLoss(found, 7, earlier=earlier)
        loss.observed = True
        loss(SEQUENCE, TARGET, COUNTED)
        assert loss.outputs is not None
        assert loss.outputs.label.tolist() == TARGET[COUNTED].tolist()
        wanted = loss.outputs.hidden @ F.normalize(found.items(earlier), dim=1).T
        torch.testing.assert_close(loss.outputs.scores, wanted.flatten())
        assert loss.outputs.choice.tolist() == [i for i in range(5) for _ in range(earlier)]
        assert loss.counted is not None
        assert torch.equal(loss.counted, SEQUENCE != PAD)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    folder = tmp_path_factory.mktemp("data") / "stream"
    simulate(SimulateConfig(users=40, items=40, topics=4, blocks=3)).save(folder)
    return Stream.load(folder)


def saved(folder: Path, stream: Stream, table: dict[str, object]) -> SequenceModel:
    config = SequentialBaseConfig.model_validate({"hidden": 8, "table": table})
    first = stream.prefix(1)
    texts = TextMap.fit(first, config.table, 8, 0) if config.table.source == "llm" else None
    made = new_model(config, first.items, texts)
    record = {"stream": first.fingerprint, "fitted_block": 1, "config": config.model_dump(mode="json")}
    save_sequence_base(folder, made, texts, first, record)
    return made


@pytest.mark.parametrize("kind", TABLES)
def test_a_base_is_read_as_it_was_written_and_grows_with_the_stream(kind: str, stream: Stream, tmp_path: Path) -> None:
    made = saved(tmp_path / "base", stream, TABLES[kind])
    base = load_sequence_base(tmp_path / "base")
    assert base.weights == load_sequence_base(tmp_path / "base").weights
    for name, tensor in made.state_dict().items():
        assert torch.equal(base.model.state_dict()[name], tensor), name
    known = len(stream.known(1))
    before = base.sequence.items(known).clone()
    at_once = load_sequence_base(tmp_path / "base")
    at_once.extend(stream)
    base.extend(stream.prefix(2))
    base.extend(stream)
    assert torch.equal(base.sequence.items(stream.n_items), at_once.sequence.items(stream.n_items))
    torch.testing.assert_close(base.sequence.items(known), before)
    assert bool(base.sequence.items(stream.n_items).any(1).all())
    learned = {"drawn": 8, "initialised": 8, "fused": 3}.get(kind)
    assert [tuple(t.shape) for t in base.extra_tensors.values()] == ([(stream.n_items, learned)] if learned else [])


def test_a_damaged_base_is_refused(stream: Stream, tmp_path: Path) -> None:
    saved(tmp_path / "base", stream, TABLES["initialised"])
    file = tmp_path / "base" / "cladapt.json"
    record = read_json(file)
    write_json(file, {**record, "config": {**record["config"], "hidden": 16}})
    with pytest.raises(
        DataError, match=r"model\.safetensors does not hold the model of cladapt\.json: Error.* size mismatch"
    ):
        load_sequence_base(tmp_path / "base")
    write_json(file, {**record, "fingerprint": "0" * 16})
    with pytest.raises(DataError, match="its weights have the fingerprint"):
        load_sequence_base(tmp_path / "base")
    write_json(file, record)
    (tmp_path / "base" / "projection.safetensors").unlink()
    with pytest.raises(DataError, match=r"projection\.safetensors is not the file that cladapt\.json was written for"):
        load_sequence_base(tmp_path / "base")
    with pytest.raises(DataError, match=r"is not a sequential base: .* \(make one with `cladapt base sequential`\)"):
        load_sequence_base(tmp_path)
